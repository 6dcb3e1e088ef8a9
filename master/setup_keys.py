"""Log in to every host once with a password, so that keys do from then on: made, installed, proved, and undone.

    invoke setup-keys --nodes gpu1,gpu2
    python master/setup_keys.py --nodes admin@gpu1 gpu[2-4] --key-type rsa
    python master/setup_keys.py --nodes gpu1,gpu2 --remove

Safe to repeat: a key that is there is left alone. Host keys are shown and noted, passwords asked for and never kept.
Afterwards a Host block in ~/.ssh/config.d/lanspeed lets plain ssh, rsync and deepspeed reach the hosts the same way.
"""

from __future__ import annotations

import argparse
import getpass
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: what stands beside it must hide no installed package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from master.core.run_cli import run_cli
from master.core.terminal import HostTable, confirm, listed, print_lines, say
from master.core.tool_parser import ToolParser
from master.keys import host_blocks
from master.keys.authorized_keys import install_key, key_is_there, remove_key
from master.keys.key_pair import KeyPair, add_to_agent, find_pair, has_passphrase, make_pair
from master.ssh.node_names import Node, read_nodes
from master.ssh.options import OWN_KEY, PASSWORD_VARIABLE, add_ssh_flags, host_key_prompt, ssh_options
from master.ssh.route import SshError, SshOptions
from master.ssh.run_on_all import run_on_all
from master.ssh.session import Session


@dataclass
class HostResult:
    """What came of one host, over which way: installed, was there, removed, would install ...; or the fault."""

    node: Node
    done: str = ""
    way: str = ""
    fingerprint: str = ""
    reason: str = ""


def build_parser() -> ToolParser:
    """Return the parser of this tool's flags."""
    parser = ToolParser("setup_keys.py", __doc__, leading=("--nodes",))
    flag = parser.add_argument
    flag("--nodes", action="extend", nargs="+", metavar="N", required=True,
         help="hosts: names, user@host:port, ranges gpu[1-4], @file")
    flag("--key-type", choices=["ed25519", "rsa"], default="ed25519", help="of a new key (ed25519; rsa has 4096 bits)")
    flag("--passphrase", action="store_true", help="ask for a passphrase for a new key, and load it into the agent")
    flag("--no-config", action="store_true", help="don't touch ~/.ssh/config")
    flag("--yes", action="store_true", help="write ~/.ssh/config without asking")
    flag("--remove", action="store_true", help="remove the key from the hosts and the Host blocks from ~/.ssh/config")
    flag("--dry-run", action="store_true", help="only print what would be done, by the keys that already work")
    parser.add_argument("--password-per-host", action="store_true",
                        help="ask for the password of each host that accepts no key, instead of one for all")
    add_ssh_flags(parser)
    return parser


def get_pair(options: argparse.Namespace, path: Path) -> KeyPair | None:
    """Return the key pair to install, made if need be; None for a dry run without one. Raises KeyPairError."""
    pair = find_pair(path)
    if pair is None and (options.dry_run or options.remove):
        say(f"{path}: no key there" + ("; one would be made" if options.dry_run else ""))
        return None
    if pair is None:
        pair = make_pair(path, options.key_type, options.passphrase)
        say(f"made {path} ({options.key_type})")
    if has_passphrase(path) and not options.remove and not options.dry_run:
        warning = add_to_agent(path)
        if warning:
            say(f"warning: {warning}")
    return pair


def visit(session: Session, pair: KeyPair | None, options: argparse.Namespace) -> HostResult:
    """Do one host's part of the work."""
    if pair is None:
        done = "would install"
    elif options.dry_run:
        there = key_is_there(session, pair)
        done = ("would remove" if options.remove else "was there") if there else \
            ("was not there" if options.remove else "would install")
    else:
        done = remove_key(session, pair) if options.remove else install_key(session, pair)
    return HostResult(session.node, done, session.way, session.fingerprint or "")


def visit_once(
    nodes: Sequence[Node], ssh: SshOptions, pair: KeyPair | None, options: argparse.Namespace, may_ask: bool
) -> dict[Node, HostResult | SshError]:
    """Visit hosts side by side, and show each as it answers; `may_ask`: a password is asked for where no key fits."""
    with HostTable([str(node) for node in nodes]) as answers:

        def tell(node: Node, result: HostResult | SshError) -> None:
            if isinstance(result, SshError) and result.stage == "authentication" and may_ask and not ssh.only:
                answers.tell(str(node), "no key", "takes none of the keys here: its password will be asked for")
            elif isinstance(result, SshError) and result.stage == "authentication" and ssh.only == "password":
                answers.tell(str(node), "failed", "the password was refused", failed=True)
            elif isinstance(result, SshError):
                answers.tell(str(node), "failed", str(result).removeprefix(f"{node}: "), failed=True)
            else:
                answers.tell(str(node), result.way, result.done)

        return run_on_all(nodes, ssh, lambda session: visit(session, pair, options),
                          answers.paused(host_key_prompt()), tell)


