"""What makes a host's GPUs or network slower than they could be, or unreachable: findings from its facts."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from master.check.finding import Facts, Finding

# NVML's nvmlClocksThrottleReasons (nvml.h), those that aren't the user's own choice
SLOWED = {0x8: "hardware slowdown", 0x20: "heat (driver)", 0x40: "heat (hardware)", 0x80: "its power supply"}
VIRTUAL_BRIDGE = re.compile(r"docker|virbr|br-[0-9a-f]{12}|lxc|lxd|cni|podman|vmnet")
WSL_NAT = ipaddress.ip_network("172.16.0.0/12")
SLOW_MBIT = 1000  # Mbit/s: a card below it is rarely meant


def gpu_findings(host: str, facts: Facts) -> list[Finding]:
    """Return what makes a host's GPUs slower than they could be, or is about to lose one."""
    found = []
    for gpu in facts["gpu_health"]:
        reasons = [why for bit, why in SLOWED.items() if (gpu["slowed"] or 0) & bit]
        if reasons:
            found.append(Finding("warning", (host,), f"slot {gpu['slot']} is slowed down: {', '.join(reasons)}",
                                 "every step waits for the slowest GPU",
                                 "nvidia-smi -q -d PERFORMANCE there says more"))
        if gpu["lanes"] and gpu["lanes_max"] and gpu["lanes"] < gpu["lanes_max"]:
            found.append(Finding("warning", (host,),
                                 f"slot {gpu['slot']} has {gpu['lanes']} of {gpu['lanes_max']} PCIe lanes",
                                 "offload and exchange between GPUs are as much slower",
                                 "reseat the card or its riser, or use another slot of the board"))
    if facts["kernel_faults"]:
        found.append(Finding("warning", (host,), f"its kernel reports GPU faults: {facts['kernel_faults'][-1]}",
                             "a training may die of the next one", "look up the Xid number; check power and cooling"))
    return found


def card_findings(host: str, facts: Facts) -> list[Finding]:
    """Return what is wrong with the network card that the training will use, and with those beside it."""
    card, found = facts["card"], list[Finding]()
    if card is None:
        return []
    if VIRTUAL_BRIDGE.match(card["name"]):
        found.append(Finding("error", (host,), f"{card['name']}, the bridge of its containers or virtual machines, is "
                             "its network", "the other hosts can't reach it there",
                             "name the host by its address on a real card"))
    if "microsoft" in facts["kernel"].lower() and any(
            ipaddress.ip_interface(address) in WSL_NAT for address in card["addresses"]):
        found.append(Finding("error", (host,),
                             f"it is WSL2 behind Windows' address translation ({card['addresses'][0]})",
                             "the other hosts can't reach its ranks",
                             "networkingMode=mirrored under [wsl2] in .wslconfig on Windows, then wsl --shutdown"))
    real = [each for each in facts["nics"] if each["kind"] in ("card", "wifi")]
    if card["kind"] == "wifi":
        found.append(Finding("warning", (host,), f"its network is Wi-Fi ({card['name']})",
                             "every step waits for it, by the slowest moment", "plug in a cable"))
    faster = [each for each in real if (each["mbit"] or 0) > (card["mbit"] or 0) > 0]
    if faster:
        found.append(Finding(
            "warning", (host,), f"{card['name']} ({card['mbit']} Mbit/s) is used, and {faster[0]['name']} has "
            f"{faster[0]['mbit']}", "communication takes as much longer",
            f"name the host by its address on {faster[0]['name']} ({', '.join(faster[0]['addresses'])})"))
    elif card["mbit"] and card["mbit"] < SLOW_MBIT:
        found.append(Finding("warning", (host,), f"{card['name']} runs at {card['mbit']} Mbit/s",
                             "communication takes ten times as long as on gigabit",
                             "look at the cable and the switch's port"))
    networks: dict[Any, str] = {}
    for each in real:
        for network in {ipaddress.ip_interface(address).network for address in each["addresses"]}:
            if networks.setdefault(network, each["name"]) != each["name"]:
                found.append(Finding(
                    "warning", (host,), f"{networks[network]} and {each['name']} are both in {network}",
                    "answers leave by the wrong one, often the slower", "give one of them another network"))
    return found
