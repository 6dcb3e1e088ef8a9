"""`invoke hostfile` on real servers with made-up GPUs: right lines, honest comments, nothing lost, nothing injected."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from conftest import ROOT
from machines import Machine, nvidia_gpu
from ssh_server import SshClient, SshServer, free_port

from master.inventory.cluster_file import SCHEMA
from master.inventory.hostfile import Slots, read_hostfile

pytestmark = pytest.mark.needs("sshd", "ssh", "ssh-keygen")
TOOL = ROOT / "master" / "generate_hostfile.py"


class Lab:
    """gpu1 has two healthy GPUs, gpu2 two of which the first needs a reset, gpu3 doesn't answer, amd1 has an MI210."""

    def __init__(self, folder: Path, servers: dict[str, SshServer], machines: dict[str, Machine]) -> None:
        self.folder, self.servers, self.machines = folder, servers, machines
        self.client = SshClient(folder / "client", **servers)
        self.client.config.write_text(f"Host gpu3\n  HostName 127.0.0.1\n  Port {free_port()}\n"
                                      + self.client.config.read_text())
        self.hostfile, self.cluster = folder / "hostfile.txt", folder / "cluster.json"

    def run(
        self, *words: str, nodes: str = "gpu1,gpu2,gpu3", keys: str = "accept-new"
    ) -> subprocess.CompletedProcess[str]:
        """Run the tool in the lab's folder."""
        command = [sys.executable, str(TOOL), *(["--nodes", nodes] if nodes else []), "--ssh-config",
                   str(self.client.config), "--host-keys", keys, "--connect-timeout", "3", *words]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert "Traceback" not in done.stderr, done.stderr
        return done


def equip(server: SshServer, machine: Machine) -> None:
    """Make a server's sessions see a machine's GPUs."""
    (server.home / ".bashrc").write_text(
        f"export PATH='{machine.bin}':$PATH GPU_DETECT_SYSROOT='{machine.root}'\necho Welcome\n")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    machines = {name: Machine(tmp_path / f"machine-{name}") for name in ("gpu1", "gpu2", "amd1")}
    machines["gpu1"].nvidia(nvidia_gpu(0), nvidia_gpu(1))
    machines["gpu2"].nvidia(nvidia_gpu(0, utilization_gpu="[GPU requires reset]"), nvidia_gpu(1))
    machines["amd1"].kfd(1, banks=(64 << 30,))
    with SshServer(tmp_path / "1") as one, SshServer(tmp_path / "2", address="127.0.0.2") as two, \
            SshServer(tmp_path / "3", address="127.0.0.3") as three:
        servers = {"gpu1": one, "gpu2": two, "amd1": three}
        for name, server in servers.items():
            equip(server, machines[name])
        yield Lab(tmp_path, servers, machines)


def test_a_mixed_lab_gets_its_hostfile(lab: Lab) -> None:
    done = lab.run()
    assert done.returncode == 1
    assert lab.hostfile.read_text().splitlines()[1:] == [
        "# gpu1: 2x NVIDIA GeForce RTX 3090 24576 MiB", "gpu1 slots=2 type=NVIDIA",
        "# gpu2: 2x NVIDIA GeForce RTX 3090 24576 MiB; slot 0 unusable (NV_RESET_REQUIRED)",
        "gpu2 slots=2 type=NVIDIA",
        *[line for line in lab.hostfile.read_text().splitlines() if line.startswith("# gpu3: TCP: 127.0.0.1 port")],
        "# include: gpu1@gpu2:1"]
    assert done.stdout == lab.hostfile.read_text()
    assert "gpu3  failed    TCP" in done.stderr and "failed: gpu3\n" in done.stderr
    assert "2 of 3 hosts, 3 slots" in done.stderr
    from deepspeed.launcher.runner import _parse_hostfile

    assert dict(_parse_hostfile(lab.hostfile.read_text().splitlines())) == {"gpu1": 2, "gpu2": 2}
    assert lab.run("--allow-missing").returncode == 0


def test_cluster_json_says_what_is_known_and_keeps_what_others_found(lab: Lab) -> None:
    lab.run(nodes="gpu1,gpu2")
    cluster = json.loads(lab.cluster.read_text())
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(cluster)
    first, second = cluster["hosts"]
    assert (first["address"], second["address"]) == ("127.0.0.1", "127.0.0.2")
    assert first["host_key"].startswith("SHA256:") and first["reached"]["way"] == "paramiko"
    assert second["report"]["slots_use"] == [1]
    first["facts"] = {"python": "3.12"}
    lab.cluster.write_text(json.dumps(cluster))
    lab.run(nodes="gpu1")
    hosts = json.loads(lab.cluster.read_text())["hosts"]
    assert [(host["name"], host["facts"]) for host in hosts] == [("gpu1", {"python": "3.12"})]


