"""Trackers: each one's own reader finds what a run with a kill and a rollback wrote, and nothing that was rolled back."""

import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from fuzz import manta
from prometheus_client.parser import text_string_to_metric_families
from recorded_run import RecordedRun
from run_process import until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as TensorAccumulator

from manta.launch.config import load
from manta.launch.goodput import Category, goodput
from manta.launch.track import figures, follow, trackers
from manta.launch.track.follow import scalars, track
from manta.launch.track.trackers import open_trackers
from manta.trainer.serve.texts import GeneratedText


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(follow, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(follow, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(figures, "INTERVAL", 0.05)


@pytest.fixture
def run(tmp_path):
    return RecordedRun(tmp_path / "a run")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def in_background(run: RecordedRun, *overrides: str) -> tuple[threading.Thread, threading.Event, dict[str, str]]:
    ended, failed = threading.Event(), dict[str, str]()
    config = load(run.run_dir.config_file, overrides).track
    thread = threading.Thread(target=lambda: failed.update(track(run.run_dir, open_trackers(run.run_dir, config), ended)))
    thread.start()
    return thread, ended, failed


def reader(run: RecordedRun, *, steps: int) -> EventAccumulator | None:
    """Return TensorBoard's own reader, once that many steps are there."""
    found = EventAccumulator(str(run.directory / "tensorboard"))
    if (run.directory / "tensorboard").exists() and "train/loss" in found.Reload().Tags()["scalars"]:
        return found if len(found.Scalars("train/loss")) == steps else None
    return None


def values(found: EventAccumulator, key: str = "train/loss") -> dict[int, float]:
    scalars = found.Scalars(key)
    assert len({value.step for value in scalars}) == len(scalars), "a step is there twice"
    return {value.step: value.value for value in scalars}


def found_in(found: EventAccumulator, key: str) -> tuple[int, float]:
    """Return the last step and value of a tag."""
    last = found.Scalars(key)[-1]
    return last.step, last.value


def assert_complete(run: RecordedRun) -> None:
    found = EventAccumulator(str(run.directory / "tensorboard")).Reload()
    for key in ("train/loss", "eval/loss", "learning_rate"):
        assert values(found, key) == pytest.approx(run.valid(key))


def test_tensorboard_drops_what_was_rolled_back_also_while_it_is_open(run):
    with run.running():
        run.to_the_kill()
        thread, ended, failed = in_background(run)
        viewer = until(lambda: reader(run, steps=9), within=20)
        run.append("metrics.jsonl", "damaged")
        run.to_the_end()
        ended.set()
        thread.join(20)
    assert failed == {}
    assert_complete(run)
    assert values(viewer.Reload()) == pytest.approx(run.valid("train/loss"))
    assert values(viewer, "seconds/step")[12] == 6.0
    spent = goodput(run.events(), run.lines)
    assert spent.share > 0
    assert spent.seconds[Category.RECOMPUTED] > 0
    assert found_in(viewer, "goodput/training") == (12, pytest.approx(spent.share))
    assert found_in(viewer, "goodput_seconds/recomputed_steps") == (12, pytest.approx(spent.seconds[Category.RECOMPUTED]))
    texts = TensorAccumulator(str(run.directory / "tensorboard")).Reload()
    config, events = (texts.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in ("config", "events"))
    assert "learning_rate: 0.0003" in config
    assert "hidden" not in config
    assert "secret" not in events
    assert [row.split(" | ")[2] for row in events.splitlines()[2:]] == [event["event"] for event in run.events()]


def test_a_tracker_that_is_started_again_and_a_resumed_run_continue_in_the_same_directory(run):
    run.to_the_kill()
    assert manta("track", str(run.directory)).code == 0
    viewer = reader(run, steps=9)
    run.to_the_end()
    for _ in range(3):
        done = manta("track", str(run.directory), "--tensorboard")
        assert done.code == 0
        assert_complete(run)
        assert values(viewer.Reload()) == pytest.approx(run.valid("train/loss"))
    assert sorted(file.stat().st_size > 0 for file in (run.directory / "tensorboard").iterdir()) == [False, True]


def test_texts_are_shown_at_their_step_also_those_of_steps_that_were_rolled_back(run):
    texts = [GeneratedText(step=step, seed=seed, prompt="`a`", text=f"a {seed}\n\n* b") for step in (9, 12) for seed in (1, 2)]
    run.to_the_kill()
    run.to_the_end()
    (run.directory / "samples.jsonl").write_bytes(b"damaged\n" + b"".join(text.to_json() + b"\n" for text in texts))
    arguments = ("track", str(run.directory), "--tensorboard", "--prometheus", str(free_port()))
    assert manta(*arguments).code == 0
    found = EventAccumulator(str(run.directory / "tensorboard")).Reload().Tensors("samples")
    assert [event.step for event in found] == [9, 12]
    shown = [b"seed %d, prompt: `'a'`\n\n    a %d\n    \n    * b" % (seed, seed) for seed in (1, 2)]
    assert [list(event.tensor_proto.string_val) for event in found] == [shown, shown]


def test_prometheus_serves_the_newest_line_on_loopback(run):
    port = free_port()
    with run.running():
        run.to_the_kill()
        thread, ended, failed = in_background(run, "track.tensorboard=false", f"track.prometheus={port}")

        def scrape() -> dict[tuple, float]:
            try:
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            except OSError:
                return {}
            samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
            return {(s.name, s.labels["run"], s.labels.get("event")): s.value for s in samples}

        until(lambda: scrape().get(("manta_step", "a run", None)) == 9, within=20)
        time.sleep(2 * figures.INTERVAL)
        listening = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=False).stdout if shutil.which("ss") else ""
        assert f"0.0.0.0:{port}" not in listening
        run.to_the_end()
        until(lambda: scrape().get(("manta_step", "a run", None)) == 12, within=20)
        served = scrape()
        assert served["manta_train_loss", "a run", None] == run.lines[-1]["train/loss"]
        assert served["manta_events_total", "a run", "rank-failed"] == 1
        assert 0 < served["manta_goodput_training", "a run", None] < 1
        assert served["manta_goodput_seconds_failure_detection_and_restart", "a run", None] > 0
        ended.set()
        thread.join(20)
    assert failed == {}
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_a_tracker_that_fails_is_started_again_and_holds_up_no_other(run):
    """Its port is taken at first."""
    with run.running(), socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run.to_the_kill()
        thread, ended, failed = in_background(run, f"track.prometheus={port}")
        until(lambda: reader(run, steps=9), within=20)
        taken.close()

        def answers() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        until(answers, within=20)
        ended.set()
        thread.join(20)
    assert failed == {}


def test_a_tracker_that_still_fails_at_the_end_is_an_error(run):
    run.to_the_kill()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = manta("track", str(run.directory), "--prometheus", str(taken.getsockname()[1]))
    assert done.code == 1
    assert done.stderr == "manta: prometheus: OSError: [Errno 98] Address already in use\n"


def test_a_run_directory_that_goes_away_ends_it(run):
    run.to_the_kill()
    with run.running():
        thread, _, _ = in_background(run)
        until((run.directory / "tensorboard").exists, within=20)
        run.directory.rename(run.directory.with_name("elsewhere"))
        thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--wandb", ""], "track.wandb.project: expected"),
        (["--prometheus", "0"], "track.prometheus: expected"),
        (["--tensorboard"], "The run writes to tensorboard itself"),
        ([], "The run writes to tensorboard itself"),
    ],
)
def test_what_cannot_be_tracked_is_refused_in_one_line(run, arguments, problem):
    run.to_the_kill()
    with run.running():
        refused = manta("track", str(run.directory), *arguments)
    assert (refused.code, len(refused.stderr.splitlines())) == (2, 1)
    assert problem in refused.stderr