def visit_all(
    nodes: Sequence[Node], ssh: SshOptions, pair: KeyPair | None, options: argparse.Namespace
) -> list[HostResult]:
    """Visit all hosts with the keys that work; ask for a password for those that refuse, until it's given for each.

    One password is asked for all of them, and one more for those that it doesn't fit, and so on; each is tried once a
    host. An empty answer gives up the rest.
    """
    results: dict[Node, HostResult] = {}
    left = list(nodes)
    may_ask = sys.stdin.isatty() and not options.dry_run and not options.ssh_password_file
    while left:
        found = visit_once(left, ssh, pair, options, may_ask)
        results |= {node: as_result(node, result) for node, result in found.items()}
        refused = [node for node, result in found.items()
                   if isinstance(result, SshError) and result.stage == "authentication"]
        left = refused if may_ask else []
        if left:
            say(f"the password was refused by {listed(list(map(str, left)))}" if ssh.only == "password" else
                f"no key was accepted by {listed(list(map(str, left)))}")
            if options.password_per_host:
                for node in left:
                    if password := getpass.getpass(f"password of {node} (empty: leave it out): "):
                        own = replace(ssh, password=password, only="password")
                        results[node] = as_result(node, visit_once([node], own, pair, options, may_ask=False)[node])
                break
            if len(left) > 1:
                say("one password goes to all of them, and to whoever has taken one over: --password-per-host asks for "
                    "each")
            again = "again, " if ssh.only == "password" else ""
            password = getpass.getpass(f"their password ({again}empty: leave them out): ")
            if not password:
                break
            ssh = replace(ssh, password=password, only="password")
    return [results[node] for node in nodes]


def as_result(node: Node, result: HostResult | SshError) -> HostResult:
    """Return what came of a visit, a failed one as a result with its reason."""
    if isinstance(result, HostResult):
        return result
    if result.stage == "authentication":
        return HostResult(node, reason=f"{result.reason}: run this on a terminal, which asks for the password, or give "
                                       f"--ssh-password-file F or {PASSWORD_VARIABLE}")
    return HostResult(node, reason=str(result).removeprefix(f"{node}: "))


def prove(results: Sequence[HostResult], ssh: SshOptions, pair: KeyPair) -> None:
    """Log in again where the key is now, with it alone; note a host that still refuses as failed."""
    nodes = [result.node for result in results if not result.reason and not result.node.is_local]
    alone = replace(ssh, key=pair.path, only="key", password=None, more_keys=())
    if has_passphrase(pair.path):
        alone = replace(alone, only=None)  # the agent has it
    found = run_on_all(nodes, alone, lambda session: session.run("exit 0").code)
    for result in results:
        refusal = found.get(result.node)
        if isinstance(refusal, SshError):
            result.reason = (f"the key is installed and still refused ({refusal.reason}): on the host, look at the "
                             "modes of ~ and ~/.ssh, and at PubkeyAuthentication and AuthorizedKeysFile in sshd_config")


def update_config(results: Sequence[HostResult], options: argparse.Namespace, key: Path) -> None:
    """Add the Host blocks of the hosts that work, or take them out; shown and asked about first."""
    config = options.ssh_config or Path.home() / ".ssh" / "config"
    good = [result.node for result in results if not result.reason and not result.node.is_local]
    names = host_blocks.aliases_of([result.node for result in results])
    if options.remove:
        changes = host_blocks.plan(config, [], [names[node] for node in good])
    else:
        changes = host_blocks.plan(config, [
            host_blocks.block_of(node, options.ssh_user, options.ssh_port, key, names[node]) for node in good])
    if not changes:
        return
    for path, text in changes.items():
        first = f", first line: {text.splitlines()[0]}" if text and path == config else ""
        say(f"{'would write' if options.dry_run else 'to write'}: {path}{' (delete)' if text is None else first}")
        if text and path != config:
            say(*text.splitlines())
    if options.dry_run:
        return
    if not options.yes:
        if not sys.stdin.isatty():
            say("not written, no terminal to ask on: --yes writes it, --no-config never does")
            return
        question = "Delete these lines and files?" if options.remove else \
            "Write this, so that plain ssh and deepspeed reach the hosts too?"
        if not confirm(question):
            return
    host_blocks.apply(changes)


def show(results: Sequence[HostResult]) -> None:
    """Print the table."""
    wide = max(len(str(result.node)) for result in results)
    for result in results:
        what = f"FAILED: {result.reason}" if result.reason else result.done
        print_lines(f"{result.node!s:{wide}}  {result.way or '-':8}  {result.fingerprint or '-':50}  {what}")


def main(argv: Sequence[str] | None = None) -> int:
    """Set up keys on all hosts; return 0, 1 if a host still refuses, 2 for wrong usage."""
    options = build_parser().parse_args(argv)
    return run_cli(lambda: set_up(options), "stopped; what was installed stays; run it again to continue")


def set_up(options: argparse.Namespace) -> int:
    """Set up keys, or remove them; return the exit code."""
    path = (options.ssh_key or OWN_KEY).expanduser()
    if options.ssh_key and not path.exists() and not options.remove:
        options.ssh_key = None  # it is made below, under this name
    nodes = read_nodes(options.nodes)
    ssh = ssh_options(options)
    pair = get_pair(options, path)
    if pair is None and options.remove:
        return 1
    # The key is offered after those that ssh would offer without it: named to ssh, it would be the only one.
    results = visit_all(nodes, replace(ssh, key=None, more_keys=(path,)), pair, options)
    if pair and not options.remove and not options.dry_run:
        prove(results, ssh, pair)
    if not options.no_config:
        update_config(results, options, path)
    show(results)
    if options.remove and not options.dry_run:
        say(f"kept here: {path}, and the hosts' keys in known_hosts")
    elif not options.dry_run and (good := [str(result.node) for result in results if not result.reason]):
        say(f"next: invoke hostfile --nodes {','.join(good)}")
    return 1 if any(result.reason for result in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
