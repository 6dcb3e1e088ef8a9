"""`invoke report`: what the page says, that nothing of a run folder gets out of it, and how it looks in a browser."""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser
from conftest import ROOT
from PIL import Image

from master.report.chart import Series, axis, line_chart
from master.report.curves import MOST, Curve, Curves

TOOL = ROOT / "master" / "write_report.py"
START = 1_800_000_000.0
EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'


def write_run(folder: Path, name: str, hosts: int = 3, steps: int = 300, **facts: Any) -> Path:
    """A run folder as a training on several hosts with GPUs leaves it."""
    run = folder / "runs" / name
    (run / "samples").mkdir(parents=True)
    names = [f"gpu{number + 1}" for number in range(hosts)]
    (run / "run.json").write_text(json.dumps({
        "status": "finished", "started": START, "ended": START + 2 * steps, "model": "org/small-1b",
        "dataset": "support.jsonl", "hosts": names, "slots": dict.fromkeys(names, 2), "world_size": 2 * hosts,
        "engine": "DeepSpeed ZeRO-2", "precision": "bf16", "parameters": 1_100_000_000, "steps": steps, "seed": 42,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "plain_command": "deepspeed --hostfile hostfile.txt train.py",
        "waiting": {"network": 0.1, "hosts": {host: 0.1 + 0.05 * number for number, host in enumerate(names)}},
        "traffic": {"counted": 4_400_000_000, "formula": 4_300_000_000, "uncompressed": 4_300_000_000},
        "memory": {"needs": {"weights": 2.2e9, "optimizer states": 4.4e9}},
        "summary": {"tokens": 19_660_800, "computed_tokens_per_second": 32_768.0, "peak_bytes": 8.1e9}, **facts}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(
        {"time": START + 2 * step, "step": step, "loss": 1.2 + 2 / (1 + step / 40), "grad_norm": 0.8,
         "tokens_per_second": 32_768 + step % 7, "learning_rate": 1e-4 * (1 - step / steps), "tokens": 65_536 * step,
         "sent_per_step": 4.4e9, **({"eval_loss": 1.3 + 2 / (1 + step / 40)} if step % 60 == 0 else {})}) + "\n"
        for step in range(1, steps + 1)))
    (run / "hosts.jsonl").write_text("".join(json.dumps({"time": START + second, "hosts": {host: {
        "cpu_percent": 12 + number, "ram_mib": 64_000, "ram_used_mib": 20_000, "in": 3e8, "out": 3.1e8,
        "gpus": [{"use_percent": 96 - 9 * number - second % 5, "memory_used_mib": 20_000 + 500 * number,
                  "memory_total_mib": 24_576, "temperature_c": 66, "power_w": 290}] * 2}
        for number, host in enumerate(names)}}) + "\n" for second in range(8, 2 * steps, 15)))
    events = ((190, "gpu3: connection lost (no answer for 12 s): its ranks go on; reconnecting for up to 60 s"),
              (214, "gpu3: connected again after 24 s"))
    (run / "events.jsonl").write_text("".join(
        json.dumps({"time": START + second, "text": text}) + "\n" for second, text in events))
    for step in (0, 60, 300):
        (run / "samples" / f"step-{step:07d}.txt").write_text(f"after {step} steps\n\n[1] How do I >>> reset it?\n")
    (run / "plan.json").write_text(json.dumps({"device": "NVIDIA RTX 4090", "predicted": 35_000, "measured": 32_768}))
    (run / "ds_config.json").write_text('{"zero_optimization": {"stage": 2}}\n')
    (run / "hostfile.txt").write_text("".join(f"{host} slots=2\n" for host in names))
    return run


def report(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, TOOL, *words], cwd=folder, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def text_of(path: Path) -> str:
    """What a person reads on a page, without markup."""
    page = re.sub(r"<style>.*?</style>", "", path.read_text(), flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))


