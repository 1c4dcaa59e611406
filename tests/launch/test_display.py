"""What `manta train` prints: what was loaded before the first step, plain lines in a pipe, whole words on a terminal."""

import json
import os
import pty
import sys
from itertools import pairwise

import pytest
from fuzz import call
from runs import METRICS

from manta.cluster.supervise.event_log import POLL, Event
from manta.data.messages import MessageConsole
from manta.data.prepare.progress import report
from manta.launch.config import load
from manta.launch.inspect.charts import console, grid
from manta.launch.run import display
from manta.launch.run.display import Display
from manta.launch.run.start import step_text
from manta.trainer.dist.layout import Layout
from manta.trainer.run_directory import RunDirectory


@pytest.fixture
def shown(workspace, tmp_path, capsys):
    """A function: events and steps that ranks log between them, or damaged lines -> what is shown on standard output."""

    def show(*happenings: Event | int | bytes, overrides: tuple[str, ...] = ()) -> list[str]:
        home = RunDirectory(tmp_path / "a run")
        home.path.mkdir(exist_ok=True)
        config = load(workspace.config_file, [f"run.dir={json.dumps(str(home.path))}", *overrides])
        home.config_file.write_text(config.to_yaml())

        def events():
            for happening in happenings:
                if isinstance(happening, Event):
                    yield happening
                    continue
                line = happening if isinstance(happening, bytes) else json.dumps({**METRICS, "step": happening}).encode()
                with home.metrics_file.open("ab") as file:
                    file.write(line + b"\n")

        Display(home, config, {}).follow(events())
        return capsys.readouterr().out.splitlines()

    return show


def event(kind: str, attempt: int = 1, **details) -> Event:
    return Event(kind=kind, attempt=attempt, time=0.0, details=details)


def test_a_resumed_run_names_the_checkpoint_before_its_first_step(shown, tmp_path):
    """Its first steps may be logged before the controller knows what the ranks have loaded."""
    lines = shown(event("attempt-started", 2), 25, event(POLL, 2), 26, event("loaded", 2, step=24), 27, event("first-step", 2, step=25))
    assert lines[0] == f"attempt 2: resumed from step 24 ({tmp_path / 'a run'}/checkpoints/step-00000024)"
    assert lines[1].startswith("step 25/40  loss 5.0000")


def test_a_new_run_names_no_step_to_resume_from(shown):
    lines = shown(event("attempt-started"), 1, 2, event(POLL), event("loaded", step=0), 3, event("first-step", step=1))
    assert lines[0].startswith("step 1/40")
    assert len(lines) == 1
    (again,) = shown(event("attempt-started", 2), event("loaded", 2, step=0))
    assert again == "attempt 2: started from step 1: there is no checkpoint yet"


def test_a_run_from_other_weights_names_them(shown):
    assert shown(event("attempt-started"), event("loaded", step=0), overrides=("run.start_from=/other/checkpoints/step-00000008",)) == [
        "attempt 1: started from the weights of /other/checkpoints/step-00000008"
    ]


