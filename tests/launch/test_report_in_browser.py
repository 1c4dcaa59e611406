"""Reports in a real browser: the charts show the data, nothing is requested, nothing is refused, and it can be read everywhere."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import Browser, needs_chromium
from fuzz import manta
from made_run import make_run

from manta.cluster.supervise.event_log import read_events
from manta.trainer.metrics import read_metrics

pytestmark = needs_chromium
ROOT = Path(__file__).parents[2]
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
HOVER = """(share => [...document.querySelectorAll('#charts figure')].flatMap(figure => {
  const chart = figure.querySelector('.chart'), box = chart.getBoundingClientRect();
  chart.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 58 + share * (box.width - 70), clientY: box.top + 50}));
  return [...figure.querySelectorAll('.legend span')].map(
    entry => [entry.dataset.key, Number(entry.dataset.run), entry.querySelector('b').textContent]);
}))(SHARE)"""
PATHS = "[...document.querySelectorAll('path.final')].map(path => [path.dataset.key, path.getAttribute('d')])"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def shown_values(browser: Browser, share: float) -> list[tuple[str, int, float, int]]:
    """Return what the legends show while the mouse is at a place of each chart: key, run, value and step."""
    values = []
    for key, run, text in browser.run(HOVER.replace("SHARE", str(share))):
        value, unit, step = re.fullmatch(r"([-\d.e+]+) ?([kMGT]?)(?: \(.*\))? at step (\d+)", text).groups()
        values.append((key, run, float(value) * UNITS[unit], int(step)))
    return values


def check_page(browser: Browser, file: Path, runs: list[Path], screenshots: Path) -> None:
    """Open a report; compare what it shows with the metrics, and take screenshots."""
    browser.events.clear()
    browser.look(width=1280)
    browser.open(file.as_uri())
    lines = [{line["step"]: line for line in read_metrics(run / "metrics.jsonl")} for run in runs]
    for share in (0.0, 0.3, 0.7, 1.0):
        values = shown_values(browser, share)
        assert {"train/loss", "learning_rate", "grad_norm", "tokens_per_second", "memory/peak"} <= {key for key, *_ in values}
        for key, run, value, step in values:
            assert value == pytest.approx(lines[run][step][key], rel=2e-3, abs=1e-9), (key, step)
    browser.run("slider.value = 0; slider.oninput()")
    key, path = browser.run(PATHS)[0]
    places = [tuple(map(float, point.split())) for point in re.findall(r"[\d.]+ [\d.]+", path)]
    losses = [line[key] for line in lines[0].values()]
    assert len(places) == len(losses)
    low, high = min(range(len(losses)), key=losses.__getitem__), max(range(len(losses)), key=losses.__getitem__)
    scale = (places[low][1] - places[high][1]) / (losses[high] - losses[low])
    assert scale > 0
    for (_, y), loss in zip(places, losses, strict=True):
        assert y == pytest.approx(places[low][1] - scale * (loss - losses[low]), abs=0.2)
    for name, look in {
        "light": {"width": 1280},
        "dark": {"width": 1280, "scheme": "dark"},
        "phone": {"width": 390, "height": 844, "mobile": True},
    }.items():
        browser.look(**look)
        browser.screenshot(screenshots / f"{name}.png")
        width, height = struct.unpack(">II", (screenshots / f"{name}.png").read_bytes()[16:24])
        assert (width, height > 1000) == (look["width"], True)
        assert browser.run("document.documentElement.scrollWidth") <= look["width"], "it scrolls sideways"
    assert browser.requests() == [file.as_uri()]
    assert browser.problems() == []
    assert file.stat().st_size <= 1_000_000


def drag(browser: Browser, first: float, second: float) -> None:
    """Drag over a part of the first chart, with the mouse."""
    left, top, width = browser.run("(box => [box.left, box.top, box.width])(document.querySelector('.chart').getBoundingClientRect())")
    places = [left + 58 + share * (width - 70) for share in (first, second)]
    browser.mouse("Moved", places[0], top + 80)
    browser.mouse("Pressed", places[0], top + 80, button="left", clickCount=1)
    browser.mouse("Moved", places[1], top + 80, button="left")
    browser.mouse("Released", places[1], top + 80, button="left", clickCount=1)


def test_a_report_shows_its_run(browser, tmp_path):
    more = {"train/loss/web": 2.5, "health/update_ratio/blocks.0": 1e-3, "energy/kwh": 0.5}
    run = make_run(tmp_path / "run", failures=((47, 40), (72, 70), (95, 80)), experts=8, more=more)
    assert manta("report", str(run)).code == 0
    check_page(browser, run / "report.html", [run], tmp_path)
    assert browser.run("document.querySelectorAll('canvas.heat').length") == 2
    assert browser.run("document.querySelector('figure').querySelectorAll('.mark').length") == 3
    assert browser.run("document.querySelector('path.redone').getAttribute('d').length") > 50

    browser.look(width=1280)
    browser.run("document.querySelector('figure').scrollIntoView()")
    drag(browser, 0.25, 0.5)
    assert browser.run("view.zoom.map(Math.round)") == pytest.approx([26, 50], abs=1)
    assert all(26 <= step <= 51 for key, _, _, step in shown_values(browser, 0.5) if key != "eval/loss")
    browser.run("document.getElementById('reset').click()")
    assert browser.run("view.zoom") is None
    browser.run("document.querySelector('figure button').click()")
    assert "NaN" not in str(browser.run(PATHS))
    for axis in ("tokens", "hours"):
        browser.run(
            f"document.getElementById('axis').value = '{axis}'; document.getElementById('axis').onchange({{target: {{value: '{axis}'}}}})"
        )
        assert "NaN" not in str(browser.run(PATHS))
    assert browser.problems() == []


def test_a_comparison_shows_its_runs(browser, tmp_path):
    runs = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second", "third"))]
    assert manta("compare", *map(str, runs), "--html", str(tmp_path / "compare.html")).code == 0
    check_page(browser, tmp_path / "compare.html", runs, tmp_path)


def test_what_a_run_is_called_is_only_text(browser, tmp_path):
    more = {"train/loss/<img src=x onerror=alert(1)>": 1.0, "eval/</script><script>alert(2)</script>": 2.0}
    run = make_run(tmp_path / "<b>run", failures=((50, 40),), message="<img src=//a.example/x>", more=more)
    assert manta("report", str(run)).code == 0
    browser.events.clear()
    browser.open((run / "report.html").as_uri())
    assert (browser.requests(), browser.problems()) == ([(run / "report.html").as_uri()], [])
    assert browser.run("document.querySelectorAll('img, b > *').length") == 0
    assert browser.run("document.querySelectorAll('script').length") == 2


def test_a_request_and_an_error_are_noticed(browser, tmp_path):
    """The control."""
    page = tmp_path / "page.html"
    page.write_text("<img src='gone.png'><script>nothing.at.all</script>")
    browser.events.clear()
    browser.open(page.as_uri())
    assert len(browser.requests()) == 2
    assert len(browser.problems()) >= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_reports_of_real_runs(browser, tmp_path):
    """The demo's run, and a mixture of experts that loses a rank three times: each run wrote its report when it ended."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, ROOT / "examples/demo.py"], cwd=tmp_path, env=environment, check=True)
    demo = tmp_path / "runs/demo"
    check_page(browser, demo / "report.html", [demo], tmp_path)

    run = tmp_path / "runs/moe"
    options = ("train.steps=60", "train.global_batch=16", "train.micro_batch=8", "checkpoint.every_steps=10", "evaluate.every_steps=20")
    command = [Path(sys.executable).with_name("manta"), "train", "examples/moe-tiny.yaml", "run.dir=runs/moe", *options]
    training = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        for attempt, step in enumerate((17, 33, 47), start=1):
            while not any(line["attempt"] == attempt and line["step"] >= step for line in read_metrics(run / "metrics.jsonl")):
                assert training.poll() is None
                time.sleep(0.05)
            started = [event for event in read_events(run / "events.jsonl") if event["event"] == "attempt-started"]
            os.kill(started[-1]["ranks"][-1]["pid"], signal.SIGKILL)
        assert training.wait() == 0
    finally:
        training.terminate()
        training.wait(60)
    check_page(browser, run / "report.html", [run], tmp_path)
    assert browser.run("document.querySelector('figure').querySelectorAll('.mark').length") == 3
    assert browser.run("document.querySelectorAll('canvas.heat').length") == 4
    if kept := os.environ.get("MANTA_TEST_SCREENSHOTS"):
        shutil.copytree(tmp_path, kept, ignore=shutil.ignore_patterns("corpora", "checkpoints", "profile"), dirs_exist_ok=True)
    assert json.loads(manta("compare", str(demo), str(run), "--json").stdout)["divergence"][0]["cause"] == "data"