def test_a_tracker_without_its_package_is_refused_before_the_run(run, monkeypatch):
    monkeypatch.setattr("manta.launch.track.trackers.find_spec", lambda _: None)
    refused = manta("track", str(run.directory), "--wandb", "p")
    assert refused.code == 2
    assert "pip install 'manta[wandb]'" in refused.stderr


def test_only_measurements_are_tracked():
    line = {
        "step": 3,
        "time": 1.0,
        "data/digest": 5,
        "layout": "data 2",
        "mfu": None,
        "skipped": True,
        "seconds": {"step": 2},
        "loss": 1,
        "huge": 10**400,
    }
    assert scalars(line) == {"skipped": 1.0, "seconds/step": 2.0, "loss": 1.0}


def test_the_process_beside_the_controller_imports_no_torch_and_ends_with_its_standard_input(tmp_path):
    run = RecordedRun(tmp_path / "run")
    run.to_the_kill()
    script = "import sys; from manta.launch.track.__main__ import main; import atexit\n"
    script += f"sys.argv[1:] = [{str(run.directory)!r}]\n"
    script += "atexit.register(lambda: print({'torch', 'ray', 'deepspeed', 'datasets', 'typer'} & set(sys.modules)))\nmain()"
    with run.running():
        process = subprocess.Popen([sys.executable, "-P", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        until(lambda: reader(run, steps=9), within=20)
        started = time.monotonic()
        output, _ = process.communicate(timeout=20)
    assert (process.returncode, output.strip()) == (0, "set()")
    assert time.monotonic() - started < 2
    assert_complete(run)


def test_a_tracker_whose_package_is_missing_is_refused_before_anything_is_written(workspace, monkeypatch):
    monkeypatch.chdir(workspace.directory)
    monkeypatch.setattr(trackers, "find_spec", {}.get)
    refused = manta("train", str(workspace.config_file), "run.dir=untracked", "track.prometheus=9400", seconds=60)
    problem = "track.prometheus: expected the package prometheus_client, got none. Install it: pip install 'manta[prometheus]'"
    assert (refused.code, refused.stderr.splitlines()[-1]) == (2, f"manta: {problem}")
    assert not (workspace.directory / "untracked/config.yaml").exists()
