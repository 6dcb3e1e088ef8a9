"""Every way of training a model on a choice of machines: what it needs, what it sends, and how long a step takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from master.plan.machines import Machine, Network
from master.plan.rates import Rate, rate_on
from trainer.estimate import batch, memory, speed, traffic
from trainer.estimate.memory import NF4, USABLE, MemoryInputs, inputs_of
from trainer.estimate.shape import Shape
from trainer.estimate.speed import NOTHING, Range

FULL, LORA, QLORA = "full", "lora", "qlora"
BUCKET = 5e7  # numbers of gradients that are sent together; transformers' "auto" is hidden size squared
GPU_CHUNK = 1 << 26  # numbers of logits that are held at once on a GPU, as the trainer has it
NETWORK_SPREAD = (0.95, 1.05)  # of a measured rate; of a card's own
NOMINAL_SPREAD = (0.7, 1.0)


@dataclass(frozen=True)
class Task:
    """What is to be trained: a model's shape, tokens of a `sequence`, sequences of a `global_batch`, the `rank` of an
    adapter, the `kinds` that come into question, a folder for offload to NVMe, None without, and the `bits` of a
    gradient between hosts, 0: as they are.
    """

    shape: Shape
    sequence: int
    global_batch: int
    rank: int = 16
    kinds: tuple[str, ...] = (FULL, LORA, QLORA)
    nvme: str | None = None
    bits: int = 0


@dataclass(frozen=True)
class Way:
    """How it is trained: `offload` is "", "optimizer", "all" or "nvme"; `bits` of a gradient between hosts, or 0."""

    kind: str
    machines: tuple[Machine, ...]
    stage: int
    offload: str
    batch: batch.Batch
    bits: int = 0

    @property
    def lanes(self) -> int:
        """Ranks of the smallest machine."""
        return min(len(machine.devices) for machine in self.machines)

    @property
    def ranks(self) -> int:
        """Ranks of all machines."""
        return sum(len(machine.devices) for machine in self.machines)


@dataclass(frozen=True)
class Estimate:
    """What a way needs and takes.

    `device`, `host`: bytes of the fullest device and host, by what takes them, `short`: by how much they exceed what
    there is, 0 where it fits; `sent`: bytes that leave each host in a step; `compute` None where no device's speed is
    known; `source`: where that is from; `link`: the slowest host's bytes a second, if it was measured, and its name;
    `correction`: by how much earlier runs were faster than this says.
    """

    way: Way
    device: Mapping[str, float]
    host: Mapping[str, float]
    short: float
    tokens: float
    sent: float
    compute: Range | None
    communication: Range
    offload: Range
    source: str
    device_name: str
    link: tuple[float, bool, str] | None
    correction: float = 1.0

    @property
    def fits(self) -> bool:
        """True if device and host hold it."""
        return self.short <= 0

    def seconds(self, compute: str = "likely", rest: str = "likely") -> float:
        """Return the seconds of a step, in the low, likely or high case of its parts."""
        computing = getattr(self.compute, compute) if self.compute else 0.0
        found: float = computing + getattr(self.communication, rest) + getattr(self.offload, rest)
        return found

    def rate(self, compute: str = "likely", rest: str = "likely") -> float:
        """Return tokens a second, corrected; of the high case of the parts comes the low rate."""
        return self.correction * self.tokens / max(self.seconds(compute, rest), 1e-12)

    @property
    def known(self) -> bool:
        """True if a device's speed is known."""
        return self.compute is not None


def ways(task: Task, machines: tuple[Machine, ...]) -> Iterator[Way]:
    """Yield every way on these machines, with the largest useful batch that fits; of each with activations kept and
    computed anew."""
    ranks = sum(len(machine.devices) for machine in machines)
    bits = task.bits if len(machines) > 1 else 0
    for kind in task.kinds:
        if kind == QLORA and not all(machine.on_gpu for machine in machines):
            continue
        for stage, offload in stages(kind, ranks, task.nvme is not None):
            if bits and stage == 3:  # which splits the model among hosts
                continue
            for checkpoints in (False, True):
                load = load_of(task, kind, ranks, stage, offload, machines)
                load = replace(load, checkpoints=checkpoints)
                found = batch.choose_batch(load, task.global_batch, min(machine.memory for machine in machines),
                                           machines[0].on_gpu, may_checkpoint=False)
                yield Way(kind, machines, stage, offload, found, bits)


def stages(kind: str, ranks: int, nvme: bool) -> list[tuple[int, str]]:
    """Return ZeRO's stages with what each offloads that make sense: they split among ranks, 3 doesn't take 4 bits."""
    plain = [(0, "")] + ([(1, ""), (2, "")] if ranks > 1 else [])
    split = [(3, "")] if ranks > 1 else []
    offloads = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")] + ([(3, "nvme")] if nvme else [])
    return [each for each in [*plain, *split, *offloads] if kind != QLORA or each[0] < 3]