def test_a_pipe_gets_plain_lines_at_a_bounded_rate_and_the_last_step(shown, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in CI
    lines = shown(event("attempt-started"), event("loaded", step=0), *range(1, 41), event("run-ended", exit_code=0))
    assert [line.split()[:2] for line in lines[:-1]] == [["step", "1/40"], ["step", "40/40"]]
    assert lines[-1].startswith("done: 40 steps")
    assert "ETA" in lines[0]
    assert "ETA" not in lines[-2]
    assert "\x1b" not in "".join(lines)


def test_a_slow_rank_is_reported_with_what_to_do(shown):
    slow = {"rank": 1, "node": "laptop", "ratio": 2.0, "step": 9, "work": 0.4, "median": 0.2}
    (line,) = shown(event("rank-slow", **slow))
    assert "rank 1 on laptop is 2.0x slower than the median rank" in line
    assert line.endswith("all ranks wait for it. Look for other work on that machine (top, nvidia-smi).")


def test_damaged_lines_of_metrics_end_no_display(shown):
    damaged = [b"garbage", b"", b"\0" * 100, b"[1]", b'{"step": "x"}', b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b"\xff"]
    lines = shown(
        event("attempt-started"), event("loaded", step=0), 1, *damaged, event(POLL), *damaged, 40, event("run-ended", exit_code=0)
    )
    assert [line.split()[:2] for line in lines] == [["step", "1/40"], ["step", "40/40"], ["done:", "40"]]


def test_one_step_is_not_called_one_steps(shown, workspace):
    lines = shown(event("attempt-started"), event("loaded", step=0), 1, event("run-ended", exit_code=0), overrides=("train.steps=1",))
    assert lines[-1].startswith("done: 1 step, ")
    config = load(workspace.config_file, ["train.global_batch=1", "train.micro_batch=1"])
    layout = Layout(data=1, micro_batch=1)
    assert step_text(config, layout) == "1 rank x micro batch 1 x accumulation 1 = 1 sequence of 32 tokens per step"


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 40 columns, and a function that returns what was written to it."""
    reader, writer = pty.openpty()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(writer, "w", buffering=1) as stream, os.fdopen(reader, "rb", buffering=0) as output:
        yield stream, lambda: output.read(100_000).decode().replace("\r\n", "\n")


def test_messages_are_wrapped_between_words_on_a_terminal_only(terminal, monkeypatch, tmp_path):
    path = "/a/path/that-is/longer/than/one/line/of/the/terminal"
    message = f"run.dir: expected a directory that can be written, got {path}: Permission denied. Use another directory."
    stream, written = terminal
    MessageConsole(stream).message(message)
    lines = written().splitlines()
    assert " ".join(lines) == message
    assert all(len(line) <= 40 or line == f"{path}:" for line in lines)
    monkeypatch.setattr(sys, "stderr", stream)
    report(message)
    assert written().splitlines() == lines, "preparing a corpus prints in the same way"
    MessageConsole(None).message("to a stream that is closed")
    with (tmp_path / "log").open("w") as file:
        MessageConsole(file).message(f"{message} \udcff")
    assert (tmp_path / "log").read_text() == f"{message} \\udcff\n"


def test_tables_are_wrapped_on_a_terminal_only(terminal, monkeypatch, tmp_path):
    path = "/".join(["a folder"] * 20)
    stream, written = terminal

    def show(stream) -> None:
        monkeypatch.setattr(sys, "stdout", stream)
        table = grid(2)
        table.add_row("run", path)
        console().print(table)

    show(stream)
    lines = written().splitlines()
    assert len(lines) > 5
    assert "".join(lines).replace(" ", "") == f"run{path}".replace(" ", "")
    with (tmp_path / "log").open("w") as file:
        show(file)
    assert (tmp_path / "log").read_text().strip() == f"run  {path}"


def test_a_run_that_starts_slowly_says_what_it_waits_for(shown, monkeypatch):
    monkeypatch.setattr(display, "SILENCE", 0.0)
    monkeypatch.setattr(display, "SHORT_WAIT", 0.0)
    loading = event(POLL, ranks=[{"rank": 0, "step": 0, "phase": "step"}, {"rank": 1, "step": 0, "phase": "load"}])
    lines = shown(event(POLL, 0, ranks=[], waiting_for="Ray"), loading, event("first-step", step=1), loading)
    assert lines == ["waiting for Ray, 0 s", "waiting for the ranks to load, 0 s"]


def test_a_short_wait_is_not_shown(shown, terminal, monkeypatch):
    """Each phase of a start takes a second on a laptop: only a longer one is news."""
    clock = iter(second / 2 for second in range(1000))
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    phases = [event(POLL, ranks=[{"rank": 0, "step": 0, "phase": phase}]) for phase in ("start", "load", "compile") for _ in range(4)]
    assert shown(*phases) == []
    stream, written = terminal
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "100")
    shown(*phases)
    assert "waiting" not in (text := written())
    assert "starting" in text


def test_the_wait_is_counted_and_reported_every_few_seconds(shown, monkeypatch):
    clock = iter(float(second) for second in range(1000))
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    lines = shown(*[event(POLL, 0, ranks=[], waiting_for="nodes")] * 200)
    seconds = [int(line.split()[-2]) for line in lines]
    assert lines[0].startswith("waiting for nodes, ")
    assert {after - before for before, after in pairwise(seconds) if after < 60} == {5}
    assert {after - before for before, after in pairwise(seconds) if before > 60} == {30}


CASE = """
run: {dir: run}
data: {sources: [plain.jsonl], sequence_length: 32, validation: 0.1, directory: corpora}
tokenizer: {vocabulary: 300}
model: {family: llama, layers: 1, width: 32, heads: 2}
schedule: {warmup_steps: 1}
train: {steps: 60, global_batch: 4, micro_batch: 2}
checkpoint: {every_steps: 20}
cluster: {hot_standby: false, ranks_per_node: 1}
precision: fp32
"""


@pytest.mark.slow
def test_a_run_with_fast_steps_names_what_it_resumes_from(workspace):
    """It has made steps before the controller looks: a new run must not take one for a checkpoint's, nor a resumed run a later one."""
    (workspace.directory / "fast.yaml").write_text(CASE)
    texts = [f"{number} green river stone light small house with the wave and the bird" for number in range(400)]
    (workspace.directory / "plain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for run in ("fast 1", "fast 2"):
        new = workspace.manta("train", "fast.yaml", f"run.dir={run}")
        assert new.returncode == 0, new.stderr
        assert "resumed from" not in new.stdout
        assert "went on" not in new.stdout
        home = workspace.directory / run
        again = workspace.manta("resume", run, "train.steps=120").stdout.splitlines()
        resumed = again.index(f"attempt 2: resumed from step 60 ({home}/checkpoints/step-00000060)")
        assert not [line for line in again[:resumed] if line.startswith("step ")]
        assert again[resumed + 1].startswith("step ")


TERMINAL_OBEYS = "\x1b]0;title\x07\x1b[2J\x9b31m"


def test_what_another_user_s_run_says_is_not_obeyed_by_the_terminal(shown, capsys):
    """`manta attach` and `manta status` read runs of any user."""
    (line,) = shown(event("waiting", message=TERMINAL_OBEYS + "long " * 1000))
    assert line.startswith("waiting: \\x1b]0;title\\x07\\x1b[2J\\x9b31m")
    assert len(line) < 2000
    table = grid(2)
    table.add_row("state", TERMINAL_OBEYS)
    console().print(table)
    assert not set("\x1b\x07\x9b") & set(capsys.readouterr().out)


def test_a_name_in_brackets_is_shown_as_it_is_beside_a_bar():
    code = "from manta.data.prepare.progress import progress\nfor total in (None, 3):\n  with progress('prepare a[/b].txt', total): pass"
    output: list[bytes] = []
    assert pty.spawn([sys.executable, "-c", code], lambda file: output.append(os.read(file, 1024)) or output[-1]) == 0
    assert b"prepare a[/b].txt" in b"".join(output)


def test_a_terminal_of_unknown_width_is_no_error(monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    output: list[bytes] = []
    command = [sys.executable, "-P", "-m", "manta.launch", "status", "nothing here"]
    code = pty.spawn(command, lambda file: output.append(os.read(file, 1024)) or output[-1])
    assert os.waitstatus_to_exitcode(code) == 2
    assert b"".join(output).startswith(b"manta: nothing here: expected a run directory, got no events.jsonl.")


def test_a_lack_of_memory_is_one_line():
    outcome = call(lambda: bytearray(1 << 60))
    assert (outcome.code, outcome.stderr) == (
        1,
        "manta: out of memory. Raise the limit of this process (ulimit -v), or use a machine with more memory.\n",
    )
