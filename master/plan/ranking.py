"""Which way is best, whether that is certain, what comes next, and which one change would help most."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from master.plan.layer_split import SplitPlan, best_split, is_held
from master.plan.machines import Machine, Network
from master.plan.rates import PEAK, Rate
from master.plan.ways import FULL, LORA, QLORA, Estimate, Task, all_estimates, order
from trainer.estimate.speed import CASES
from trainer.estimate.traffic import goodput

HELPS = 1.1  # times as fast as before: less isn't worth a word
MORE = 8  # times the global batch that is tried
OTHER_CARD = 1.25  # by so much another card may reach another share of its peak, assumed
BITS = 4  # of a gradient, unless another number is asked for


@dataclass(frozen=True)
class Change:
    """One change, in words, and the way that would be best with it."""

    words: str
    best: Estimate


@dataclass(frozen=True)
class Ranking:
    """All estimates in order, the best way of the kind that is wanted (None: nothing fits), those that may be as fast
    on other machines, the next best choice of them, the change that would help most, and the best full training
    with a larger global batch on each choice of several machines; `compressed`: the best way with gradients in few
    bits between hosts, where that helps; `split`: the layers over several hosts, where no rank holds all.
    """

    estimates: list[Estimate]
    best: Estimate | None
    rivals: list[Estimate]
    following: Estimate | None
    change: Change | None
    larger: dict[tuple[Machine, ...], Estimate]
    compressed: Estimate | None = None
    split: SplitPlan | None = None


def beats(one: Estimate, other: Estimate) -> bool:
    """Return whether one way is faster than another in every case of what isn't known.

    Network and host are the same for both, and so is the share of their peaks that cards reach, but for `OTHER_CARD`.
    What was measured of two cards may differ in each.
    """
    if not (one.known and other.known):
        return False
    same, guessed = one.device_name == other.device_name, PEAK in (one.source, other.source)
    computing = [(case, case) for case in CASES] if same or guessed else list(itertools.product(CASES, CASES))
    margin = OTHER_CARD if guessed and not same else 1.0
    return all(one.rate(mine, rest) > margin * other.rate(its, rest) for mine, its in computing for rest in CASES)


def best_of(estimates: Sequence[Estimate], kind: str) -> dict[tuple[Machine, ...], Estimate]:
    """Return the best way of a kind that fits, by the machines; they come in order of speed."""
    found: dict[tuple[Machine, ...], Estimate] = {}
    for each in estimates:
        if each.fits and each.way.kind == kind:
            found.setdefault(each.way.machines, each)
    return found


def wanted_kind(estimates: Sequence[Estimate], task: Task) -> str | None:
    """Return the kind to recommend: full training where that fits at all, else an adapter, else one in 4 bits."""
    return next((kind for kind in (FULL, LORA, QLORA) if kind in task.kinds and best_of(estimates, kind)), None)


def rank(task: Task, choices: Sequence[tuple[Machine, ...]], network: Network, rates: Mapping[str, Rate]) -> Ranking:
    """Return what is best for a task on these choices of machines."""
    estimates = all_estimates(task, choices, network, rates)
    kind = wanted_kind(estimates, task)
    split = None if is_held(estimates) else best_split(task, choices, network, rates)
    if kind is None:
        return Ranking(estimates, None, [], None, None, {}, split=split)
    places = list(best_of(estimates, kind).values())
    best = places[0]
    rivals = [other for other in places[1:] if not beats(best, other)]
    following = places[1] if len(places) > 1 else None
    several = [machines for machines in choices if len(machines) > 1]
    more = all_estimates(replace(task, kinds=(FULL,), global_batch=MORE * task.global_batch), several, network, rates) \
        if FULL in task.kinds else []
    return Ranking(estimates, best, rivals, following, helpful_change(task, choices, network, rates, best),
                   best_of(more, FULL), compressed(task, several, network, rates, best),
                   split if split and helps(split, best) else None)


def helps(split: SplitPlan, best: Estimate) -> bool:
    """Return whether a split is worth a word beside the best way: it keeps what 4 bits lose, or is faster."""
    return best.way.kind == QLORA or not (split.timing and best.known) or split.rates[1] > best.rate()


def compressed(task: Task, several: Sequence[tuple[Machine, ...]], network: Network, rates: Mapping[str, Rate],
               best: Estimate) -> Estimate | None:
    """Return the best way of the best's kind with gradients in few bits between hosts; None where it helps little."""
    if not best.known or task.bits or not several:
        return None
    fitting = [each for each in all_estimates(replace(task, kinds=(best.way.kind,), bits=BITS), several, network, rates)
               if each.fits]
    return fitting[0] if fitting and fitting[0].rate() > HELPS * best.rate() else None


def helpful_change(task: Task, choices: Sequence[tuple[Machine, ...]], network: Network, rates: Mapping[str, Rate],
                   best: Estimate) -> Change | None:
    """Return the one change that makes training fastest, None if none helps."""
    if not best.known:
        return None
    only = replace(task, kinds=(best.way.kind,))
    tried: list[tuple[str, Task, Network]] = []
    if max(map(len, choices)) > 1:
        for label, bits in (("a 2.5 GbE switch and cards", 2.5e9), ("a 10 GbE switch and cards", 1e10)):
            wider = goodput(bits)
            if network.between(max(choices, key=len))[0] < 0.9 * wider:
                tried.append((label, only, Network({}, network.latencies, wider)))
        tried.append((f"a global batch {MORE} times as large, by accumulation",
                      replace(only, global_batch=MORE * task.global_batch), network))
    if best.way.kind == FULL and LORA in task.kinds:
        tried.append((f"an adapter (--lora {task.rank}) instead of all weights", replace(task, kinds=(LORA,)), network))
    found = []
    for words, other, net in tried:
        fitting = [each for each in all_estimates(other, choices, net, rates) if each.fits]
        if fitting and fitting[0].rate() > HELPS * best.rate() and beats(fitting[0], best):
            found.append(Change(words, min(fitting, key=order)))
    return max(found, key=lambda change: change.best.rate(), default=None)
