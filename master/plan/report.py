"""A plan for a person: the table of ways, what the second host brings, the best way in three sentences, and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from master.core.terminal import listed
from master.plan import layer_split
from master.plan.machines import Machine
from master.plan.ranking import Ranking, best_of
from master.plan.ways import FULL, LORA, QLORA, Estimate, Task, Way
from trainer.estimate.figures import SHORT_S, count, figure, minutes, seconds
from trainer.estimate.memory import USABLE, gigabytes
from trainer.estimate.speed import Range

MILLION = 1e6
WORTH_SAYING = 0.02  # of a correction
ROWS = 12  # of the table, without --all
KINDS = {FULL: "full", LORA: "LoRA", QLORA: "QLoRA"}
OFFLOADS = {"": "", "optimizer": ", optimizer offloaded", "all": ", all offloaded", "nvme": ", all on NVMe"}
RECOMPUTED = ", activations recomputed"
HEADER = ("machines", "way", "micro x accum.", "device GB", "host GB", "sent GB",
          "step: compute + network + offload", "tokens/s", "1M tokens")


def lines(task: Task, ranking: Ranking, model: str, everything: bool) -> list[str]:
    """Return what a person reads."""
    shape = task.shape
    machines = max((each.way.machines for each in ranking.estimates), key=len)
    found = [f"{model}: {count(shape.parameters)} parameters, {shape.layers} layers of {shape.hidden:,}; sequences of "
             f"{task.sequence:,} tokens, global batch {task.global_batch:,} ({task.global_batch * task.sequence:,} "
             "tokens)", "", *table(ranking, everything), ""]
    if len(machines) > 1:
        found += ["will another machine help?", *(f"  {line}" for line in comparison(task, ranking)), ""]
    return found + sentences(task, ranking) + split_lines(task, ranking)


def split_lines(task: Task, ranking: Ranking) -> list[str]:
    """Return what is said of layers split over the hosts, beside 4 bits on one device; nothing where one holds all."""
    if not ranking.split:
        return []
    alone = next((each for each in ranking.estimates if each.fits and each.way.kind == QLORA
                  and len(each.way.machines) == 1), None)
    words = f"{words_of(alone)} on {names(alone.way.machines)}, {rate_words(alone)} tokens/s" if alone else ""
    return ["", *layer_split.lines(task, ranking.split, words)]


def table(ranking: Ranking, everything: bool) -> list[str]:
    """Return the ways in columns: those that fit by the time of a million tokens, then the nearest of what doesn't."""
    shown = ranking.estimates if everything else chosen_rows(ranking)
    rows = [HEADER, *(row(each) for each in shown)]
    widths = [max(len(cells[number]) for cells in rows) for number in range(len(HEADER))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows]


def chosen_rows(ranking: Ranking) -> list[Estimate]:
    """Return the best way of each kind on each choice of machines, and of what fits nowhere the nearest of a kind."""
    fitting = sorted((each for kind in KINDS for each in best_of(ranking.estimates, kind).values()),
                     key=ranking.estimates.index)[:ROWS]
    missing = [kind for kind in KINDS if not any(each.way.kind == kind for each in fitting)]
    nearest = [next((each for each in ranking.estimates if each.way.kind == kind), None) for kind in missing]
    return [*fitting, *(each for each in nearest if each)]


def row(found: Estimate) -> tuple[str, ...]:
    """Return one line's cells."""
    way, slow = found.way, f"{seconds(found.compute.likely)}" if found.compute else "?"
    host = gigabytes(sum(found.host.values())) if found.host else "-"
    start = (names(way.machines), words_of(found), f"{way.batch.micro} x {way.batch.accumulation}",
             gigabytes(sum(found.device.values())), host, gigabytes(found.sent) if found.sent else "-")
    if not found.fits:
        return (*start, "", f"too large by {gigabytes(found.short)} GB", "")
    parts = f"{slow} + {seconds(found.communication.likely)} + {seconds(found.offload.likely)}"
    return (*start, parts, rate_words(found), minutes(MILLION / found.rate()) if found.known else "?")


def words_of(found: Estimate) -> str:
    """Return a way in words: 'full, ZeRO-1, activations recomputed'."""
    way = found.way
    anew = RECOMPUTED if way.batch.checkpoints else ""
    return f"{KINDS[way.kind]}, ZeRO-{way.stage}{OFFLOADS[way.offload]}{anew}{bits_of(way)}"


