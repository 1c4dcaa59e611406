"""`manta report`: one file, that shows what metrics and events have, whatever they have, and that nothing in them can take over."""

import json
import os
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from fuzz import manta
from made_run import make_run

from manta.launch.report import at_end, html
from manta.launch.report.series import charts, expert_loads, read_run, thin, timeline

HOSTILE = "</script><script>alert(1)</script><img src=//a.example onerror=alert(2)>\x00&quot;"
THREE = ((47, 40), (72, 70), (95, 80))
MANY = {f"health/{name}/group{group}": 0.25 for name in ("grad_norm", "weight_norm", "update_ratio") for group in range(12)}


class Page(HTMLParser):
    """Collects the elements and the texts of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements, self.texts, self.inside = [], [], None
        self.feed(file.read_text(encoding="utf-8"))
        self.data = json.loads(self.texts[self.texts.index(("script", "data")) + 1])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.texts.append((tag, dict(attrs).get("id")))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(text for text in self.texts if isinstance(text, str))

    def curves(self) -> dict[str, dict]:
        return {curve["key"]: curve for chart in self.data["charts"] for curve in chart["curves"]}


def report(run: Path, *options: str) -> Page:
    written = manta("report", str(run), *options)
    assert (written.code, written.stdout) == (0, f"{run}/report.html\n"), written.output
    return Page(run / "report.html")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def change_lines(run: Path, change) -> None:
    lines = metrics(run)
    for line in lines:
        change(line)
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_the_curves_have_the_values_of_the_metrics(tmp_path):
    run = make_run(tmp_path / "run", failures=THREE, experts=4)
    curves = report(run).curves()
    final = {line["step"]: line for line in metrics(run)}
    for key in ("train/loss", "eval/loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "memory/peak"):
        expected = {step: line[key] for step, line in final.items() if key in line}
        assert curves[key]["x"] == sorted(expected)
        assert curves[key]["y"] == pytest.approx([expected[step] for step in sorted(expected)], rel=1e-5)
    assert [redone["x"] for redone in curves["train/loss"]["redone"]] == [[*range(41, 48)], [71, 72], [*range(81, 96)]]


def test_a_long_run_stays_below_a_megabyte_and_keeps_its_extremes(tmp_path):
    run = make_run(tmp_path / "run", steps=10_000, failures=((4000, 3990),), experts=8, more=MANY | {"eval/loss/web": 2.0})
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(re.sub(r'("step": 4321, .*?"train/loss": )[\d.]+', r"\g<1>99.5", text, count=1))
    page = report(run)
    assert (run / "report.html").stat().st_size <= 1_000_000
    curve = page.curves()["train/loss"]
    assert max(curve["high"]) == 99.5
    assert min(curve["low"]) == pytest.approx(min(line["train/loss"] for line in metrics(run)), rel=1e-5)
    assert 100 < len(curve["x"]) <= 1000
    assert len(page.curves()) == 8 + len(MANY)


def test_any_key_with_a_known_prefix_makes_a_curve(tmp_path):
    keys = (
        "eval/bits_per_byte",
        "eval/books/loss",
        "eval/books/bits_per_byte",
        "eval/bits_per_byte/web",
        "train/loss/web",
        "eval/loss/web",
        "energy/kwh",
        "health/grad_norm/blocks.0",
    )
    page = report(make_run(tmp_path / "run", more=dict.fromkeys(keys, 1.5) | {"other/key": 1.0, "train/name": "text", "eval/on": True}))
    assert {*keys} <= page.curves().keys()
    assert not {"other/key", "train/name", "eval/on"} & page.curves().keys()
    labels = {chart["title"]: [curve["label"] for curve in chart["curves"]] for chart in page.data["charts"]}
    assert labels["Loss"] == ["training", "validation", "books, validation"]
    assert labels["Loss by source"] == ["web, training", "web, validation"]
    assert labels["Validation bits per byte"] == ["all", "books", "web"]
    assert list(labels)[:4] == ["Loss", "Loss by source", "Learning rate", "Gradient norm"]
    assert "1.5 kWh (source unknown)" in page.text


def test_strings_of_a_run_are_only_text(tmp_path):
    name = HOSTILE.replace("/", "_").replace("\x00", "")
    run = make_run(tmp_path / name, failures=((50, 40),), more={f"train/loss/{HOSTILE}": 1.0}, message=HOSTILE)
    with (run / "events.jsonl").open("a") as events:
        events.write('{"time": 1790000100, "event": "of a newer version", "attempt": 1, "note": "\\ud800"}\n')
    manifest = json.loads((run / "manifest.json").read_text()) | {HOSTILE: HOSTILE}
    (run / "manifest.json").write_text(json.dumps(manifest))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("texts/*.txt", "'</td><script>alert(3)</script>.txt'"))
    page = report(run)
    assert [attrs for tag, attrs in page.elements if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert not [tag for tag, attrs in page.elements if tag == "img" or any(key.startswith("on") for key in attrs)]
    assert "alert(3)" in page.text
    assert "alert(1)" in page.data["runs"][0]["marks"][0]["text"]
    (policy,) = [attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", policy)


def test_values_other_than_the_default_are_marked(tmp_path):
    run = make_run(tmp_path / "run", config={"optimizer": {"learning_rate": 1e-3}})
    text = html.render([read_run(run)]).decode()
    marked = set(re.findall(r'<tr class="changed"><th>([\w.]+)</th>', text))
    assert {"optimizer.learning_rate", "data.sources", "checkpoint.every_steps", "precision"} <= marked
    assert not {"optimizer.beta1", "guard.replica_check_every_steps", "run.seed"} & marked
    assert "<th>optimizer.beta1</th>" in text


def test_expert_loads_are_in_percent_of_an_equal_share(tmp_path):
    run = make_run(tmp_path / "run", experts=4)
    change_lines(run, lambda line: line.update({"load/blocks.1.mlp.router": "damaged"} if line["step"] == 7 else {}))
    first, second = expert_loads(read_run(run))
    assert first["title"] == "blocks.0.mlp.router"
    assert all(abs(sum(column) - 400) <= 2 for column in first["columns"])
    assert first["columns"][0] == pytest.approx([400 * share for share in metrics(run)[0]["load/blocks.0.mlp.router"]], abs=1)
    assert second["x"][-1] == 100


def test_the_time_axis_covers_the_whole_run(tmp_path):
    pieces = timeline(read_run(make_run(tmp_path / "run", failures=THREE)).spans)
    assert pieces[0][0] == 0.0
    assert pieces[-1][1] == 1.0
    assert all(before[1] == after[0] for before, after in pairwise(pieces))
    assert {"training", "start-up", "failure detection and restart", "recomputed steps"} <= {category.value for *_, category in pieces}


def test_curves_are_thinned_to_means_and_extremes():
    assert thin([1, 2], [1.0, 3.0], 2) == {"x": [1, 2], "y": [1.0, 3.0]}
    assert thin([1, 2, 3, 4], [1.0, 3.0, 9.0, 9.0], 2) == {"x": [2, 4], "y": [2.0, 9.0], "low": [1.0, 9.0], "high": [3.0, 9.0]}


def test_too_many_curves_are_left_out_and_counted(tmp_path):
    run = make_run(tmp_path / "run", steps=3, more={f"health/x/{number}": 1.0 for number in range(400)})
    drawn, left_out = charts([read_run(run)])
    assert sum(len(chart["curves"]) for chart in drawn) + left_out == 400 + 6
    assert left_out > 0
    assert drawn[0]["title"] == "Loss"
    assert f"{left_out} more curves are in metrics.jsonl" in report(run).text


def test_a_run_without_a_step_has_a_report(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl"):
        (run / name).unlink()
    assert report(run).data["charts"] == []


def test_a_report_at_the_end_is_one_line_or_the_reason_why_there_is_none(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run")

    def printed() -> str:
        at_end.write_at_end(run)
        return capsys.readouterr().out

    assert printed() == f"report: {run}/report.html\n"
    assert printed() == "", "nothing has happened since"
    (run / "report.html").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(at_end, "LARGEST", 10)
        assert printed().endswith(f"write it with: manta report '{run}'\n" if " " in str(run) else f"manta report {run}\n")
    with monkeypatch.context() as patch:
        patch.setattr(html, "render", lambda *_, **__: {}[f"{HOSTILE}\n"])
        assert printed().startswith("no report: KeyError: ")
        assert printed().count("\n") == 1
    (run / "report.html").mkdir()
    os.utime(run / "report.html", (0, 0))
    assert printed() == "no report: Is a directory\n"
    (run / "config.yaml").write_text("run: 1")
    assert printed().startswith("no report: ")
    (run / "metrics.jsonl").unlink()
    assert printed() == ""


def test_a_run_writes_its_report_when_it_ends(workspace, finished_run):
    page = Page(workspace.directory / finished_run / "report.html")
    assert page.curves()["train/loss"]["x"] == list(range(1, 41))
    assert "40 of 40" in page.text
    assert "done" in page.text


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    refused = manta("report", str(tmp_path))
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    refused = manta("report", str(make_run(tmp_path / "run")), "--output", os.devnull + "/x")
    assert (refused.code, refused.stderr.count("\n")) == (1, 1)