def test_a_second_run_changes_nothing_and_a_change_is_told(lab: Lab) -> None:
    lab.run(nodes="gpu1,gpu2")
    before = [path.read_bytes() for path in (lab.hostfile, lab.cluster)]
    done = lab.run(nodes="gpu1,gpu2")
    assert done.returncode == 0 and "changed:" not in done.stderr and "hostfile.txt: unchanged" in done.stderr
    assert [path.read_bytes() for path in (lab.hostfile, lab.cluster)] == before
    lab.machines["gpu1"].nvidia(nvidia_gpu(0))
    assert "changed: gpu1: 2 -> 1 slots" in lab.run(nodes="gpu1,gpu2").stderr
    assert "changed: gpu2: gone, had 1 slots" in lab.run(nodes="gpu1").stderr


def test_one_vendor_trains_and_the_others_stand_as_comments(lab: Lab) -> None:
    lab.run(nodes="amd1,gpu1")
    assert [host.host for host in read_hostfile(lab.hostfile)] == ["gpu1"]
    assert "# amd1: 1x AMD Instinct MI210 65536 MiB; left out: AMD can't train with NVIDIA" in lab.hostfile.read_text()
    lab.run("--vendor", "amd", nodes="amd1,gpu1")
    assert read_hostfile(lab.hostfile) == [Slots("amd1", 1, (0,), "AMD")]
    lab.run("--cpu-slots", "3", nodes="amd1,gpu1")
    assert read_hostfile(lab.hostfile) == [Slots(name, 3, (0, 1, 2), "CPU") for name in ("amd1", "gpu1")]


def test_without_a_usable_gpu_nothing_is_written(lab: Lab) -> None:
    lab.machines["gpu1"].tool("nvidia-smi", ("*", "No devices were found", 6))
    done = lab.run(nodes="gpu1")
    assert done.returncode == 1 and "--cpu-slots" in done.stderr
    assert not lab.hostfile.exists()


def test_a_copied_script_is_run_and_a_missing_one_replaced(lab: Lab) -> None:
    home = lab.servers["gpu1"].home
    (home / "setup").mkdir()
    copy = home / "setup" / "detect_gpus.sh"
    copy.write_text((ROOT / "worker" / "detect_gpus.sh").read_text().replace('"gpu-report/1", ', '"gpu-report/1", ', 1))
    done = lab.run("--script-path", "~/setup/detect_gpus.sh", nodes="gpu1,gpu2")
    assert done.returncode == 0
    assert "gpu1: ~/setup/detect_gpus.sh there is not executable: chmod +x" in done.stderr
    assert "gpu2: no ~/setup/detect_gpus.sh there: asked with this machine's copy" in done.stderr
    copy.chmod(0o755)
    expanded = str(Path.home() / "setup" / "detect_gpus.sh")  # as the user's shell hands a ~ over
    assert "gpu1:" not in lab.run("--script-path", expanded, nodes="gpu1").stderr.replace("] gpu1:", "")
    copy.write_text("#!/bin/sh\necho NVIDIA 4\n")
    assert "gives no report" in lab.run("--script-path", "~/setup/detect_gpus.sh", nodes="gpu1").stderr
    assert lab.hostfile.read_text().count("gpu1 slots=2") == 1


def test_a_port_and_a_key_are_typed_once(lab: Lab) -> None:
    text = lab.client.config.read_text().replace(f"  Port {lab.servers['gpu1'].port}\n", "")
    lab.client.config.write_text(text.replace(f"  IdentityFile {lab.client.key}\n", "  IdentityFile none\n"))
    assert lab.run(nodes="gpu1").returncode == 1
    flags = ("--ssh-port", str(lab.servers["gpu1"].port), "--ssh-key", str(lab.client.key))
    assert lab.run(*flags, nodes="gpu1").returncode == 0
    for _ in range(2):
        done = lab.run(nodes="gpu1")
        assert done.returncode == 0, done.stderr
    (host,) = json.loads(lab.cluster.read_text())["hosts"]
    assert (host["reached"]["port"], host["reached"]["key"]) == (lab.servers["gpu1"].port, str(lab.client.key))


@pytest.mark.parametrize("missing", ["bash", "python3"])
def test_a_host_without_bash_or_python_still_answers(lab: Lab, missing: str) -> None:
    machine, server = lab.machines["gpu1"], lab.servers["gpu1"]
    (machine.base / "python3").symlink_to(sys.executable)
    (machine.base / missing).unlink()
    config = server.folder / "sshd_config"
    text = config.read_text()
    config.write_text(text[: text.index("ForceCommand")] + "ForceCommand "
                      f"PATH='{machine.bin}:{machine.base}' GPU_DETECT_SYSROOT='{machine.root}' "
                      f"HOME='{machine.scratch}' exec /bin/sh -c \"$SSH_ORIGINAL_COMMAND\"\n")
    server.__exit__()
    with server:
        done = lab.run(nodes="gpu1")
    assert done.returncode == 0, done.stderr
    assert read_hostfile(lab.hostfile) == [Slots("gpu1", 2, (0, 1), "NVIDIA")]


