"""The ranks of one training: who they are, how they meet, what they tell each other outside the training itself.

Every launcher (`deepspeed`, `torchrun`, lanspeed's own) tells a process its place by environment variables; a
plain `python trainer/train.py` gets those of a single rank. The ranks first meet at a TCP store, which has no
watchdog: data may be tokenized for an hour before the process group, which has one, starts on the same store.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from trainer.distributed import store
from trainer.distributed.worker_file import load_worker
from trainer.errors import UserError

if TYPE_CHECKING:
    pass

RENDEZVOUS_LIMIT_S = 600
ALL_REDUCE_LIMIT_S = 60
PREPARING_LIMIT_S = 7 * 24 * 3600
COLLECTIVE_LIMIT_S = 2 * 3600  # in which others may save a large checkpoint; a hang is noticed by the launcher before


def free_port() -> int:
    """Return a TCP port of the loopback address that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def set_environment() -> None:
    """Complete the launcher's variables; without a launcher, become rank 0 of 1.

    DeepSpeed's launcher says LOCAL_SIZE where torchrun says LOCAL_WORLD_SIZE; transformers reads the latter.
    Without RANK, DeepSpeed would look for MPI and transformers would split a batch over all local GPUs.
    """
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        os.environ.update(alone)
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))


def interface_towards(address: str) -> str | None:
    """Return the name of the network interface that traffic to `address` leaves by, or None if none is known.

    gloo and NCCL otherwise guess by the host's name, which Debian maps to the loopback address.
    """
    found: str | None = load_worker("run_node").interface_towards(address)
    return found


def rank_0_lost() -> UserError:
    """Return the UserError of a lost store: rank 0, which holds it, has said itself why it ended; others stay
    silent."""
    return UserError("rank 0 exited", shared=True)