class Links(HTMLParser):
    """Everything on a page that a browser would fetch, or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {name}={value}" for name, value in attrs
                       if name in ("src", "href", "srcset", "data", "action") or name.startswith("on")]
        if tag in ("script", "iframe", "object", "embed", "link", "img"):
            self.found.append(tag)


def test_a_run_becomes_a_page_of_its_own(tmp_path: Path) -> None:
    write_run(tmp_path, "20270115-080000-small-1b")
    done = report(tmp_path)
    place = "runs/20270115-080000-small-1b/report.html"
    assert (done.returncode, done.stdout) == (0, f"{place}\n") and f"xdg-open {place}" in done.stderr
    said = text_of(tmp_path / place)
    for part in ("20270115-080000-small-1b finished org/small-1b, support.jsonl", "step 300 of 300",
                 "training loss 3.151 → 1.435", "evaluation loss 2.1 → 1.535", "tokens a second 32,768",
                 "tokens 19.7 M",
                 "time 10 min", "ranks 6 on 3 hosts", "GPU use % gpu1 gpu2 gpu3", "gpu3 20%",
                 "tokens a second 32,768 35,000 by the plan", "4.4 GB 4.3 GB by the formula",
                 "8.1 GB 6.6 GB by the estimate", "0:03:10 gpu3: connection lost",
                 "after 300 steps [1] How do I >>> reset",
                 "invoke train --like runs/20270115-080000-small-1b", "deepspeed --hostfile hostfile.txt train.py",
                 '"stage": 2', "torch 2.13.0"):
        assert part in said, part


def test_several_runs_are_beside_each_other(tmp_path: Path) -> None:
    write_run(tmp_path, "20270115-080000-small-1b")
    write_run(tmp_path, "20270116-080000-small-1b", precision="fp16", steps=200, seed=7)
    done = report(tmp_path, "20270115-080000-small-1b", "runs/20270116-080000-small-1b")
    assert done.stdout == "report.html\n", done.stderr
    said = text_of(tmp_path / "report.html")
    assert "2 runs" in said and "precision bf16 fp16" in said and "seed 42 7" in said and "model org" not in said
    assert "the same: model, data" in said
    assert report(tmp_path, "20270115-080000-small-1b", "--out", "x/y.html").returncode == 1


def test_a_run_of_this_minute_and_an_empty_one(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "20270115-080000-tiny"
    run.mkdir(parents=True)
    done = report(tmp_path)
    assert done.returncode == 1 and "no run.json and no metrics there yet" in done.stderr
    (run / "metrics.jsonl").write_text('{"time": 1800000000, "step": 1, "loss": 7.5, "tokens": 64}\n')
    assert report(tmp_path).returncode == 0
    assert "training loss 7.5" in text_of(run / "report.html")
    assert report(tmp_path, "nowhere").returncode == 1


def test_what_a_run_folder_says_is_text_and_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path, "20270115-080000-small-1b", model=EVIL, dataset=EVIL, kernels=EVIL, versions={EVIL: EVIL},
                    slots={EVIL: EVIL}, waiting={"hosts": {EVIL: 0.5}}, plain_command=EVIL, started=float("inf"),
                    world_size=[EVIL], summary=EVIL, traffic=[1], memory={"needs": {EVIL: EVIL}})
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "steps": EVIL, "status": EVIL}))
    (run / "hosts.jsonl").write_text("".join(
        json.dumps({"time": START + number,
                    "hosts": {EVIL: {"gpus": [{"use_percent": number}, EVIL], "in": EVIL}}}) + "\n"
        for number in range(5)) + '{"time": 1, "hosts": 5}\n[1]\n' + "[" * 100_000 + "\n")
    (run / "events.jsonl").write_text(json.dumps({"time": START, "text": EVIL}) + '\n{"time": NaN}\n"x"\n')
    (run / "samples" / f"step-{EVIL.replace('/', '')[:40]}.txt").write_text(EVIL * 3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1e999, "loss": 1}\n{"step": "x"}\nnonsense\n{"step": 301, "loss": NaN, "time": null}\n')
    done = report(tmp_path)
    assert done.returncode == 0, done.stderr
    page = Links()
    page.feed((run / "report.html").read_text())
    assert page.found == [] and EVIL in text_of(run / "report.html")


def test_a_link_in_the_folder_shows_nothing_from_elsewhere(tmp_path: Path) -> None:
    run = write_run(tmp_path, "20270115-080000-small-1b")
    (tmp_path / "secret").write_text("the key")
    (run / "ds_config.json").unlink()
    (run / "ds_config.json").symlink_to(tmp_path / "secret")
    (run / "samples" / "step-0000400.txt").symlink_to(tmp_path / "secret")
    assert report(tmp_path).returncode == 0
    assert "the key" not in (run / "report.html").read_text()


def test_a_long_run_has_a_page_of_a_bounded_size(tmp_path: Path) -> None:
    run = write_run(tmp_path, "20270115-080000-small-1b", steps=50_000)
    assert report(tmp_path).returncode == 0
    assert (run / "report.html").stat().st_size < 500_000
    curves = Curves(run / "metrics.jsonl")
    curves.newest()
    points = curves.points("loss")
    assert len(points) <= 2 * MOST + 1 and points[-1][0] == 50_000


def test_of_many_points_some_are_shown_the_last_among_them() -> None:
    curve = Curve()
    for number in range(10_001):
        curve.add(number, number)
    shown = curve.shown()
    assert len(shown) <= 2 * MOST + 1 and shown[0] == (0, 0) and shown[-1] == (10_000, 10_000)
    assert {round(b[0] - a[0]) for a, b in itertools.pairwise(shown[:-1])} == {16}


@pytest.mark.parametrize(("values", "ticks"), [
    ([0, 100], (0, 20, 40, 60, 80, 100)), ([1.435, 3.15], (1, 1.5, 2, 2.5, 3, 3.5)),
    ([5, 5], (5, 5.1, 5.2, 5.3, 5.4, 5.5)),
    ([0, 0], (0, 0.2, 0.4, 0.6, 0.8, 1)), ([-1, 1], (-1, -0.5, 0, 0.5, 1)), ([0, 3e-4], (0, 1e-4, 2e-4, 3e-4))])
def test_an_axis_has_round_numbers(values: list[float], ticks: tuple[float, ...]) -> None:
    assert axis(values).ticks == pytest.approx(ticks)


def test_a_chart_tells_its_numbers_to_those_who_cannot_see_it() -> None:
    made = line_chart("Loss", [Series("training", [(0, 4.0), (10, 2.0)])], "nats")
    assert 'role="img" aria-label="Loss: training from 4 to 2 nats"' in made
    assert line_chart("Loss", [Series("training", [])]) == ""


SEEN = """({wide: innerWidth, needed: document.documentElement.scrollWidth,
lines: document.querySelectorAll('polyline').length, ground: getComputedStyle(document.body).backgroundColor,
smallest: Math.min(...[...document.querySelectorAll('span.x, span.y, dd, td, p')].map(
    each => parseFloat(getComputedStyle(each).fontSize))),
plots: [...document.querySelectorAll('.area')].map(each => each.clientWidth)})"""


@pytest.mark.needs("chromium")
@pytest.mark.parametrize(("name", "wide", "high", "dark"), [("desk", 1280, 900, False), ("phone", 390, 844, True)])
def test_it_looks_right_in_a_browser_without_a_network(name: str, wide: int, high: int, dark: bool, tmp_path: Path
                                                       ) -> None:
    """REPORT_PICTURES=FOLDER keeps the pictures."""
    run = write_run(tmp_path, "20270115-080000-small-1b")
    assert report(tmp_path).returncode == 0
    place, ground = tmp_path / f"report-{name}.png", (20, 23, 27) if dark else (255, 255, 255)
    with Browser(tmp_path / "home") as browser:
        browser.open(f"file://{run}/report.html", wide, high, dark)
        seen = browser.value(SEEN)
        browser.picture(place)
        assert browser.requests == [f"file://{run}/report.html"]
    assert seen["needed"] <= seen["wide"] == wide  # nothing sticks out
    assert seen["lines"] == 5 + 5 * 3 and seen["smallest"] >= 12 and min(seen["plots"]) > 200
    assert seen["ground"] == f"rgb{ground}"
    shown = Image.open(place).convert("RGB")
    assert shown.width == wide and shown.getpixel((3, 3)) == ground
    colours = {colour for _, colour in shown.getcolors(1 << 24) or []}
    assert ((116, 181, 255) if dark else (11, 92, 173)) in colours  # the first line's
    if folder := os.environ.get("REPORT_PICTURES"):
        shutil.copy(place, folder)