def test_a_hostile_worker_injects_nothing(lab: Lab) -> None:
    fake = lab.machines["gpu2"].bin / "bash"
    report = json.dumps({"schema": "gpu-report/1", "detector": "detect_gpus.sh", "hostname": "x\u001b[31m",
                         "vendor": "NVIDIA", "status": "ok", "slots_total": 1, "slots_use": [0], "driver_version": "1",
                         "gpus": [{"index": 0, "name": "3090\ngpu9 slots=8", "uuid": None, "memory_total_mib": 1,
                                   "memory_free_mib": 1, "compute_capability": None, "arch": None, "mig": False,
                                   "integrated": False, "usable": True, "busy_mib": 0}], "problems": []})
    fake.write_text(f"#!/bin/sh\nfor last; do :; done\nprintf '\\n@@GPU_REPORT %s ' \"$last\"; cat <<'X'\n{report}\nX\n"
                    "printf '@@HOST_FACTS %s a b $(id) c|;|\\033[31m' \"$last\"; exit 0\n")
    fake.chmod(0o755)
    (lab.machines["gpu2"].bin / "python3").symlink_to("/bin/false")
    done = lab.run(nodes="gpu1,gpu2")
    assert done.returncode == 1
    assert [host.host for host in read_hostfile(lab.hostfile)] == ["gpu1"]
    everything = lab.hostfile.read_text() + lab.cluster.read_text() + done.stdout + done.stderr
    assert "\x1b" not in everything and "\ngpu9" not in everything
    assert "unprintable characters" in done.stderr


def test_unknown_hosts_are_refused_without_a_terminal(lab: Lab) -> None:
    done = lab.run(nodes="gpu1", keys="ask")
    assert done.returncode == 1
    assert "host key: unknown: ssh-ed25519 SHA256:" in done.stderr and "--host-keys accept-new" in done.stderr


def test_names_that_deepspeed_cannot_take_are_told(lab: Lab) -> None:
    server = lab.servers["gpu1"]
    done = lab.run(nodes=f"127.0.0.1:{server.port},gpu2")
    assert done.returncode == 1
    assert "DeepSpeed can't take a port in a host's name" in done.stderr
    assert f"write 'Host NAME' with 'HostName 127.0.0.1, Port {server.port}'" in done.stderr
    assert [host.host for host in read_hostfile(lab.hostfile)] == ["gpu2"]


def test_one_machine_under_two_names_is_noticed(lab: Lab) -> None:
    lab.client.config.write_text(f"Host again\n  HostName 127.0.0.1\n  Port {lab.servers['gpu1'].port}\n"
                                 + lab.client.config.read_text())
    done = lab.run(nodes="gpu1,again")
    seen = any(path.exists() for path in Path("/sys/class/net").glob("*/device"))
    assert ("again and gpu1 are the same machine" in done.stderr) == seen


def test_reports_kept_in_files_serve_too(lab: Lab) -> None:
    lab.run(nodes="gpu1,gpu2")
    folder = lab.folder / "reports"
    folder.mkdir()
    for host in json.loads(lab.cluster.read_text())["hosts"]:
        (folder / f"{host['name']}.json").write_text("@@GPU_REPORT - " + json.dumps(host["report"]))
    (folder / "bad.json").write_text("{}")
    before = read_hostfile(lab.hostfile)
    done = lab.run("--from-reports", *map(str, sorted(folder.iterdir())), nodes="")
    assert done.returncode == 1 and "bad.json: $: " in done.stderr
    assert read_hostfile(lab.hostfile) == before


def test_json_is_for_programs(lab: Lab) -> None:
    done = lab.run("--json")
    told = json.loads(done.stdout)
    assert [host["name"] for host in told["hosts"]] == ["gpu1", "gpu2", "gpu3"]
    assert told["vendor"] == "NVIDIA" and told["hosts"][2]["report"] is None and told["hosts"][2]["fault"]


@pytest.mark.parametrize("words", [["--nodes", "; touch x"], ["--nodes", "gpu1,gpu1"], ["--nodes", "gpu[1-1025]"], [],
                                   ["--nodes", "gpu1", "--ssh-key", "/nowhere"], ["--nodes", "a", "--cpu-slots", "0"],
                                   ["--nodes", "gpu1", "--ssh-password"], ["--nodes", "gpu1", "--timeout", "0"]])
def test_wrong_usage_is_exit_code_2(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(TOOL), *words], cwd=tmp_path, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_password_file_must_be_private(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    secret.chmod(0o644)
    done = subprocess.run([sys.executable, str(TOOL), "--nodes", "localhost", "--ssh-password-file", str(secret)],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "chmod 600" in done.stderr and "hunter2" not in done.stderr
