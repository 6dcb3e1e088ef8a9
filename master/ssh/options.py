"""The flags that tell every tool how to reach hosts."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from master.core.run_cli import UsageError
from master.core.terminal import confirm, say
from master.core.text_file import read_text
from master.core.trust import TrustFolder
from master.ssh.route import SshOptions

if TYPE_CHECKING:
    from master.ssh.run_on_all import UnknownHost

OWN_KEY = Path("~/.ssh/id_ed25519_lanspeed")
PASSWORD_VARIABLE = "LANSPEED_SSH_PASSWORD"  # noqa: S105, the name of a variable
CONNECT_TIMEOUT_S, TIMEOUT_S = 10, 90
PROMPT = object()  # --ssh-password without a value


class SshOptionsError(UsageError):
    """Flags that can't be followed."""


def add_ssh_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; `ssh_options` reads them."""
    group = parser.add_argument_group("reaching hosts (otherwise as your ssh configuration says)")
    flag = group.add_argument
    flag("--ssh-user", metavar="U", help="login name")
    flag("--ssh-port", type=int, metavar="P", help="port")
    flag("--ssh-key", type=Path, metavar="K", help="private key to offer first")
    flag("--ssh-password", nargs="?", const=PROMPT, metavar="VALUE",
         help="ask for a password (a VALUE here works too, and every user of this machine can read it in ps)")
    flag("--ssh-password-file", type=Path, metavar="F", help=f"file with it (or variable {PASSWORD_VARIABLE})")
    flag("--ssh-config", type=Path, metavar="F", help="ssh configuration instead of ~/.ssh/config")
    flag("--host-keys", choices=["ask", "accept-new", "yes"],
         help="unknown host keys: ask, accept-new (note them), yes (refuse them); a changed key is always refused")
    flag("--trust-folder", action=TrustFolder, nargs=0, default=False,
         help="obey a hostfile, cluster.json or run folder that others own or may write")
    flag("--connect-timeout", type=positive, default=CONNECT_TIMEOUT_S, metavar="S",
         help="seconds for a host to answer (10)")
    flag("--timeout", type=positive, default=TIMEOUT_S, metavar="S", help="seconds for the work on one host (90)")


def positive(text: str) -> float:
    """Return a number of seconds above 0; raise ValueError otherwise (argparse then says so)."""
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError
    return value


def ssh_options(options: argparse.Namespace) -> SshOptions:
    """Return what the flags say; may ask for a password on the terminal. Raises AccessError."""
    for name in ("ssh_config", "ssh_key"):
        path = getattr(options, name)
        if path is not None and not path.expanduser().is_file():
            raise SshOptionsError(f"--{name.replace('_', '-')}: {path}: no such file")
    own = OWN_KEY.expanduser()
    return SshOptions(
        ssh_config=options.ssh_config and options.ssh_config.expanduser(), user=options.ssh_user, port=options.ssh_port,
        key=options.ssh_key and options.ssh_key.expanduser(), password=password_of(options),
        host_keys=options.host_keys, connect_timeout=options.connect_timeout, timeout=options.timeout,
        more_keys=(own,) if own.exists() else ())


def ssh_flags(options: argparse.Namespace) -> list[str]:
    """Return the flags again, for another tool; not a password, which goes by LANSPEED_SSH_PASSWORD."""
    names = ("ssh_user", "ssh_port", "ssh_key", "ssh_password_file", "ssh_config", "host_keys", "connect_timeout",
             "timeout")
    defaults = {"connect_timeout": CONNECT_TIMEOUT_S, "timeout": TIMEOUT_S}
    return [word for name in names if getattr(options, name) not in (None, defaults.get(name))
            for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
            ] + ["--trust-folder"] * options.trust_folder


def password_of(options: argparse.Namespace) -> str | None:
    """Return the password from flag, file, variable or prompt; None if there is to be none."""
    if options.ssh_password_file:
        path = options.ssh_password_file.expanduser()
        try:
            if path.stat().st_mode & 0o077:
                raise SshOptionsError(f"--ssh-password-file: {path} can be read by others: chmod 600 {path}")
            return read_text(path).rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SshOptionsError(f"--ssh-password-file: {path}: {getattr(error, 'strerror', 'not UTF-8')}") from None
    if options.ssh_password is PROMPT:
        if not sys.stdin.isatty():
            raise SshOptionsError(f"--ssh-password: no terminal to ask on: set {PASSWORD_VARIABLE}, or give "
                                  "--ssh-password-file F")
        return getpass.getpass("SSH password: ")
    if options.ssh_password is not None:
        print("warning: a password on the command line can be read by every user of this machine (ps) and stays in the "
              "shell's history: --ssh-password alone asks for it", file=sys.stderr)
        return str(options.ssh_password)
    return os.environ.pop(PASSWORD_VARIABLE, "") or None  # no child of ours needs it


def ask_about_keys(unknown_hosts: Sequence[UnknownHost]) -> bool:
    """Show the fingerprints of unknown hosts and ask once whether they are right."""
    print("Unknown hosts. On each, `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` shows what should stand here:",
          file=sys.stderr)
    for unknown in unknown_hosts:
        say(f"  {unknown.route.node}  {unknown.key.kind}  {unknown.key.fingerprint}")
    return confirm("Trust them from now on?")


def host_key_prompt() -> Callable[[Sequence[UnknownHost]], bool] | None:
    """Return the way to ask about host keys: on the terminal, or None without one."""
    return ask_about_keys if sys.stdin.isatty() and sys.stderr.isatty() else None