def bits_of(way: Way) -> str:
    """Return what is said of gradients that cross between hosts in few bits."""
    return f", {way.bits} bits between hosts" if way.bits else ""


def names(machines: Sequence[Machine]) -> str:
    """Return machines in a few words: 'gpu1 alone', 'gpu1 + gpu2', '8 machines'."""
    if len(machines) == 1:
        return f"{machines[0].name} alone"
    return " + ".join(machine.name for machine in machines) if len(machines) <= 3 else f"{len(machines)} machines"


def rate_words(found: Estimate) -> str:
    """Return tokens a second with their range: '5,800 (4,100 to 7,000)'."""
    if not found.known:
        return "unknown"
    return f"{figure(found.rate())} ({figure(found.rate('high', 'high'))} to {figure(found.rate('low', 'low'))})"


def comparison(task: Task, ranking: Ranking) -> list[str]:
    """Return a line for each choice of machines: its best full training, adapter and more accumulation."""
    places: dict[tuple[Machine, ...], list[Estimate]] = {}
    for kind in KINDS:
        for machines, each in best_of(ranking.estimates, kind).items():
            places.setdefault(machines, []).append(each)
        if kind == FULL:
            for machines, each in ranking.larger.items():
                places.setdefault(machines, []).append(each)
    found = []
    for machines in sorted(places, key=lambda each: (len(each), -max(one.rate() for one in places[each])))[:ROWS]:
        ways = places[machines]
        speeds = ", ".join(f"{figure(each.rate())} tokens/s ({short_words(each)})" if each.known else
                           f"{each.communication.likely:.1f} s of network a step ({short_words(each)})"
                           for each in ways if each.way.kind != QLORA or len(ways) == 1)
        link = next((each.link for each in ways if each.link), None)
        over = f" over {link_words(link)}" if link else ""
        found.append(f"{names(machines)}{over}: {speeds}")
    return found


def short_words(found: Estimate) -> str:
    """Return a way in brackets."""
    return f"{words_of(found)}, accumulation {found.way.batch.accumulation}"


def link_words(link: tuple[float, bool, str]) -> str:
    """Return a link: 'a link of 117 MB/s (measured)'."""
    return f"a link of {link[0] / 1e6:,.0f} MB/s ({'measured' if link[1] else 'not measured'})"


def sentences(task: Task, ranking: Ranking) -> list[str]:
    """Return the best way in three sentences, the next best and the change that helps most in one each."""
    best = ranking.best
    if best is None:
        nearest = ranking.estimates[0]
        return [f"nothing fits: the nearest is {words_of(nearest)} on {names(nearest.way.machines)}, which is too "
                f"large by {gigabytes(nearest.short)} GB. A smaller model, shorter sequences (--sequence-length), more "
                "memory or more machines would make it fit."]
    found = [choice_sentence(ranking, best), memory_sentence(best), time_sentence(best)]
    if following := ranking.following:
        found.append(f"next best: {words_of(following)} on {names(following.way.machines)}, {rate_words(following)} "
                     "tokens/s.")
    if change := ranking.change:
        found.append(f"what would help most: {change.words}: {rate_words(change.best)} tokens/s, "
                     f"{change.best.rate() / best.rate():.1f} times as many ({words_of(change.best)} on "
                     f"{names(change.best.way.machines)}).")
    if compressed := ranking.compressed:
        found.append(f"with what is there: --lan_compress sends gradients in {compressed.way.bits} bits between hosts: "
                     f"{rate_words(compressed)} tokens/s, {compressed.rate() / best.rate():.1f} times as many "
                     f"({words_of(compressed)} on {names(compressed.way.machines)}); it costs a little of what is "
                     "learnt: docs/lan_exchange.md.")
    return found


def choice_sentence(ranking: Ranking, best: Estimate) -> str:
    """Return what to do and how fast that is, or between which choices only a measurement decides."""
    if ranking.rivals:
        mine, its = (f" ({rate_words(each)} tokens/s)" if each.known else "" for each in (best, ranking.rivals[0]))
        others = listed([names(each.way.machines) for each in ranking.rivals])
        return (f"can't tell without --measure which is fastest: {names(best.way.machines)}{mine} or {others}{its}; "
                "--write takes the first.")
    card = f"of {best.device_name} nothing is known" if best.device_name else '--gpus "2xRTX 3090:24GiB" names a card'
    speed = f"{rate_words(best)} tokens/s, a million tokens in {minutes(MILLION / best.rate())}" if best.known else \
        f"how fast isn't known ({card}, --measure tells)"
    way = best.way
    return (f"best: {KINDS[way.kind]} training on {names(way.machines)} with ZeRO-{way.stage}{OFFLOADS[way.offload]}"
            f"{RECOMPUTED if way.batch.checkpoints else ''}{bits_of(way)}, micro batch {way.batch.micro}, accumulation "
            f"{way.batch.accumulation}: {speed}.")


