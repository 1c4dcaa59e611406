"""Whole runs, as a user starts them: real Ray, real DeepSpeed, real signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import MANTA

from manta.trainer.generate import Sampling, write
from manta.trainer.metrics import parse, read_metrics
from manta.trainer.rundir import RunDirectory

STEPS = 40


def lines(case, run: str) -> list[dict]:
    return read_metrics(case.home / run / "metrics.jsonl")


def events(case, run: str) -> list[dict]:
    file = case.home / run / "events.jsonl"
    return [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []


def wait_for_step(case, run: str, step: int, process: subprocess.Popen, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if any(line["step"] >= step for line in lines(case, run)):
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"step {step} never came: {process.communicate()[1]}")


def losses(case, run: str) -> list[float]:
    return [line["train/loss"] for line in lines(case, run)]


def of_run(case, run: str) -> list[psutil.Process]:
    """Ranks and spares of a run."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(case.home / run) in (p.info["cmdline"] or [])]


@pytest.fixture(scope="module")
def undisturbed(case) -> str:
    case.train("undisturbed")
    return "undisturbed"


def test_a_run_leaves_what_its_directory_promises(case, undisturbed):
    home = case.home / undisturbed
    for name in ("config.yaml", "manifest.json", "events.jsonl", "metrics.jsonl", "checkpoints/latest", "logs/attempt-0001/rank-0001.log"):
        assert (home / name).exists(), name
    keys = "step tokens time train/loss learning_rate grad_norm tokens_per_second mfu data_wait step_time memory/peak world_size attempt"
    assert set(keys.split()) <= set(lines(case, undisturbed)[0])
    assert [line["step"] for line in lines(case, undisturbed) if "eval/loss" in line] == [20, STEPS]
    assert losses(case, undisturbed)[-1] < losses(case, undisturbed)[0] - 0.3
    assert [event["event"] for event in events(case, undisturbed)][-1] == "run-ended"


def test_a_rank_killed_in_mid_run_changes_no_loss(case, undisturbed):
    with case.start("train", str(case.file), "run.dir=killed", "checkpoint.every_steps=8") as running:
        wait_for_step(case, "killed", 10, running)
        victim = next(e for e in events(case, "killed") if e["event"] == "attempt-started")["ranks"][1]["pid"]
        os.kill(victim, signal.SIGKILL)
        assert running.wait(90) == 0, running.stderr.read()
        running.communicate()
    failed = [event for event in events(case, "killed") if event["event"] == "rank-failed"]
    assert [event["rank"] for event in failed] == [1]
    assert losses(case, "killed") == losses(case, undisturbed)  # bit by bit
    assert [line["data/digest"] for line in lines(case, "killed")] == [line["data/digest"] for line in lines(case, undisturbed)]
    written = parse((case.home / "killed/metrics.jsonl").read_text())
    assert len(written) > STEPS, "no step was done twice: the kill came too late to prove anything"


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_stopped_run_goes_on_with_another_number_of_ranks(case, undisturbed, before, after):
    run = f"from {before} to {after}"
    with case.start("train", str(case.file), f"run.dir={run}", f"cluster.ranks_per_node={before}") as running:
        wait_for_step(case, run, 3, running)
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 75, running.stderr.read()
        running.communicate()
    stopped = lines(case, run)[-1]["step"]
    assert stopped <= STEPS - 20
    done = case.manta("resume", run, f"cluster.ranks_per_node={after}")
    assert done.returncode == 0, done.stderr
    told = lines(case, run)
    assert [line["world_size"] for line in told] == [before] * stopped + [after] * (STEPS - stopped)
    assert [line["data/digest"] for line in told] == [line["data/digest"] for line in lines(case, undisturbed)]
    assert losses(case, run) == pytest.approx(losses(case, undisturbed), abs=1e-5)


