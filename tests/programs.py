"""Programs of the system that tests use: where they are, which are missing here, and what installs them.

    python tests/programs.py        print the Debian packages that are missing
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

# Program -> the Debian package that has it. Tests name programs by `needs` marks and `program`; both take only these.
PACKAGES = {
    "bash": "bash", "dash": "dash", "zsh": "zsh", "tcsh": "tcsh", "fish": "fish",
    "ssh": "openssh-client", "ssh-keygen": "openssh-client", "ssh-agent": "openssh-client", "ssh-add": "openssh-client",
    "sshd": "openssh-server", "openssl": "openssl", "pdsh": "pdsh", "faketime": "faketime", "nft": "nftables",
    "ip": "iproute2", "ss": "iproute2", "tc": "iproute2", "g++": "g++", "ps": "procps", "hostname": "hostname",
    "unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux", "mount": "mount",
    "/usr/bin/python3": "python3", "chromium": "chromium", "go": "golang-go",
}
LAB = ("unshare", "nsenter", "mount", "hostname", "ip", "ss", "ssh", "ssh-keygen", "sshd")  # what whole machines take


def find_program(name: str) -> str | None:
    """Return a program's path; sshd is where users don't look. Raises KeyError for one that PACKAGES lacks."""
    assert PACKAGES[name]
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def program(name: str) -> str:
    """Return a program's path, or skip the test."""
    found = find_program(name)
    if not found:
        pytest.skip(f"needs {name}")
    return found


def missing_programs() -> list[str]:
    """Return the names of all programs that some test uses and that aren't here."""
    return [name for name in PACKAGES if not find_program(name)]


def install_command(names: list[str]) -> str:
    """Return the command that installs programs."""
    return f"{as_root()}apt install {' '.join(packages(names))}"


def packages(names: list[str]) -> list[str]:
    """Return the Debian packages that have programs."""
    return sorted({PACKAGES[name] for name in names})


def as_root() -> str:
    """Return what has to stand before a command that needs root."""
    return "" if os.geteuid() == 0 else "sudo "


@cache
def may_mount() -> bool:
    """Return whether mounts and network namespaces may be made here; root in a container often may not."""
    if os.geteuid() or not find_program("unshare") or not find_program("mount"):
        return False
    words = ["unshare", "-m", "-n", "sh", "-c", "mount -t tmpfs none /mnt"]
    return not subprocess.run(words, stderr=subprocess.DEVNULL).returncode


def let_others_in(folder: Path) -> None:
    """Let other accounts reach a folder of a test."""
    top = Path(tempfile.gettempdir())
    for path in (folder, *folder.parents):
        if top in path.parents:
            path.chmod(path.stat().st_mode | 0o055)


if __name__ == "__main__":
    print(*packages(missing_programs()))