def load_of(task: Task, kind: str, ranks: int, stage: int, offload: str, machines: Sequence[Machine]) -> MemoryInputs:
    """Return what each rank's memory holds, its batch aside."""
    number = 2 if all(machine.on_gpu for machine in machines) else 4  # as the trainer computes there
    trained = task.shape.parameters if kind == FULL else task.shape.adapter(task.rank)
    chunk = max(1, GPU_CHUNK // task.shape.vocabulary) if machines[0].on_gpu else 256
    lanes = min(len(machine.devices) for machine in machines)
    crosses = bool(task.bits) and len(machines) > 1  # then each host has all states
    return inputs_of(
        task.shape, trained, repeats_keys=True, sequence=task.sequence, micro=1,
        accumulation=max(2, task.global_batch), ranks=ranks, sharing=lanes if crosses else 0, stage=stage,
        residual=traffic.residual_bytes(lanes, len(machines), False) if crosses else 0.0, number=number,
        weight={FULL: 0.0, LORA: float(number), QLORA: NF4}[kind], offloads=bool(offload),
        offloads_weights=offload in ("all", "nvme"), chunk=chunk, bucket=BUCKET)


def estimate(task: Task, way: Way, network: Network, rates: Mapping[str, Rate]) -> Estimate:
    """Return what a way needs and how long its step takes; `rates`: of devices, by their names."""
    chosen, ranks = way.batch, way.ranks
    load = replace(load_of(task, way.kind, ranks, way.stage, way.offload, way.machines), micro=chosen.micro,
                   accumulation=chosen.accumulation, checkpoints=chosen.checkpoints)
    device = memory.bytes_needed(load)
    host, short_host = dict[str, float](), 0.0
    for machine in way.machines:
        needed = {name: size * len(machine.devices) for name, size in memory.host_bytes(load).items()}
        if way.offload == "nvme":
            needed = {"gradients": needed["gradients"]}
        if sum(needed.values()) >= sum(host.values()):
            host = needed
        if machine.ram and machine.on_gpu:
            short_host = max(short_host, sum(needed.values()) - USABLE * machine.ram)
    short = max(sum(device.values()) - USABLE * min(machine.memory for machine in way.machines), short_host)
    tokens = float(chosen.micro * chosen.accumulation * ranks * task.sequence)
    exchange = traffic.Exchange(way.stage, ranks, load.number, load.trained, load.weights, chosen.accumulation,
                                by_owner=True, bits=way.bits, hosts=len(way.machines))
    compute, source, name = compute_of(task, way, rates)
    offloading = offload_of(load, way)
    communication, link = communication_of(exchange, way, network)
    return Estimate(way, {key: size for key, size in device.items() if size}, {k: v for k, v in host.items() if v},
                    max(0.0, short), tokens, traffic.step_bytes(exchange) if len(way.machines) > 1 else 0.0, compute,
                    communication, offloading, source, name, link, rates[name].correction if name in rates else 1.0)


def compute_of(task: Task, way: Way, rates: Mapping[str, Rate]) -> tuple[Range | None, str, str]:
    """Return the slowest device's seconds of computing in a step, where its speed is from, and its name."""
    tokens = way.batch.micro * way.batch.accumulation * task.sequence
    amount = tokens * speed.work_per_token(task.shape, task.sequence, way.kind != FULL, way.stage,
                                           way.batch.checkpoints, way.machines[0].on_gpu)
    slowest: tuple[Range, str, str] | None = None
    for host, name in sorted({(machine.name, device) for machine in way.machines for device in machine.devices}):
        rate = rate_on(rates, host, name)
        if rate is None:
            return None, "unknown", name
        found = speed.compute_seconds(amount, rate.flops)
        slowest = (found, rate.source, name) if slowest is None or found.likely > slowest[0].likely else slowest
    assert slowest
    return slowest


def communication_of(exchange: traffic.Exchange, way: Way, network: Network
                     ) -> tuple[Range, tuple[float, bool, str] | None]:
    """Return the seconds that a step's exchange takes, and the link that decides; None within one machine."""
    sent = traffic.step_bytes(exchange)
    if len(way.machines) == 1:
        one = way.machines[0]
        return (speed.over(sent, speed.between_devices(one.devices[0])) if one.on_gpu else NOTHING), None
    rate, measured, name = network.between(way.machines)
    low, high = NETWORK_SPREAD if measured else NOMINAL_SPREAD
    waiting = traffic.step_messages(exchange) * network.latency(way.machines) / 2
    coding = speed.encoding_seconds(exchange.trained, way.lanes, way.machines[0].on_gpu) if way.bits else NOTHING
    return Range(sent / (rate * high) + waiting + coding.low, sent / rate + waiting + coding.likely,
                 sent / (rate * low) + waiting + coding.high), (rate, measured, name)


def offload_of(load: MemoryInputs, way: Way) -> Range:
    """Return the seconds that a step spends on what the fullest host holds."""
    if not way.offload:
        return NOTHING
    here = max(len(machine.devices) for machine in way.machines) / load.ranks
    fetched = load.weights * here if way.offload in ("all", "nvme") else 0.0
    return speed.offload_seconds(load.trained * here, fetched, load.number, load.accumulation, way.offload == "nvme")


def all_estimates(task: Task, choices: Sequence[tuple[Machine, ...]], network: Network, rates: Mapping[str, Rate]
                  ) -> list[Estimate]:
    """Return all ways on all choices of machines: what fits by the time of a token, then what doesn't by how much."""
    found = [estimate(task, way, network, rates) for way in itertools.chain.from_iterable(
        ways(task, chosen) for chosen in choices)]
    return sorted(found, key=lambda each: (each.short, *order(each)))


def order(found: Estimate) -> tuple[float, ...]:
    """Return what sorts ways that fit: a token's time; where two take as long, what changes least.

    Where no speed is known, what costs computing comes last, and only then the network's time counts. Of ranks that
    exchange something the lower stage is preferred, whose traffic doesn't hang on the accumulation; of others what
    needs less memory.
    """
    way, time = found.way, round(found.seconds() / found.tokens, 12)
    least = (way.batch.checkpoints, bool(way.offload))
    return (not found.known, *((time, len(way.machines), *least) if found.known else (*least, time, len(way.machines))),
            -way.batch.micro, way.stage if found.communication.likely else sum(found.device.values()))
