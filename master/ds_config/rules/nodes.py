"""A config against the machines that will run it: GPUs too old for bf16, none for fp16, RAM, NVMe drives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from master.core.terminal import listed
from master.ds_config.problem import INIT, Config, Problem, Rules

RULES = Rules()
AMPERE = 8.0  # the first compute capability with bf16 units
ZERO = "zero_optimization"


def gpus_of(host: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a host's usable GPUs, as its report has them."""
    return [gpu for gpu in host["report"].get("gpus", []) if gpu.get("usable")]


@RULES.add
def bf16_on_old_gpus(config: Config) -> Iterator[Problem]:
    """bf16 below compute capability 8.0, which is emulated at a fraction of the speed."""
    if not config.on("bf16", "enabled"):
        return
    old = [f"{host['name']} ({gpu.get('name')})" for host in config.target.hosts for gpu in gpus_of(host)[:1]
           if any(_capability(each) < AMPERE for each in gpus_of(host))]
    if old:
        yield Problem("bf16-on-old-gpu", "warning", ("bf16", "enabled"), f"no bf16 units on {listed(old)}: it is "
                      "emulated, slower than fp32", 'use fp16 for all, or write "auto" (trainer/train.py chooses)')


def _capability(gpu: dict[str, Any]) -> float:
    try:
        return float(gpu["compute_capability"])
    except (KeyError, TypeError, ValueError):
        return AMPERE


@RULES.add
def fp16_without_gpus(config: Config) -> Iterator[Problem]:
    """fp16 on CPU ranks (engine.py: "Type fp16 is not supported on your device")."""
    bare = [host["name"] for host in config.target.hosts if not gpus_of(host)]
    if bare and config.on("fp16", "enabled"):
        yield Problem("fp16-on-cpu", "error", ("fp16", "enabled"), f"no GPU on {listed(bare)}, and DeepSpeed has no "
                      "fp16 on CPUs", 'write "auto"', INIT)


@RULES.add
def compiled_on_cpus(config: Config) -> Iterator[Problem]:
    """Quantized ZeRO++ where there is no CUDA ("This op had not been implemented on CPU backend")."""
    bare = [host["name"] for host in config.target.hosts if not gpus_of(host)]
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        if bare and config.on(ZERO, key):
            yield Problem("needs-cuda", "error", (ZERO, key), f"no GPU on {listed(bare)}, and it is CUDA code",
                          "take it out", INIT)


@RULES.add
def second_copy_within_a_machine(config: Config) -> Iterator[Problem]:
    """hpZ whose group is no divisor of each machine's GPUs, so that it crosses the network."""
    size = config.get(ZERO, "zero_hpz_partition_size", default=1)
    if not isinstance(size, int) or size < 2 or config.stage != 3:
        return
    across = [f"{host['name']} ({len(gpus_of(host))} GPUs)" for host in config.target.hosts
              if len(gpus_of(host)) % size]
    if across:
        yield Problem("hpz-across-machines", "warning", (ZERO, "zero_hpz_partition_size"), f"groups of {size} do not "
                      f"fit into {listed(across)}: they reach over the network", "set it to the GPUs of a machine")


@RULES.add
def memory_and_drives(config: Config) -> Iterator[Problem]:
    """Buffers against each host's RAM, NVMe folders against its drives, as far as cluster.json knows them."""
    need = sum(buffer_bytes(config, section) for section in ("offload_param", "offload_optimizer"))
    small = [host["name"] for host in config.target.hosts
             if isinstance(ram := host["facts"].get("ram_bytes"), int) and 0 < ram < need]
    if small:
        yield Problem("ram", "error", (ZERO, "offload_param"), f"the buffers alone take {need / 1e9:.0f} GB of RAM, "
                      f"more than {listed(small)} has", "lower buffer_count or buffer_size", INIT)
    for section in ("offload_param", "offload_optimizer"):
        path = config.get(ZERO, section, "nvme_path")
        if config.device(section) != "nvme" or not isinstance(path, str):
            continue
        without = [host["name"] for host in config.target.hosts if host["facts"].get("disks")
                   and not any(_holds(disk, path) and not disk.get("rotational") for disk in host["facts"]["disks"])]
        if without:
            yield Problem("nvme", "warning", (ZERO, section, "nvme_path"), f"no fast drive holds {path} on "
                          f"{listed(without)}", "name a folder on an NVMe drive of every host")


def _holds(disk: dict[str, Any], path: str) -> bool:
    mount = str(disk.get("mount")).rstrip("/")
    return path == mount or path.startswith(mount + "/")


def buffer_bytes(config: Config, section: str) -> int:
    """Return the bytes of RAM per rank that NVMe offload reserves: 2 a weight, 4 an optimizer state."""
    if config.device(section) != "nvme" or config.stage != 3:
        return 0
    count, size = (config.get(ZERO, section, key, default=default)
                   for key, default in (("buffer_count", 5), ("buffer_size", 100_000_000)))
    if section == "offload_optimizer" or not all(isinstance(part, (int, float)) for part in (count, size)):
        return 0
    return int(2 * count * size)
