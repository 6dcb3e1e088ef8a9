"""What --lan_compress does before the first step: find the hosts, and set up what crosses between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.distributed.ranks import Ranks
from trainer.exchange.crossing import Crossing
from trainer.exchange.gradient_exchange import GradientExchange
from trainer.exchange.hosts import Hosts, join_hosts, members_of
from trainer.exchange.weight_average import WeightAverage
from trainer.options import Options

FEWEST = 3  # bits, which were measured to learn far more slowly
MOST_HOSTS, LONGEST = 2, 10  # with which averages were measured to be harmless


def engine_ranks(options: Options, ranks: Ranks) -> int:
    """Return how many ranks share an engine: of the smallest host, or all; known once they have met."""
    if not options.lan_compress:
        return ranks.world_size
    return min(map(len, members_of(ranks.nodes)))


def hosts_of(options: Options, ranks: Ranks, warn: Callable[[str], None]) -> Hosts | None:
    """Return the hosts between which gradients or weights cross in few bits, None without; every rank calls it."""
    if not options.lan_compress:
        return None
    if ranks.on_one_machine:
        warn("--lan_compress: all ranks are on one machine: nothing crosses a network")
        return None
    hosts = join_hosts(ranks.nodes, ranks.rank)
    if options.lan_compress == FEWEST:
        warn(f"--lan_compress {FEWEST}: measured after 100 steps, a model knew a quarter of what it was to learn, "
             "where with 4 bits it knew nine tenths (docs/lan_exchange.md)")
    if options.lan_average and hosts.count > MOST_HOSTS:
        warn(f"--lan_average {options.lan_average} with {hosts.count} hosts: measured with 4, the loss was 2.6 % "
             "higher even at a learning rate of its own; --lan_compress alone costs a tenth of that")
    if options.lan_average and options.lan_average > LONGEST:
        warn(f"--lan_average {options.lan_average}: with more than {LONGEST} steps between averages hosts drift "
             "apart: half of what the second host gains was lost at 50")
    return hosts


def crossing_of(engine: Any, hosts: Hosts, options: Options) -> Crossing:
    """Return what crosses between hosts at an engine's steps from now on."""
    assert options.lan_compress
    if options.lan_average:
        return WeightAverage(engine, hosts, options.lan_compress, options.lan_average)
    return GradientExchange(engine, hosts, options.lan_compress, options.max_grad_norm)
