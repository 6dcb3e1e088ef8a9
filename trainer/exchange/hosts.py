"""The hosts of a training and the ranks of each: the groups that talk within a host, and between hosts.

DeepSpeed's engine is given the ranks of one host as all there are (`HostUnit`, its `mpu`), so that what it splits and
reduces never leaves the host. Between hosts there are lanes: lane k joins rank k of every host, and carries a share of
each bucket. There are as many lanes as the smallest host has ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Hosts:
    """This rank's place: its host's number among `count`, its host's ranks (their global numbers), its `lane`.

    `weight`: its host's share of all ranks, by which its mean gradient counts; `lane` is None for a rank of a host that
    has more ranks than the smallest one. Groups of torch: `within` the host, this rank `alone`, its lane `across` the
    hosts.
    """

    rank: int
    world_size: int
    number: int
    members: tuple[tuple[int, ...], ...]
    within: Any
    alone: Any
    across: Any

    @property
    def count(self) -> int:
        """How many hosts there are."""
        return len(self.members)

    @property
    def here(self) -> tuple[int, ...]:
        """The ranks of this host."""
        return self.members[self.number]

    @property
    def lanes(self) -> int:
        """How many ranks of each host talk to other hosts."""
        return min(map(len, self.members))

    @property
    def lane(self) -> int | None:
        """This rank's lane."""
        place = self.here.index(self.rank)
        return place if place < self.lanes else None

    @property
    def weight(self) -> float:
        """This host's share of all ranks."""
        return len(self.here) / self.world_size


def members_of(nodes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the ranks of each host, from every rank's host; hosts come in the order of their first ranks."""
    return tuple(tuple(rank for rank, node in enumerate(nodes) if node == host) for host in dict.fromkeys(nodes))


def join_hosts(nodes: Sequence[int], rank: int) -> Hosts:
    """Return the hosts with their groups, from every rank's host and this rank; every rank must call it, after the
    process group has started."""
    members = members_of(nodes)
    number = next(place for place, host in enumerate(members) if rank in host)
    # Every rank makes every group, in the same order, as torch wants it.
    within = [dist.new_group(list(host)) for host in members]
    alone = [dist.new_group([each]) for each in range(len(nodes))]
    lanes = [dist.new_group([host[lane] for host in members]) for lane in range(min(map(len, members)))]
    place = members[number].index(rank)
    return Hosts(rank, len(nodes), number, members, within[number], alone[rank],
                 lanes[place] if place < len(lanes) else None)


class HostUnit:
    """What DeepSpeed asks of its `mpu`: its data-parallel group is this host's ranks, and a model is in one piece."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts

    def get_data_parallel_group(self) -> Any:
        """Return the group of this host's ranks."""
        return self._hosts.within

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Return this host's ranks."""
        return list(self._hosts.here)

    def get_data_parallel_world_size(self) -> int:
        """Return how many ranks this host has."""
        return len(self._hosts.here)

    def get_data_parallel_rank(self) -> int:
        """Return this rank's place among them."""
        return self._hosts.here.index(self._hosts.rank)

    def get_model_parallel_group(self) -> Any:
        """Return a group of this rank alone."""
        return self._hosts.alone

    def get_model_parallel_world_size(self) -> int:
        """Return 1: no model is split."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """Return 0."""
        return 0

    get_tensor_model_parallel_group = get_model_parallel_group  # where a universal checkpoint is loaded
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
