"""What a device can compute at most: dense products of 16-bit matrices, added up in 32 bits, in TFLOP/s.

NVIDIA's cards: SMs x rated boost clock x what an SM does in a cycle. That is 512 for GeForce, whose tensor cores add up
in 32 bits at half their speed, and 1,024 for workstation cards. The Ampere GA102, Ada and RTX Blackwell whitepapers
give the same by their tables (RTX 3090 Ti 80, RTX 4090 165.2, RTX 5090 209.5), and so does Turing's (RTX 2080 Ti 53.8).
SMs and clocks are those of the whitepapers, of NVIDIA's product pages, and of the cards' entries at TechPowerUp.

Data center cards, as their data sheets say it, without sparsity: nvidia.com for A100, A30, A40, H100, H200, B200, L4,
L40, L40S, T4, V100, A10G; amd.com for MI210, MI250X, MI300X and RX 7900. One MI250 or MI250X is two devices, and each
is half of it. A card that isn't here, Intel's Arc among them, is unknown: no source was found.
"""

from __future__ import annotations

import re

GEFORCE, WORKSTATION = 512, 1024  # FLOP of an SM in a cycle
# (SMs, GHz) by name
GEFORCE_CARDS = {
    "RTX 5090": (170, 2.407), "RTX 5080": (84, 2.617), "RTX 5070 Ti": (70, 2.452), "RTX 5070": (48, 2.512),
    "RTX 5060 Ti": (36, 2.572), "RTX 5060": (30, 2.497), "RTX 5050": (20, 2.572),
    "RTX 4090": (128, 2.520), "RTX 4080 SUPER": (80, 2.550), "RTX 4080": (76, 2.505), "RTX 4070 Ti SUPER": (66, 2.610),
    "RTX 4070 Ti": (60, 2.610), "RTX 4070 SUPER": (56, 2.475), "RTX 4070": (46, 2.475), "RTX 4060 Ti": (34, 2.535),
    "RTX 4060": (24, 2.460),
    "RTX 3090 Ti": (84, 1.860), "RTX 3090": (82, 1.695), "RTX 3080 Ti": (80, 1.665), "RTX 3080": (68, 1.710),
    "RTX 3070 Ti": (48, 1.770), "RTX 3070": (46, 1.725), "RTX 3060 Ti": (38, 1.665), "RTX 3060": (28, 1.777),
    "RTX 3050": (20, 1.777),
    "RTX 2080 Ti": (68, 1.545), "RTX 2080": (46, 1.710),
}
WORKSTATION_CARDS = {
    "RTX 6000 Ada Generation": (142, 2.505), "RTX 5000 Ada Generation": (100, 2.550),
    "RTX 4000 Ada Generation": (48, 2.175),
    "RTX A6000": (84, 1.800), "RTX A4000": (48, 1.560), "RTX A2000": (26, 1.200), "A10": (72, 1.695),
}
PUBLISHED = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "A100": 312.0, "A800": 312.0,
    "L40S": 362.0, "L40": 181.0, "L4": 121.0, "A40": 149.7, "A30": 165.0, "A10G": 70.0, "V100": 125.0, "T4": 65.0,
    "MI300X": 1307.4, "MI250X": 191.5, "MI250": 181.0, "MI210": 181.0, "RX 7900 XTX": 122.8,
}
PEAK_TFLOPS = PUBLISHED | {
    name: round(units * clock * rate / 1e3, 1)
    for cards, rate in ((GEFORCE_CARDS, GEFORCE), (WORKSTATION_CARDS, WORKSTATION))
    for name, (units, clock) in cards.items()}


def device_peak(name: str) -> float | None:
    """Return the TFLOP/s of a device by its name; a variant that isn't in the table (Laptop, Ti, ...) is unknown."""
    for key in sorted(PEAK_TFLOPS, key=len, reverse=True):  # the longest name that fits
        if re.search(rf"\b{key}(?! (Ti|SUPER|XTX|D|Laptop|Max-Q)\b)(?![A-Za-z0-9])", name):
            return PEAK_TFLOPS[key]
    return None