class Ranks:
    """This process's place among all ranks, and the ways to exchange small things with them.

    `rank` 0..world_size-1 over the cluster, `local_rank` on this machine, `node` the machine's number; `hosts` and
    `nodes` have every rank's. Machines are told apart by number: two of them may have the same name.
    """

    def __init__(self) -> None:
        set_environment()
        self.rank = int(os.environ["RANK"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
        self.node = int(os.environ.get("CROSS_RANK") or os.environ.get("GROUP_RANK") or 0)  # DeepSpeed's, torchrun's
        self.host = socket.gethostname()
        self.hosts: Sequence[str] = [self.host]
        self.nodes: Sequence[int] = [self.node]
        self._is_alone = self.local_world_size == self.world_size
        self._secret = store.job_secret(self._is_alone)
        self._store: store.SignedStore
        self._side_group: Any = None

    @property
    def is_first(self) -> bool:
        """True for rank 0 of the whole training."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """True for one rank of each machine."""
        return self.local_rank == 0

    @property
    def on_one_machine(self) -> bool:
        """True if every rank is on the same machine; known once they have met."""
        return len(set(self.nodes)) == 1

    @property
    def trust_the_store(self) -> bool:
        """True if no stranger can have written what the ranks tell each other through the store."""
        return self._store.is_signed

    def rendezvous(self, limit_s: int = RENDEZVOUS_LIMIT_S) -> None:
        """Open the store at MASTER_ADDR and wait for every rank; raise a UserError that names the missing ones."""
        from torch.distributed import DistNetworkError, DistStoreError

        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        interface = interface_towards(store.LOOPBACK if self._is_alone else os.environ["MASTER_ADDR"])
        for variable, exactly in (("GLOO_SOCKET_IFNAME", ""), ("NCCL_SOCKET_IFNAME", "=")) if interface else ():
            os.environ.setdefault(variable, f"{exactly}{interface}")  # NCCL takes eth1 for eth10 too
        try:
            limit = timedelta(seconds=limit_s)
            self._store = store.SignedStore(
                store.open_store(self.rank, self.world_size, self._is_alone, limit), self._secret)
        except (DistNetworkError, DistStoreError, RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.host}: rank {self.rank} cannot reach the others at {where}: {reason}. "
                "Is the port free there and reachable from here?"
            ) from None
        self.hosts, self.nodes = zip(*self.all_gather_json("host", [self.host, self.node], limit_s), strict=True)

    def all_gather_json(self, name: str, value: Any, limit_s: int = RENDEZVOUS_LIMIT_S) -> list[Any]:
        """Return what every rank gave under `name`, in rank order (any JSON value); works without process group.

        Raises UserError, naming the ranks that gave nothing within `limit_s` seconds.
        """
        from torch.distributed import DistNetworkError, DistStoreError

        names = [f"{name}/{rank}" for rank in range(self.world_size)]
        try:
            self._store.set(names[self.rank], value)
            self._store.wait(names, timedelta(seconds=limit_s))
            return [self._store.get(one) for one in names]
        except DistStoreError:
            missing = [rank for rank, one in enumerate(names) if not self._store.has(one)]
            raise UserError(f"{self.host}: after {limit_s} s no data from rank {missing} ({name})") from None
        except DistNetworkError:
            raise rank_0_lost() from None

    def set(self, name: str, value: Any) -> None:
        """Offer `value` (any JSON value) to whichever rank asks for `name`."""
        self._store.set(name, value)

    def get(self, name: str, limit_s: int = PREPARING_LIMIT_S) -> Any:
        """Return what a rank published under `name`, waiting for it up to `limit_s` seconds."""
        from torch.distributed import DistNetworkError

        try:
            self._store.wait([name], timedelta(seconds=limit_s))
        except DistNetworkError:
            raise rank_0_lost() from None
        return self._store.get(name)

    def start_process_group(self, device_type: str) -> None:
        """Start torch's process group over the store (device_type: cuda, xpu or cpu), and a gloo group beside it.

        transformers and DeepSpeed take a group that is there as theirs. The gloo group carries flags and counts
        between CPUs, so that they never wait for a GPU.
        """
        import torch.distributed as dist

        interfaces = self.all_gather_json("card", os.environ.get("GLOO_SOCKET_IFNAME", "the default"))
        backend = {"cuda": "nccl", "xpu": "xccl"}.get(device_type, "gloo")
        try:
            dist.init_process_group(
                backend, store=dist.PrefixStore("group", self._store.plain), rank=self.rank,
                world_size=self.world_size, timeout=timedelta(seconds=COLLECTIVE_LIMIT_S))
            self._test_all_reduce(device_type)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:200]
            missing = sorted({int(rank) for rank in re.findall(r"[Rr]ank (\d+)", reason)} - {self.rank})
            who = ", ".join(f"rank {rank} on {self.hosts[rank]} (network card {interfaces[rank]})" for rank in missing
                            if rank < self.world_size) or "some ranks"
            raise UserError(f"{self.host} (network card {interfaces[self.rank]}): {who} did not join the all-reduce "
                            f"test: {reason}. Can the hosts reach each other? "
                            "GLOO_SOCKET_IFNAME names the network card") from None
        self._side_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=COLLECTIVE_LIMIT_S))

    def _test_all_reduce(self, device_type: str) -> None:
        """Add up a number over all ranks, before anything big is loaded; raise RuntimeError if not all come.

        Ranks that met at the store may still not reach each other: the store is a connection to rank 0 alone.
        """
        import torch
        import torch.distributed as dist

        limit = timedelta(seconds=ALL_REDUCE_LIMIT_S)
        group = dist.new_group(backend="gloo", timeout=limit)
        dist.monitored_barrier(group, timeout=limit, wait_all_ranks=True)
        value = torch.ones(1, device=device_type)
        work = dist.all_reduce(value, async_op=True)
        if not work.wait(limit) or int(value) != self.world_size:
            raise RuntimeError(f"the sum over all ranks is {int(value)}")
        dist.destroy_process_group(group)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Return each value summed over all ranks; every rank must call it with as many."""
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._side_group)
        return tensor.tolist()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_reduce_sum(0)
