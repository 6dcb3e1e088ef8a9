"""Work on many hosts side by side: reach each, verify its key, log in, do the work. A host's failure is its own.

Hosts whose keys are unknown wait for one question about all of them; the others don't wait for it.
"""

from __future__ import annotations

import queue
import random
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from master.ssh.known_hosts import UNKNOWN, HostKey, add_entry, entries_for
from master.ssh.node_names import Node
from master.ssh.route import NeedsOpenSsh, Route, SshError, SshOptions, resolve
from master.ssh.session import LocalSession, OpenSshSession, Session

if TYPE_CHECKING:
    import paramiko

T = TypeVar("T")
AT_ONCE = 64
FILES_A_HOST = 8  # open files: a socket, pipes of its channel, and those of ssh -W
MANY = 16  # hosts from which on their servers may be too busy to answer in time: each is tried once more
TRANSIENT = ("TCP", "handshake", "jump host")


@dataclass(frozen=True)
class UnknownHost:
    """A host that answered with a key that nobody knows yet."""

    route: Route
    key: HostKey


@dataclass
class Waiting:
    """A connection that waits for the answer to the question about its host's key."""

    unknown: UnknownHost
    transport: paramiko.Transport


HostKeyPrompt = Callable[[Sequence[UnknownHost]], bool]


def run_on_all(
    nodes: Sequence[Node], ssh: SshOptions, work: Callable[[Session], T], ask: HostKeyPrompt | None = None,
    done: Callable[[Node, T | SshError], None] = lambda node, result: None, at_once: int = AT_ONCE,
) -> dict[Node, T | SshError]:
    """Do `work` with a session on every node; return its results, or why there is none, in the nodes' order.

    `ask` decides on unknown host keys, all at once (None refuses them), as soon as every node was reached or not;
    `done` is called with each result as it arrives, from the thread that made it. Work that waits for that of other
    nodes
    needs all of them `at_once`.
    """
    if len(nodes) * FILES_A_HOST > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(len(nodes) * FILES_A_HOST + 256, most), most))
    results: dict[Node, T | SshError] = {}
    reached: queue.SimpleQueue[tuple[Node, Waiting | None]] = queue.SimpleQueue()

    def finish(node: Node, task: Callable[[], Session | Waiting]) -> T | SshError | Waiting:
        session = None
        try:
            try:
                session = task()
            finally:
                reached.put((node, session if isinstance(session, Waiting) else None))
            if isinstance(session, Waiting):
                return session
            try:
                result: T | SshError = work(session)
            finally:
                session.close()
        except SshError as error:
            result = error
        except Exception as error:  # what a hostile server can make a library raise must not cost the other hosts
            result = SshError(str(node), "internal", f"{type(error).__name__}: {error}")
        done(node, result)
        return result

    reach = patiently if len(nodes) > MANY else connect
    with ThreadPoolExecutor(min(at_once, max(1, len(nodes)))) as pool:
        tasks: dict[Node, Future[T | SshError | Waiting]] = {
            node: pool.submit(finish, node, partial(reach, node, ssh, ask is not None)) for node in nodes}
        answers = dict(reached.get() for _ in nodes)
        waiting = {node: one for node in nodes if (one := answers[node])}
        trusted = bool(waiting) and ask is not None and ask([one.unknown for one in waiting.values()])
        tasks |= {node: pool.submit(finish, node, partial(resume_connection, one, ssh.for_node(node), trusted))
                  for node, one in waiting.items()}
        for node, future in tasks.items():
            result = future.result()
            assert not isinstance(result, Waiting)
            results[node] = result
    return {node: results[node] for node in nodes}


def connect(node: Node, ssh: SshOptions, may_ask: bool) -> Session | Waiting:
    """Reach a node; return a session, or a connection that waits for word on its host key."""
    ssh = ssh.for_node(node)
    if node.is_local:
        return LocalSession(node, ssh)
    from master.ssh.paramiko_session import handshake

    route = resolve(node, ssh)
    entries = entries_for(route.host_key_name, route.known_hosts)
    if route.needs_openssh or any(entry.marker == "@cert-authority" for entry in entries):
        return OpenSshSession(route, ssh)
    try:
        transport, key, verdict = handshake(route, ssh, entries)
    except NeedsOpenSsh:
        return OpenSshSession(route, ssh)
    if verdict == UNKNOWN:
        if route.host_keys == "ask" and may_ask:
            return Waiting(UnknownHost(route, key), transport)
        if route.host_keys != "accept-new":
            transport.close()
            raise unknown_key(route, key)
        add_entry(route, key)
    return authenticate(transport, route, key, ssh)


def patiently(node: Node, ssh: SshOptions, may_ask: bool) -> Session | Waiting:
    """Reach a node as `connect` does, with a second try."""
    try:
        return connect(node, ssh, may_ask)
    except SshError as error:
        if error.stage not in TRANSIENT:
            raise
    time.sleep(random.uniform(0.2, 1.0))  # noqa: S311, spreads the retries
    return connect(node, ssh, may_ask)


def resume_connection(waiting: Waiting, ssh: SshOptions, trusted: bool) -> Session:
    """Continue with a host after the question; if it didn't wait so long, connect to it anew."""
    from master.ssh.paramiko_session import handshake

    route, key, transport = waiting.unknown.route, waiting.unknown.key, waiting.transport
    if not trusted:
        transport.close()
        raise unknown_key(route, key)
    add_entry(route, key)
    if not transport.is_active():
        entries = entries_for(route.host_key_name, route.known_hosts)
        transport, key, verdict = handshake(route, ssh, entries)
        if verdict == UNKNOWN:
            transport.close()
            raise unknown_key(route, key)
    return authenticate(transport, route, key, ssh)


def unknown_key(route: Route, key: HostKey) -> SshError:
    """Return the error for a host key that nobody vouched for."""
    return SshError(str(route.node), "host key", f"unknown: {key.kind} {key.fingerprint}",
                    "compare it with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on the host, then "
                    "--host-keys accept-new")


def authenticate(transport: paramiko.Transport, route: Route, key: HostKey, ssh: SshOptions) -> Session:
    """Return an authenticated session, by OpenSSH's client where paramiko finds no key that fits."""
    from master.ssh.authentication import log_in
    from master.ssh.paramiko_session import ParamikoSession

    try:
        log_in(transport, route, ssh)
        return ParamikoSession(route.node, transport, key, ssh)
    except SshError as refusal:
        transport.close()
        if ssh.only == "password":  # which OpenSSH's client would ask for on a terminal
            raise
        try:
            return OpenSshSession(route, ssh)
        except SshError:
            raise refusal from None
    except BaseException:
        transport.close()
        raise