def test_a_rank_alone_and_torchrun_go_on_with_the_same_run(case, undisturbed):
    case.train("by hand", "train.steps=6", "schedule.shape=constant")
    home = case.home / "by hand"
    config = home / "config.yaml"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for steps, command in (
        (9, [sys.executable, "-P", "-m", "manta.trainer", str(home)]),
        (
            12,
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node=2",
                "--no-python",
                sys.executable,
                "-P",
                "-m",
                "manta.trainer",
                str(home),
            ],
        ),
    ):
        config.write_text(config.read_text().replace(f"steps: {steps - 3}\n", f"steps: {steps}\n", 1))
        done = subprocess.run(command, cwd=case.home, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert lines(case, "by hand")[-1]["step"] == steps
    told = lines(case, "by hand")
    assert [line["world_size"] for line in told] == [2] * 6 + [1] * 3 + [2] * 3
    assert [line["data/digest"] for line in told] == [line["data/digest"] for line in lines(case, undisturbed)[:12]]


def test_a_second_manta_in_the_same_directory_is_refused(case):
    with case.start("train", str(case.file), "run.dir=twice", "train.steps=2000") as running:
        wait_for_step(case, "twice", 1, running)
        second = case.train("twice", "train.steps=2000", code=2)
        assert "another manta is running it" in second.stderr
        assert json.loads(case.manta("status", "twice", "--json").stdout)["state"] == "running"
        running.send_signal(signal.SIGINT)  # Ctrl-C
        assert running.wait(60) == 130
        running.communicate()
    time.sleep(1)
    assert not of_run(case, "twice")
    told = json.loads(case.manta("status", "twice", "--json").stdout)
    assert told["state"] == "interrupted"
    assert told["checkpoint"] == f"step-{told['step']:08d}"


def test_another_config_is_refused_and_the_difference_shown(case, undisturbed):
    before = (case.home / undisturbed / "config.yaml").read_bytes()
    refused = case.train(undisturbed, "optimizer.learning_rate=2e-3", "train.steps=12", code=2)
    assert "optimizer.learning_rate 0.001 -> 0.002" in refused.stderr
    assert "train.steps 40 -> 12" in refused.stderr
    assert (case.home / undisturbed / "config.yaml").read_bytes() == before


def test_a_run_whose_checkpoints_are_all_bad_never_starts_afresh(case, undisturbed):
    shutil.copytree(case.home / undisturbed, case.home / "bad")
    for path in (case.home / "bad/checkpoints").glob("step-*"):
        (path / "manifest.json").write_text("{")
    failed = case.train("bad", "train.steps=44", code=1)
    assert "every checkpoint is bad" in failed.stderr
    assert [event["event"] for event in events(case, "bad")].count("attempt-started") == 2, "another try would meet the same"
    assert lines(case, "bad")[-1]["step"] == STEPS


def test_status_for_people(case, undisturbed):
    told = case.manta("status", undisturbed).stdout
    assert "40 of 40" in told
    assert "done" in told


def test_generate_writes_the_same_text_for_the_same_seed(case, undisturbed):
    written = case.manta("generate", undisturbed, "import ", "--tokens", "20", "--seed", "3")
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("import ")
    here = write(RunDirectory(case.home / undisturbed), "import ", count=20, sampling=Sampling(seed=3))
    assert "".join(here) + "\n" == written.stdout
    assert case.manta("generate", undisturbed, "--top-p", "2").returncode == 2


def test_an_export_overwrites_nothing_else(case, undisturbed):
    thesis = case.home / "thesis"
    thesis.mkdir()
    for name in ("config.json", "thesis.tex"):
        (thesis / name).write_text("years of work")
    done = case.manta("export", undisturbed, "--output", "thesis")
    assert done.returncode == 2
    assert "got something that is no export" in done.stderr
    assert (thesis / "thesis.tex").read_text() == "years of work"


def test_a_run_outlives_its_listener_and_moves_its_corpus(case):
    shutil.copytree(case.home / "corpora", case.home / "moved")
    case.train("moved run", "train.steps=4", "data.directory=moved")
    shutil.rmtree(case.home / "moved")
    reading, writing = os.pipe()
    with subprocess.Popen(
        [MANTA, "resume", "moved run", "train.steps=6", "data.directory=corpora"], cwd=case.home, stderr=writing
    ) as running:
        os.close(writing)
        os.close(reading)  # as when `| tee log` dies of the same Ctrl-C
        assert running.wait(60) == 0
    assert lines(case, "moved run")[-1]["step"] == 6


def test_an_export_has_equal_logits_in_transformers(case, undisturbed):
    done = case.manta("export", undisturbed)
    assert done.returncode == 0, done.stderr
    script = f"""
import torch, warnings
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from manta.trainer.pretrained import load_pretrained
from manta.trainer.rundir import RunDirectory
ours = load_pretrained(RunDirectory(Path({str(case.home / undisturbed)!r})))
theirs = AutoModelForCausalLM.from_pretrained({done.stdout.strip()!r}, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained({done.stdout.strip()!r})
text = "class Error(Exception):\\n    pass"
ids = tokenizer(text)["input_ids"]
assert ids == ours.tokenizer.encode([text])[0].tolist()
assert tokenizer.decode(ids) == text
tokens = torch.tensor([ids])
with torch.no_grad():
    a, b = ours.model.logits(tokens), theirs(tokens).logits
print(float((a - b).abs().max()))
"""
    told = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=case.home, timeout=120, check=False)
    assert told.returncode == 0, told.stderr
    assert float(told.stdout) <= 1e-5
