"""Whole runs, as a user starts them: real Ray, real DeepSpeed, real signals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from runs import assert_same_losses, copy_run, copy_without_newest_checkpoint, events, lines, losses, processes_of, resume, wait_for_step

from manta.data.errors import InputError
from manta.trainer.convert.huggingface.export import export
from manta.trainer.metrics import format_line, parse_lines
from manta.trainer.pretrained.load import load_pretrained
from manta.trainer.run_directory import RunDirectory
from manta.trainer.serve.generate import Sampling, generate_text

STEPS = 40


def test_a_run_writes_the_files_of_its_directory(workspace, finished_run):
    home = workspace.directory / finished_run
    for name in (
        "config.yaml",
        "manifest.json",
        "tokenizer.json",
        "events.jsonl",
        "metrics.jsonl",
        "checkpoints/latest",
        "logs/attempt-0001/rank-0001.log",
    ):
        assert (home / name).exists(), name
    logs = "".join(log.read_text() for log in home.glob("logs/attempt-0001/*.log")).lower()
    assert "joined 2 ranks" in logs
    assert not [word for word in ("deprecat", "warning", "traceback") if word in logs]
    keys = "step tokens time train/loss learning_rate grad_norm tokens_per_second mfu data_wait step_time memory/peak world_size attempt"
    assert set(keys.split()) <= set(lines(workspace, finished_run)[0])
    assert [line["step"] for line in lines(workspace, finished_run) if "eval/loss" in line] == [20, STEPS]
    assert losses(workspace, finished_run)[-1] < losses(workspace, finished_run)[0] - 0.3
    assert [event["event"] for event in events(workspace, finished_run)][-1] == "run-ended"
    again = workspace.train(finished_run)
    assert "already done: step 40 of 40; raise train.steps to continue" in again.stderr


DELETED = ("config.yaml", "manifest.json", "tokenizer.json", "directory-token")


def test_a_killed_rank_changes_no_loss(workspace, finished_run):
    with workspace.start(
        "train", str(workspace.config_file), "run.dir=killed", "checkpoint.every_steps=8", "cluster.hot_standby=true"
    ) as running:
        wait_for_step(workspace, "killed", 10, running)
        for name in DELETED:  # each attempt reads them
            (workspace.directory / "killed" / name).unlink()
        victim = next(e for e in events(workspace, "killed") if e["event"] == "attempt-started")["ranks"][1]["pid"]
        os.kill(victim, signal.SIGKILL)
        shown, messages = running.communicate(timeout=90)
        assert (running.returncode, messages) == (0, ""), "everything about a run that succeeds is on standard output: `| tee log`"
    assert all((workspace.directory / "killed" / name).exists() for name in DELETED), "they are written again"
    failed = [event for event in events(workspace, "killed") if event["event"] == "rank-failed"]
    assert [event["rank"] for event in failed] == [1]
    assert losses(workspace, "killed") == losses(workspace, finished_run)  # bitwise
    assert [line["data/digest"] for line in lines(workspace, "killed")] == [line["data/digest"] for line in lines(workspace, finished_run)]
    written = parse_lines((workspace.directory / "killed/metrics.jsonl").read_text())
    assert len(written) > STEPS, "no step was recomputed: the kill was too late to prove anything"
    recomputed = next(after["step"] for before, after in pairwise(written) if after["step"] <= before["step"])
    assert [event["step"] for event in events(workspace, "killed") if event["event"] == "first-step"] == [1, recomputed]
    checkpoint = f"{workspace.directory}/killed/checkpoints/step-{recomputed - 1:08d}"
    assert re.findall(r"attempt (\d): resumed from step (\d+) \((.*)\)", shown) == [("2", str(recomputed - 1), checkpoint)]
    goodput = json.loads(workspace.manta("goodput", "killed", "--json").stdout)
    times = [event["time"] for event in events(workspace, "killed")]
    assert sum(goodput["seconds"].values()) == pytest.approx(goodput["total"], abs=0.02) == pytest.approx(times[-1] - times[0], abs=0.02)
    assert min(goodput["seconds"][name] for name in ("training", "recomputed steps", "failure detection and restart")) > 0.05
    assert goodput["seconds"]["stopped between attempts"] == 0


@pytest.mark.slow
def test_a_run_whose_files_are_deleted_ends_well(workspace):
    with workspace.start("train", str(workspace.config_file), "run.dir=deleted") as running:
        wait_for_step(workspace, "deleted", 10, running)
        for name in (*DELETED, "metrics.jsonl", "events.jsonl"):
            (workspace.directory / "deleted" / name).unlink()
        assert running.communicate(timeout=90)[1] == ""
    assert running.returncode == 0
    for command in (("status", "deleted", "--exit-code"), ("attach", "deleted"), ("checkpoint", "verify", "deleted")):
        done = workspace.manta(*command)
        assert done.returncode == 0, done.stderr
    assert "already done: step 40 of 40" in workspace.train("deleted").stderr


FROM_ONE_TO_TWO = pytest.param(1, 2, signal.SIGINT, 130, marks=pytest.mark.slow)


@pytest.mark.parametrize(("before", "after", "stop_signal", "code"), [(2, 1, signal.SIGTERM, 75), FROM_ONE_TO_TWO])
def test_a_stopped_run_resumes_on_another_number_of_ranks(workspace, finished_run, before, after, stop_signal, code):
    run = f"from {before} to {after}"
    with workspace.start("train", str(workspace.config_file), f"run.dir={run}", f"cluster.ranks_per_node={before}") as running:
        wait_for_step(workspace, run, 3, running)
        running.send_signal(stop_signal)
        assert running.wait(60) == code, running.stderr.read()
        assert "is saved; resume with: manta resume '" in running.communicate()[0]
    assert not processes_of(workspace, run)
    stopped = lines(workspace, run)[-1]["step"]
    assert stopped <= STEPS - 4, "too few steps are left to resume"
    assert json.loads(workspace.manta("status", run, "--json").stdout)["checkpoint"] == f"step-{stopped:08d}"
    done = workspace.manta("resume", run, f"cluster.ranks_per_node={after}")
    assert done.returncode == 0, done.stderr
    after_all = lines(workspace, run)
    assert [line["world_size"] for line in after_all] == [before] * stopped + [after] * (STEPS - stopped)
    assert [line["data/digest"] for line in after_all] == [line["data/digest"] for line in lines(workspace, finished_run)]
    assert losses(workspace, run) == pytest.approx(losses(workspace, finished_run), abs=1e-5)


@pytest.mark.slow
def test_a_single_rank_and_torchrun_resume_a_run(workspace, finished_run):
    home = copy_run(workspace, finished_run, "by hand")
    shutil.rmtree(home / "checkpoints/step-00000040")
    config = home / "config.yaml"
    alone = [sys.executable, "-P", "-m", "manta.trainer", str(home)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python", *alone]
    for steps, command in ((STEPS, alone), (STEPS + 4, torchrun)):
        config.write_text(config.read_text().replace(f"steps: {STEPS}\n", f"steps: {steps}\n", 1))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=workspace.directory, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert lines(workspace, "by hand")[-1]["step"] == steps
    output = lines(workspace, "by hand")
    assert [line["world_size"] for line in output] == [2] * 36 + [1] * 4 + [2] * 4
    assert [line["data/digest"] for line in output[:STEPS]] == [line["data/digest"] for line in lines(workspace, finished_run)]


@pytest.mark.slow
def test_a_run_resumes_under_tensor_parallelism(workspace, finished_run):
    again = resume(workspace, copy_without_newest_checkpoint(workspace, finished_run, "cut"), "parallel.tensor=2")
    assert [line["step"] for line in again] == [37, 38, 39, 40]
    assert_same_losses(again, lines(workspace, finished_run))


@pytest.mark.slow
def test_a_mixture_of_experts_resumes_on_one_rank_instead_of_two(workspace):
    experts = "model.experts={experts: 4, top_k: 2, width: 32, balance: bias, bias_update_speed: 0.01}"
    uneven = "evaluate.samples=9"  # by fours over two ranks: at last one of them has one, the other none
    workspace.train("mixture", experts, uneven, "parallel.expert=2", "parallel.zero=3", "train.steps=12", "evaluate.every_steps=6")
    before = lines(workspace, "mixture")
    assert [line["step"] for line in before if "eval/loss" in line] == [6, 12]
    assert all(sum(line["load/blocks.0.mlp.router"]) == pytest.approx(1, abs=1e-3) for line in before)
    again = resume(
        workspace, copy_without_newest_checkpoint(workspace, "mixture", "mixture on one"), "parallel.expert=1", "cluster.ranks_per_node=1"
    )
    assert [line["step"] for line in again] == list(range(7, 13))
    assert_same_losses(again, before)
    assert [line["load/blocks.1.mlp.router"] for line in again] == [line["load/blocks.1.mlp.router"] for line in before[6:]]


@pytest.mark.slow
def test_a_run_stopped_twice_resumes_under_another_layout_each_time(workspace, finished_run):
    legs = [["parallel.tensor=2"], ["parallel.tensor=1", "parallel.zero=3"], ["parallel.zero=1", "cluster.ranks_per_node=1"]]
    run = "wandering"
    stopped = 0
    for number, leg in enumerate(legs):
        arguments = ["resume", run] if number else ["train", str(workspace.config_file), f"run.dir={run}"]
        with workspace.start(*arguments, *leg) as running:
            if leg is not legs[-1]:
                wait_for_step(workspace, run, stopped + 4, running)
                running.send_signal(signal.SIGTERM)
            assert running.wait(90) == (0 if leg is legs[-1] else 75), running.communicate()[1]
            running.communicate()
        assert lines(workspace, run)[-1]["step"] > stopped
        stopped = lines(workspace, run)[-1]["step"]
    assert [line["attempt"] for line in lines(workspace, run)].count(3) > 1, "the last leg came too late to prove anything"
    assert [line["step"] for line in lines(workspace, run)] == list(range(1, STEPS + 1))
    assert_same_losses(lines(workspace, run), lines(workspace, finished_run))


@pytest.fixture(scope="module")
def uneven(workspace, finished_run) -> list[dict]:
    """The last steps on one rank, each evaluated on a number of samples that micro batches do not divide."""
    return resume(workspace, copy_without_newest_checkpoint(workspace, finished_run, "uneven"), *UNEVEN, "cluster.ranks_per_node=1")


UNEVEN = ("evaluate.samples=9", "evaluate.every_steps=1")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["zero=3"], ["sequence=2", "zero=3"], ["zero=2", "offload=true"], ["tensor=2", "zero=0"]], ids=" ".join)
def test_evaluation_does_not_depend_on_the_samples_per_rank(workspace, finished_run, uneven, layout):
    run = copy_without_newest_checkpoint(workspace, finished_run, f"uneven {' '.join(layout)}")
    again = resume(workspace, run, *UNEVEN, *(f"parallel.{part}" for part in layout))
    assert [line["step"] for line in again if "eval/loss" in line] == [37, 38, 39, 40]
    assert_same_losses(again, uneven)


@pytest.mark.slow
def test_fp16_skips_steps_with_overflow_and_resumes_with_its_loss_scale(workspace, finished_run):
    # A z-loss of hundreds: its gradients times the first loss scale overflow fp16.
    done = workspace.train("fp16", "precision=fp16", "model.z_loss=10", "train.steps=20", "schedule.shape=constant")
    output = lines(workspace, "fp16")
    skipped = [line["skipped"] for line in output]
    assert skipped[0]
    assert 1 < sum(skipped) < 10
    assert [line["grad_norm"] is None for line in output] == skipped
    scales = [line["loss_scale"] for line in output]
    assert scales[0] == 2**16, "the first time it is kept"
    assert scales[1:] == [before / 2 if skip else before for before, skip in zip(scales, skipped[1:], strict=False)]
    assert done.stdout.count("gradient overflow, step skipped") == sum(skipped)
    assert losses(workspace, "fp16")[-1] < losses(workspace, "fp16")[0] - 0.1
    assert [line["data/digest"] for line in output] == [line["data/digest"] for line in lines(workspace, finished_run)][:20]
    again = resume(workspace, "fp16", "train.steps=24", "parallel.zero=3")
    assert again[0]["loss_scale"] == scales[-1] / (1 + again[0]["skipped"])


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_gradients_that_overflow_at_every_loss_scale_end_the_run_in_a_line(workspace, zero):
    run, huge = f"fp16 storm {zero}", ("precision=fp16", "model.z_loss=1e30", "train.steps=60", "evaluate.samples=1")
    done = workspace.train(run, *huge, f"parallel.zero={zero}", code=1)
    step = len(lines(workspace, run)) + 1
    assert 16 < step < 20, "the scale falls from 2^16 to 1"
    problem = f"step {step}: expected finite numbers, got gradients that overflow fp16 at loss scale 1, the smallest."
    remedy = "Use precision=bf16, or lower optimizer.learning_rate or lengthen the warmup, in a new run."
    assert f"{problem} {remedy}" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "Traceback" not in (workspace.directory / run / "logs/attempt-0001/rank-0000.log").read_text()
    assert [event["attempt"] for event in events(workspace, run) if event["event"] == "rank-failed"] == [1], "no second try"


def test_another_config_is_refused_with_its_differences(workspace, finished_run):
    before = (workspace.directory / finished_run / "config.yaml").read_bytes()
    refused = workspace.train(finished_run, "optimizer.learning_rate=2e-3", "train.steps=12", code=2)
    assert "optimizer.learning_rate 0.001 -> 0.002" in refused.stderr
    assert "train.steps 40 -> 12" in refused.stderr
    assert (workspace.directory / finished_run / "config.yaml").read_bytes() == before


@pytest.mark.slow
def test_a_run_with_only_bad_checkpoints_does_not_start_from_scratch(workspace, finished_run):
    home = copy_run(workspace, finished_run, "bad")
    for path in (home / "checkpoints").glob("step-*"):
        (path / "manifest.json").write_text("{")
    failed = workspace.train("bad", "train.steps=44", code=1)
    assert "every checkpoint is bad" in failed.stderr
    assert f"{home}/logs/attempt-0002/rank-000" in failed.stderr.splitlines()[-1]
    assert [event["event"] for event in events(workspace, "bad")].count("attempt-started") == 2, (
        "another attempt would fail in the same way"
    )
    assert lines(workspace, "bad")[-1]["step"] == STEPS


def test_a_run_survives_a_bad_checkpoint_a_moved_corpus_and_a_second_manta(workspace, finished_run):
    home = copy_run(workspace, finished_run, "survivor")
    (home / "checkpoints/step-00000040/rank-0000.safetensors").write_bytes(b"")
    manifest = json.loads((home / "manifest.json").read_text())
    moved = json.loads(json.dumps(manifest["corpus"]).replace("/corpora/", "/elsewhere/"))
    (home / "manifest.json").write_text(json.dumps(manifest | {"corpus": moved}))
    with workspace.start("train", str(workspace.config_file), "run.dir=survivor", "train.steps=2000") as running:
        wait_for_step(workspace, "survivor", 50, running)
        second = workspace.train("survivor", "train.steps=2000", code=2)
        assert "another manta is running" in second.stderr
        assert json.loads(workspace.manta("status", "survivor", "--json").stdout)["state"] == "running"
        running.stderr.close()  # as when `2>&1 | tee log` dies of the same Ctrl-C
        running.stdout.close()
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
    assert (home / "checkpoints/bad-step-00000040").exists()
    assert [line["attempt"] for line in lines(workspace, "survivor")][35:37] == [1, 2]
    output = json.loads(workspace.manta("status", "survivor", "--json").stdout)
    assert output["state"] == "interrupted"
    assert output["checkpoint"] == f"step-{output['step']:08d}"


def test_status_prints_a_table(workspace, finished_run):
    output = workspace.manta("status", finished_run, COLUMNS="40").stdout
    assert len(output.splitlines()) == 12, "a row is one line in a pipe"
    assert "40 of 40" in output
    assert "done" in output
    assert "data 2, ZeRO-1" in output
    # A changed layout is not shown before a step has used it.
    changed = copy_run(workspace, finished_run, "changed") / "config.yaml"
    changed.write_text(changed.read_text().replace("tensor: 1", "tensor: 2"))
    assert "data 2, ZeRO-1" in workspace.manta("status", "changed").stdout
    home = workspace.directory / "killed run"
    home.mkdir()
    shutil.copyfile(workspace.directory / finished_run / "config.yaml", home / "config.yaml")
    (home / "events.jsonl").write_text(json.dumps({"event": "run-started", "attempt": 0, "time": 0.0}) + "\n")
    output = workspace.manta("status", "killed run").stdout
    assert "0 of 40" in output
    assert "killed; resume with: manta resume" in output
    assert "tokens/s" not in output


def test_generate_is_deterministic_for_a_seed(workspace, finished_run):
    written = workspace.manta("generate", finished_run, "import ", "--tokens", "20", "--seed", "3")
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("import ")
    here = generate_text(RunDirectory(workspace.directory / finished_run), "import ", count=20, sampling=Sampling(seed=3))
    assert "".join(here) + "\n" == written.stdout
    assert workspace.manta("generate", finished_run, "--top-p", "2").returncode == 2


def test_an_export_overwrites_nothing_else(workspace, finished_run):
    thesis = workspace.directory / "thesis"
    thesis.mkdir()
    for name in ("config.json", "thesis.tex"):
        (thesis / name).write_text("years of work")
    trained = load_pretrained(RunDirectory(workspace.directory / finished_run))
    theirs = workspace.directory / "theirs"
    theirs.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"):
        (theirs / name).write_text("what transformers writes")
    for place in (thesis, thesis / "thesis.tex", theirs):
        with pytest.raises(InputError, match="expected a new directory, or an export of this run, got other files"):
            export(trained, place, dtype=torch.float32)
    assert (thesis / "thesis.tex").read_text() == "years of work"
    assert (theirs / "model.safetensors").read_text() == "what transformers writes"
    export(trained, workspace.directory / "again", dtype=torch.float32)
    export(trained, workspace.directory / "again", dtype=torch.float32)


@pytest.mark.slow
def test_an_export_has_equal_logits_in_transformers(workspace, finished_run):
    done = workspace.manta("export", finished_run)
    assert done.returncode == 0, done.stderr
    script = f"""
