"""Whole runs, as a user starts them: real Ray, real DeepSpeed, real signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from manta.data.errors import InputError
from manta.trainer.convert.huggingface import export
from manta.trainer.generate import Sampling, write
from manta.trainer.metrics import parse, read_metrics
from manta.trainer.pretrained import load_pretrained
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
    again = case.train(undisturbed)
    assert "already done: step 40 of 40; raise train.steps to go on" in again.stderr


def test_a_rank_killed_in_mid_run_changes_no_loss(case, undisturbed):
    with case.start("train", str(case.file), "run.dir=killed", "checkpoint.every_steps=8", "cluster.keep_warm=true") as running:
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


@pytest.mark.parametrize(("before", "after", "told", "code"), [(2, 1, signal.SIGTERM, 75), (1, 2, signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_with_another_number_of_ranks(case, undisturbed, before, after, told, code):
    run = f"from {before} to {after}"
    with case.start("train", str(case.file), f"run.dir={run}", f"cluster.ranks_per_node={before}") as running:
        wait_for_step(case, run, 3, running)
        running.send_signal(told)
        assert running.wait(60) == code, running.stderr.read()
        assert "is saved; go on with: manta resume '" in running.communicate()[1]
    assert not of_run(case, run)
    stopped = lines(case, run)[-1]["step"]
    assert stopped <= STEPS - 20
    assert json.loads(case.manta("status", run, "--json").stdout)["checkpoint"] == f"step-{stopped:08d}"
    done = case.manta("resume", run, f"cluster.ranks_per_node={after}")
    assert done.returncode == 0, done.stderr
    after_all = lines(case, run)
    assert [line["world_size"] for line in after_all] == [before] * stopped + [after] * (STEPS - stopped)
    assert [line["data/digest"] for line in after_all] == [line["data/digest"] for line in lines(case, undisturbed)]
    assert losses(case, run) == pytest.approx(losses(case, undisturbed), abs=1e-5)


def copy_of(case, run: str, name: str) -> Path:
    """A run of its own, as far as `run` has come."""
    copy = case.home / name
    shutil.copytree(case.home / run, copy)
    return copy


def test_a_rank_alone_and_torchrun_go_on_with_the_same_run(case, undisturbed):
    home = copy_of(case, undisturbed, "by hand")
    shutil.rmtree(home / "checkpoints/step-00000040")
    config = home / "config.yaml"
    alone = [sys.executable, "-P", "-m", "manta.trainer", str(home)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python", *alone]
    for steps, command in ((STEPS, alone), (STEPS + 4, torchrun)):
        config.write_text(config.read_text().replace(f"steps: {STEPS}\n", f"steps: {steps}\n", 1))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=case.home, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert lines(case, "by hand")[-1]["step"] == steps
    told = lines(case, "by hand")
    assert [line["world_size"] for line in told] == [2] * 36 + [1] * 4 + [2] * 4
    assert [line["data/digest"] for line in told[:STEPS]] == [line["data/digest"] for line in lines(case, undisturbed)]


def test_another_config_is_refused_and_the_difference_shown(case, undisturbed):
    before = (case.home / undisturbed / "config.yaml").read_bytes()
    refused = case.train(undisturbed, "optimizer.learning_rate=2e-3", "train.steps=12", code=2)
    assert "optimizer.learning_rate 0.001 -> 0.002" in refused.stderr
    assert "train.steps 40 -> 12" in refused.stderr
    assert (case.home / undisturbed / "config.yaml").read_bytes() == before


def test_a_run_whose_checkpoints_are_all_bad_never_starts_afresh(case, undisturbed):
    home = copy_of(case, undisturbed, "bad")
    for path in (home / "checkpoints").glob("step-*"):
        (path / "manifest.json").write_text("{")
    failed = case.train("bad", "train.steps=44", code=1)
    assert "every checkpoint is bad" in failed.stderr
    assert [event["event"] for event in events(case, "bad")].count("attempt-started") == 2, "another try would meet the same"
    assert lines(case, "bad")[-1]["step"] == STEPS


def test_a_run_survives_a_bad_checkpoint_a_moved_corpus_and_a_second_manta(case, undisturbed):
    home = copy_of(case, undisturbed, "survivor")
    (home / "checkpoints/step-00000040/__0_0.distcp").write_bytes(b"")
    manifest = json.loads((home / "manifest.json").read_text())
    moved = json.loads(json.dumps(manifest["corpus"]).replace("/corpora/", "/elsewhere/"))
    (home / "manifest.json").write_text(json.dumps(manifest | {"corpus": moved}))
    with case.start("train", str(case.file), "run.dir=survivor", "train.steps=2000") as running:
        wait_for_step(case, "survivor", 50, running)
        second = case.train("survivor", "train.steps=2000", code=2)
        assert "another manta is running it" in second.stderr
        assert json.loads(case.manta("status", "survivor", "--json").stdout)["state"] == "running"
        running.stderr.close()  # as when `| tee log` dies of the same Ctrl-C
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
    assert (home / "checkpoints/bad-step-00000040").exists()
    assert [line["attempt"] for line in lines(case, "survivor")][35:37] == [1, 2]
    told = json.loads(case.manta("status", "survivor", "--json").stdout)
    assert told["state"] == "interrupted"
    assert told["checkpoint"] == f"step-{told['step']:08d}"


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
    trained = load_pretrained(RunDirectory(case.home / undisturbed))
    for place in (thesis, thesis / "thesis.tex"):
        with pytest.raises(InputError, match="got something that is no export"):
            export(trained, place, dtype=torch.float32)
    assert (thesis / "thesis.tex").read_text() == "years of work"


def test_an_export_has_equal_logits_in_transformers(case, undisturbed):
    done = case.manta("export", undisturbed)
    assert done.returncode == 0, done.stderr
    script = f"""
import torch, warnings
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from manta.trainer.pretrained import load_pretrained
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
