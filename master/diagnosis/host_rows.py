"""How busy a host is, as a row that people read: its processors, its memory, its network."""

from __future__ import annotations

from typing import Any


def cells(measured: dict[str, Any]) -> tuple[str, str, str]:
    """Return what a host's row shows of its processors, its memory and its network."""
    if "fault" in measured or not measured:
        return measured.get("fault", "asked"), "", ""
    gpus = measured["gpus"]
    busy = [f"GPU {gpu['slot']}: {share(gpu['use_percent'])}" + (
        f" {gpu['temperature_c']:.0f} °C" if gpu["temperature_c"] is not None else "") for gpu in gpus]
    held = [f"{gpu['memory_used_mib'] / 1024:.1f}/{gpu['memory_total_mib'] / 1024:.0f} GiB" for gpu in gpus
            if gpu["memory_used_mib"] is not None and gpu["memory_total_mib"]]
    if measured["problem"]:
        busy.append(measured["problem"])
    if not busy:
        busy.append(f"CPU: {share(measured['cpu_percent'])}")
        if measured["ram_mib"] and measured["ram_available_mib"] is not None:
            used = measured["ram_mib"] - measured["ram_available_mib"]
            held.append(f"{used / 1024:.1f}/{measured['ram_mib'] / 1024:.0f} GiB")
    return "\n".join(busy), "\n".join(held), network(measured["nics"])


def share(percent: float | None) -> str:
    """Return a percentage, or ? for an unknown one."""
    return "?" if percent is None else f"{percent:.0f} %"


def network(nics: list[dict[str, Any]]) -> str:
    """Return what the busiest network card moves: into and out of the host."""
    if not nics:
        return "-"
    nic = nics[0]
    speed = f" of {nic['mbit'] / 8:.0f}" if nic["mbit"] else ""
    return f"{nic['name']} in {nic['in'] / 1e6:.1f}, out {nic['out'] / 1e6:.1f}{speed} MB/s"