import torch, warnings
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from manta.trainer.pretrained.load import load_pretrained
from manta.trainer.run_directory import RunDirectory
ours = load_pretrained(RunDirectory(Path({str(workspace.directory / finished_run)!r})))
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
    output = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=workspace.directory, timeout=120, check=False
    )
    assert output.returncode == 0, output.stderr
    assert float(output.stdout) <= 1e-5


def test_auxiliary_terms_are_not_part_of_the_printed_loss():
    terms = {"train/masked_language": 5.0, "train/next_sentence": 0.5}
    output = format_line({"train/loss": 5.5, **terms, "train/z_loss": 3.0, "tokens_per_second": 9.0, "skipped": False})
    assert output == "loss 5.5000 (masked language 5.0000, next sentence 0.5000)  9 tokens/s"


@pytest.mark.slow
def test_samples_that_are_not_read_yet_may_be_skipped(workspace, finished_run):
    shutil.copytree(workspace.directory / finished_run, workspace.directory / "skipping")
    more = ("run.dir=skipping", f"train.steps={STEPS + 2}")
    refused = workspace.manta("train", str(workspace.config_file), *more, "data.skip=[[10, 20]]")
    assert refused.returncode == 2
    assert re.search(r"data\.skip \[\] -> \[\[10, 20\]\] \(may change from sample \d+ on\)", refused.stderr)
    reached = int(re.search(r"from sample (\d+) on", refused.stderr)[1])
    assert workspace.manta("train", str(workspace.config_file), *more, f"data.skip=[[{reached + 1}, {reached + 100}]]").returncode == 0
    assert [line["step"] for line in lines(workspace, "skipping")][-1] == STEPS + 2


@pytest.mark.slow
def test_a_run_without_steps_accepts_another_corpus(workspace, finished_run):
    home = workspace.directory / "unstarted"
    home.mkdir()
    for name in ("config.yaml", "manifest.json", "tokenizer.json"):
        shutil.copy(workspace.directory / finished_run / name, home)
    before = json.loads((home / "manifest.json").read_text())["corpus"]
    assert workspace.manta("train", str(workspace.config_file), "run.dir=unstarted", "data.validation=0.2", "train.steps=1").returncode == 0
    assert json.loads((home / "manifest.json").read_text())["corpus"]["corpora"] != before["corpora"]