def memory_sentence(best: Estimate) -> str:
    """Return what a device and a host hold, and why the micro batch is no larger."""
    machines, way = best.way.machines, best.way
    room = USABLE * min(machine.memory for machine in machines)
    has = f"GB of {gigabytes(room)} usable GB" if math.isfinite(room) else "GB"
    smallest = " of the smallest card" if len({machine.memory for machine in machines}) > 1 else ""
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in best.device.items())
    host = f"; a host {gigabytes(sum(best.host.values()))} GB" if best.host else ""
    why = f" ({way.batch.reason})" if way.batch.reason else ""
    return f"It needs {gigabytes(sum(best.device.values()))} {has}{smallest}: {parts}{host}{why}."


def time_sentence(best: Estimate) -> str:
    """Return where a step's time goes, and which card and link decide."""
    source = {"peak": "by its peak, --measure is nearer", "measured": "measured", "earlier run": "as in earlier runs",
              "unknown": ""}[best.source]
    if abs(best.correction - 1) >= WORTH_SAYING:
        source += f"; {best.correction:.2f} times as fast by runs that were planned so"
    card = best.device_name or "a GPU of unknown name"
    slowest = f"the slowest card, {card}" if len({name for machine in best.way.machines
                                                   for name in machine.devices}) > 1 else card
    parts = [f"{seconds(best.compute.likely)} of computing on {slowest} ({source})"] if best.compute else []
    if best.link:
        rate, measured, name = best.link
        parts.append(f"{seconds(best.communication.likely)} for {gigabytes(best.sent)} GB over {name}'s link of "
                     f"{rate / 1e6:,.0f} MB/s, the slowest ({'measured' if measured else 'not measured'})")
    elif best.communication.likely >= SHORT_S:
        parts.append(f"{seconds(best.communication.likely)} between its GPUs")
    if best.offload.likely >= SHORT_S:
        parts.append(f"{seconds(best.offload.likely)} for what is offloaded")
    took = f"A step takes {seconds(best.seconds())}: " if best.known else f"Beside computing on {slowest} a step takes "
    return took + (", ".join(parts) or "nothing") + "."


def as_json(task: Task, ranking: Ranking, model: str, command: str | None) -> dict[str, Any]:
    """Return the plan as data: bytes, seconds, tokens a second."""
    return {"model": model, "parameters": task.shape.parameters, "sequence_length": task.sequence,
            "global_batch": task.global_batch, "best": described(ranking.best) if ranking.best else None,
            "certain": ranking.best is not None and ranking.best.known and not ranking.rivals,
            "compressed": described(ranking.compressed) if ranking.compressed else None,
            "split": layer_split.described(ranking.split) if ranking.split else None,
            "change": {"words": ranking.change.words, **described(ranking.change.best)} if ranking.change else None,
            "sentences": sentences(task, ranking), "command": command,
            "ways": [described(each) for each in ranking.estimates]}


def described(found: Estimate) -> dict[str, Any]:
    """Return one way as data."""
    way = found.way
    spread: Mapping[str, Range | None] = {"compute_s": found.compute, "communication_s": found.communication,
                                          "offload_s": found.offload}
    return {"machines": [machine.name for machine in way.machines], "kind": way.kind, "zero_stage": way.stage,
            "offload": way.offload or None, "micro_batch": way.batch.micro, "accumulation": way.batch.accumulation,
            "lan_compress": way.bits or None,
            "activation_checkpointing": way.batch.checkpoints, "fits": found.fits, "short_bytes": round(found.short),
            "device_bytes": {name: round(size) for name, size in found.device.items()},
            "host_bytes": {name: round(size) for name, size in found.host.items()},
            "sent_bytes_per_step": round(found.sent), "tokens_per_step": round(found.tokens),
            **{name: [each.low, each.likely, each.high] if each else None for name, each in spread.items()},
            "tokens_per_second": [found.rate("high", "high"), found.rate(), found.rate("low", "low")]
            if found.known else None, "speed_source": found.source}
