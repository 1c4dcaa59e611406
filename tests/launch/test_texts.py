"""Texts that a run generates with its newest checkpoint when it is done: in samples.jsonl, in its report, and at its trackers."""

import json
import re
import shutil
import signal
from html import unescape
from pathlib import Path

import psutil
import pytest
from fuzz import manta
from made_run import make_run
from mounts import fill_up
from run_process import RunProcess
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manta.cluster.protocol import ExitCode
from manta.launch.report import at_end
from manta.launch.report.texts import add_texts
from manta.trainer.run_directory import RunDirectory
from manta.trainer.serve import texts
from manta.trainer.serve.texts import GeneratedText, append_texts, read_texts


def shown(report: Path) -> list[str]:
    """Return the texts of a report. A browser ignores the first line break of a <pre>."""
    return [unescape(text) for text in re.findall(r"<pre>\n(.*?)</pre>", report.read_bytes().decode(), re.DOTALL)]


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def copied(workspace, finished_run: str, place: Path) -> Path:
    shutil.copytree(workspace.directory / finished_run, place)
    return place


@pytest.mark.slow
def test_a_run_generates_texts_for_its_report_and_trackers(workspace):
    output = workspace.train("with texts", "train.steps=6", "track.texts=2", "track.tensorboard=true").stdout
    run = workspace.directory / "with texts"
    assert f"texts: {run}/samples.jsonl\n" in output
    generated = lines(run)
    assert [(line["step"], line["seed"], line["prompt"]) for line in generated] == [(6, 1, ""), (6, 2, "")]
    assert generated[0]["text"] != generated[1]["text"]
    assert shown(run / "report.html") == [line["text"] for line in generated]
    (event,) = EventAccumulator(str(run / "tensorboard")).Reload().Tensors("samples")
    assert event.step == 6
    for content, line in zip(event.tensor_proto.string_val, generated, strict=True):
        title, _, *indented = content.decode().split("\n")
        assert title == f"seed {line['seed']}"
        assert "\n".join(text[4:] for text in indented) == line["text"]


def test_a_run_without_the_key_generates_none(workspace, finished_run):
    run = workspace.directory / finished_run
    assert not (run / "samples.jsonl").exists()
    assert '<section id="samples">' not in (run / "report.html").read_text()


@pytest.mark.slow
def test_manta_report_appends_what_is_new(workspace, finished_run, tmp_path):
    run = copied(workspace, finished_run, tmp_path / "run")
    for prompt, count in (("", 2), ("", 2), ("--def", 4)):
        written = manta("report", str(run), "--samples", "2", "--prompt", prompt, seconds=120)
        assert (written.code, written.stderr) == (0, ""), written.output
        assert len(lines(run)) == count  # the same seeds and checkpoint generate the same texts
    assert [line["seed"] for line in lines(run)] == [1, 2, 1, 2]
    assert [line["text"].startswith("--def") for line in lines(run)] == [False, False, True, True]
    assert shown(run / "report.html") == [line["text"] for line in lines(run)]
    again = manta("generate", str(run), "--seed", "2", "--tokens", "160", "--", "--def", seconds=120)
    assert again.stdout.rstrip("\n") == lines(run)[-1]["text"].rstrip("\n")


@pytest.mark.slow
def test_ctrl_c_skips_the_texts_of_a_run_that_is_done(workspace):
    with RunProcess(workspace, "skipped texts", "train.steps=6", "track.texts=20") as run:
        run.event("run-ended")
        run.until(lambda: any("manta.trainer.serve" in line for line in run.command_lines().values()))
        run.process.send_signal(signal.SIGINT)
        code, output = run.end(within=5)
    assert code == ExitCode.DONE
    assert "texts are missing: a stop was requested\n" in output
    assert "texts are missing: a stop was requested" in " ".join((run.directory / "report.html").read_text().split()).lower()


@pytest.mark.slow
def test_a_run_that_is_stopped_generates_none(workspace):
    with RunProcess(workspace, "stopped", "train.steps=5000", "track.texts=2") as run:
        run.steps(1, 5)
        run.process.send_signal(signal.SIGINT)
        code, output = run.end()
    assert code == ExitCode.INTERRUPTED, output
    assert "report: " in output
    assert "text" not in output
    assert not (run.directory / "samples.jsonl").exists()


def generators() -> list[psutil.Process]:
    """Return the processes that generate texts for this one, which may have other children."""
    return [child for child in psutil.Process().children() if "manta.trainer.serve" in child.cmdline()]


def test_too_little_time_is_a_reason(tmp_path):
    assert add_texts(RunDirectory(tmp_path), 1, seconds=0.01) == "it took more than 0.01 s"
    assert generators() == []


def test_a_killed_process_is_a_reason(tmp_path):
    def kill() -> bool:
        for process in generators():
            process.kill()
        return False

    assert add_texts(RunDirectory(tmp_path), 1, is_stopped=kill) == "killed by SIGKILL, perhaps because memory ran out"


def test_no_checkpoint_is_a_reason_and_the_report_shows_it(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    at_end.write_at_end(run, 1)
    _, reason, path = capsys.readouterr().out.splitlines()
    assert reason.startswith("texts are missing: ")
    assert "expected a checkpoint, got none" in reason
    assert path == f"report: {run}/report.html"
    assert "expected a checkpoint, got none" in (run / "report.html").read_text()
    written = manta("report", str(run), "--samples", "1")
    assert (written.code, written.stderr.count("\n")) == (0, 1)
    assert "expected a checkpoint, got none" in written.stderr


def test_a_file_that_cannot_be_read_fails_nothing(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (run / "samples.jsonl").mkdir()
    at_end.write_at_end(run, 1)
    _, reason, report = capsys.readouterr().out.splitlines()
    assert reason == f"texts are missing: {run}/samples.jsonl: not a regular file"
    assert report.startswith(f"no report: {run}/samples.jsonl: expected a regular file, got a directory.")


def test_a_full_disk_is_a_reason(disk):
    fill_up(disk / "filler")
    problem = append_texts(disk / "samples.jsonl", [GeneratedText(step=1, seed=1, prompt="", text="a text")])
    assert problem is not None
    assert "No space left on device" in problem


def test_the_newest_texts_are_read_and_damaged_lines_are_skipped(tmp_path, monkeypatch):
    file = tmp_path / "samples.jsonl"
    assert read_texts(file) == []
    many = [GeneratedText(step=step, seed=1, prompt="\x00\udc80", text="é\U0001f600" * 9) for step in range(30)]
    damaged = b'{"step": -1, "seed": 1, "prompt": "", "text": ""}\n{"step": true, "seed": 1, "prompt": "", "text": ""}\n[]\n{'
    file.write_bytes(damaged)
    assert append_texts(file, many) is None
    with file.open("ab") as stream:
        stream.write(damaged)
    assert read_texts(file) == many[-texts.MOST_TEXTS :]
    size = file.stat().st_size
    append_texts(file, many[-3:])
    assert file.stat().st_size == size - 1  # nothing new; the incomplete line is gone
    monkeypatch.setattr(texts, "MAX_BYTES", 2 * len(many[-1].to_json()) + len(damaged) + 9)
    assert read_texts(file) == many[-2:]
