"""The `manta data` commands, on a corpus of two sources that a run was trained on. The run's logs must agree with them."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from object_store import ObjectStore

from manta.data.config import CacheConfig
from manta.data.sampling.step_samples import Timeline
from manta.data.shards import manifest
from manta.data.shards.corpus_directory import CorpusDirectory
from manta.launch.inspect.charts import visible
from manta.trainer.metrics import read_metrics

SOURCES = "data.sources={early: 'documents/[a-d]*.txt', late: {path: 'documents/[e-h]*.txt', epochs: 1}}"
MIXED = "data.mixture=[{weights: {early: 0.75, late: 0.25}}, {from_tokens: 768, weights: {late: 1}}]"
GROWING = ("data.curriculum=[{sequence_length: 16}, {from_tokens: 256, sequence_length: 32}]", "data.skip=[[5, 9], [30, 32]]")
RAMP = "train.batch_ramp=[{global_batch: 4}, {from_tokens: 512, global_batch: 8}]"
CONFIG = (SOURCES, MIXED, *GROWING, RAMP, "train.micro_batch=2")
STEPS = 9


@pytest.fixture(scope="module")
def run(workspace) -> str:
    workspace.train("inspected", *CONFIG, f"train.steps={STEPS}")
    return "inspected"


@pytest.fixture(scope="module")
def masked(workspace) -> str:
    overrides = ("model.preset=bert-tiny", "model.kv_heads=null", "data.objective=masked", "tokenizer.algorithm=wordpiece")
    workspace.train("bert", *overrides, "train.steps=2", "cluster.ranks_per_node=1")
    return "bert"


def data_json(workspace, *arguments: str, code: int = 0) -> dict:
    """Return the JSON output of a `manta data` command."""
    done = workspace.manta("data", *arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def step_json(workspace, run: str, step: int, *more: str, code: int = 0) -> dict:
    return data_json(workspace, "sample-at", run, str(step), *more, code=code)


@pytest.fixture(scope="module")
def steps(workspace, run) -> list[dict]:
    """The output of `sample-at` for each step."""
    with ThreadPoolExecutor(2) as both:
        return list(both.map(lambda step: step_json(workspace, run, step), range(1, STEPS + 1)))


def corpora(workspace, run: str) -> list[tuple[CorpusDirectory, manifest.Manifest]]:
    homes = [CorpusDirectory(root, CacheConfig()) for root in data_json(workspace, "verify", run)["corpora"]]
    return [(home, manifest.load_manifest(home)) for home in homes]


def test_inspect_reports_what_manifests_and_shards_contain(workspace, run, tmp_path):
    found = data_json(workspace, "inspect", run, "--png", str(tmp_path / "charts"))
    for source, (_, corpus) in zip(found["sources"], corpora(workspace, run), strict=True):
        assert source["source"] == corpus.source
        assert [source[key] for key in ("documents", "tokens", "text_bytes")] == [
            corpus.train.documents,
            corpus.train.tokens,
            corpus.train.text_bytes,
        ]
        assert source["validation"]["tokens"] == corpus.validation.tokens
        assert sum(row["documents"] for row in source["lengths"]) == corpus.train.documents
    assert sum(source["share"] for source in found["sources"]) == pytest.approx(1)
    assert found["duplicates"]["documents_compared"] == found["all"]["documents"]
    assert found["overlap"]["train_tokens_searched"] == found["all"]["tokens"]
    assert found["steps_per_epoch"] is None
    for path in found["png"]:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
        assert Path(path).stat().st_size > 10_000
    printed = workspace.manta("data", "inspect", run)
    assert printed.returncode == 0
    assert "early" in printed.stdout
    assert f"{found['packing']['best_fit']['samples']:,}" in printed.stdout
    assert "duplicates:" in printed.stdout
    quick = data_json(workspace, "inspect", str(workspace.config_file), "data.sequence_length=64", "--read", "0")
    assert quick["packing"]["sequence_length"] == 64
    assert "duplicates" not in quick


def test_verify_reads_every_file(workspace, run):
    found = data_json(workspace, "verify", run)
    assert found["damaged"] == []
    shards = [path for root in found["corpora"] for suffix in ("bin", "idx") for path in Path(root).glob(f"*.{suffix}")]
    assert (found["files"], found["bytes"]) == (len(shards), sum(path.stat().st_size for path in shards))
    assert "each id below 512" in workspace.manta("data", "verify", str(workspace.config_file), *CONFIG).stdout


@pytest.mark.parametrize("of", [pytest.param("file", marks=pytest.mark.slow), "run"])
def test_verify_reports_all_damage(workspace, run, of):
    shutil.copytree(workspace.directory / "corpora", workspace.directory / f"damaged {of}")
    where = (str(workspace.config_file), f"data.directory=damaged {of}", *CONFIG)
    if of == "run":
        copy = workspace.directory / "reads the damaged corpus"
        shutil.copytree(workspace.directory / run, copy, ignore=shutil.ignore_patterns("checkpoints"))
        started = (copy / "manifest.json").read_text()
        (copy / "manifest.json").write_text(started.replace("/corpora/", "/damaged run/"))
        where = (copy.name,)
    early, late = map(Path, data_json(workspace, "verify", *where)["corpora"])
    flipped, short, gone = early / "piece-00000.train.bin", early / "piece-00000.train.idx", late / "piece-00000.validation.bin"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    short.write_bytes(short.read_bytes()[:-8])
    gone.unlink()
    expected = [str(flipped), str(short), str(gone)]
    if of == "run":
        (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
        expected.insert(0, str(copy / "tokenizer.json"))
    done = workspace.manta("data", "verify", *where)
    lines = [line for line in done.stderr.splitlines() if line.startswith("manta: ")]
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line.split(": expected ")[0].removeprefix("manta: ") for line in lines] == expected
    assert "expected xxh3 " in lines[0]
    assert f"expected {short.stat().st_size + 8:,}, got {short.stat().st_size:,} bytes. Prepare it again: manta prepare " in lines[-2]
    assert "got no such file" in lines[-1]
    assert [f"manta: {line}" for line in data_json(workspace, "verify", *where, code=2)["damaged"]] == lines
    if of == "file":
        assert workspace.manta("prepare", *where).returncode == 0
        assert data_json(workspace, "verify", *where)["damaged"] == []


@pytest.mark.slow
def test_a_corpus_in_an_object_store_is_inspected_in_place(workspace, tmp_path):
    prepared, cache = (str(workspace.config_file), "data.directory=s3://corpus/corpora"), tmp_path / "cache"
    where = (*prepared, f"data.cache.directory={cache}")
    with ObjectStore() as store:
        assert (
            workspace.manta("prepare", *prepared, f"data.cache.directory={tmp_path / 'of the preparation'}", **store.environment).returncode
            == 0
        )
        quick = workspace.manta("data", "inspect", *where, "--read", "0", "--json", **store.environment)
        assert json.loads(quick.stdout)["all"]["documents"] > 50
        assert not list(cache.rglob("*.bin")), "no tokens are fetched with --read 0"
        whole = json.loads(workspace.manta("data", "inspect", *where, "--json", **store.environment).stdout)
        assert whole["overlap"]["train_tokens_searched"] == whole["all"]["tokens"]
        verified = json.loads(workspace.manta("data", "verify", *where, "--json", **store.environment).stdout)
        assert verified["damaged"] == []
        shard = f"{verified['corpora'][0]}/piece-00000.validation.bin"
        store.put(shard.removeprefix("s3://corpus/"), b"\0" * 2 * whole["all"]["validation"]["tokens"])
        damaged = workspace.manta("data", "verify", *where, **store.environment)
        assert damaged.returncode == 2
        assert re.search(rf"^manta: {re.escape(shard)}: expected xxh3 \w{{16}}, got \w{{16}}\. ", damaged.stderr, re.MULTILINE)


def test_mixture_equals_what_the_run_read(workspace, run, steps):
    found = data_json(workspace, "mixture", run)
    begins = {row["step"]: row["begins"] for row in found["rows"] if row["begins"]}
    assert begins == {2: ["length 32"], 4: ["global batch 8"], 5: ["stage 2"]}
    whole = Timeline(sequence_length=32, global_batch=8, ramp=[(0, 4), (512, 8)])
    read = {step: [sample for found in steps[:step] for sample in found["samples"]] for step in range(STEPS + 1)}
    for row in found["rows"]:
        assert row["tokens"] == whole.tokens(row["step"])
        assert sum(of["tokens"] for of in row["sources"].values()) == row["tokens"]
        by_source = Counter(sample["source"] for sample in read[row["step"]])
        assert {name: of["tokens"] for name, of in row["sources"].items()} == {name: 32 * by_source[name] for name in row["sources"]}
    assert [row["sources"]["late"]["share"] for row in found["rows"]] == [0.25 if row["step"] < 5 else 1 for row in found["rows"]]
    assert found["warnings"] == []
    printed = workspace.manta("data", "mixture", run).stdout
    assert "stage 2" in printed
    assert "100 %" in printed


@pytest.mark.slow
def test_mixture_warns_when_a_source_exceeds_its_epochs(workspace, run, tmp_path):
    far = data_json(workspace, "mixture", run, "--steps", "20000", "--png", str(tmp_path))
    (warning,) = far["warnings"]
    assert (warning["source"], warning["kind"], warning["in_run"]) == ("late", "cap", False)
    steps = [
        data_json(workspace, "mixture", run, "--steps", str(warning["step"] + more))["rows"][-1]["sources"]["late"]["epochs"]
        for more in (-1, 0)
    ]
    assert steps[0] <= 1 < steps[1]
    assert (
        f"late: exceeds its limit (epochs: 1) from step {warning['step']:,}: "
        in workspace.manta("data", "mixture", run, "--steps", "20000").stdout
    )
    assert (tmp_path / "mixture.png").read_bytes().startswith(b"\x89PNG")
    pooled = data_json(workspace, "mixture", str(workspace.config_file), SOURCES, "--steps", "20000")
    assert {warning["kind"] for warning in pooled["warnings"]} == {"cap", "again"}
    sizes = [source["samples"] for source in pooled["sources"]]
    assert [of["share"] for of in pooled["rows"][0]["sources"].values()] == [size / sum(sizes) for size in sizes]


def test_sample_at_shows_what_the_run_was_trained_on(workspace, run, steps):
    lines = read_metrics(workspace.directory / run / "metrics.jsonl")
    numbers: list[int] = []
    assert [line["step"] for line in lines] == [found["step"] for found in steps]
    for line, found in zip(lines, steps, strict=True):
        assert found["digest"] == {"computed": line["data/digest"], "logged": line["data/digest"], "matches": True}
        assert (found["global_batch"], found["sequence_length"]) == (line["global_batch"], line["sequence_length"])
        assert [sample["slot"] for sample in found["samples"]] == list(range(line["global_batch"]))
        assert [sample["rank"] for sample in found["samples"]] == [slot // 2 % 2 for slot in range(line["global_batch"])]
        assert [sample["micro_step"] for sample in found["samples"]] == [slot // 4 for slot in range(line["global_batch"])]
        assert all(len(sample["sequences"]) == 32 // line["sequence_length"] for sample in found["samples"])
        numbers += [sample["sample"] for sample in found["samples"]]
    left = [number for number in range(numbers[-1] + 1) if number not in {5, 6, 7, 8, 30, 31}]
    assert numbers == left, "only the skipped samples are missing"
    texts = {
        name: "".join(path.read_text() for path in (workspace.directory / "documents").glob(f"{names}*.txt"))
        for name, names in NAMES.items()
    }
    printed = workspace.manta("data", "sample-at", run, str(STEPS), "--full").stdout
    for sample in steps[-1]["samples"]:
        for document in sample["sequences"][0]["documents"]:
            assert document["text"].removesuffix("<|endoftext|>").strip("�") in texts[sample["source"]]
        for document, origin in zip(sample["sequences"][0]["documents"], sample["documents"], strict=True):
            path, line = re.fullmatch(r"(.*): line (\d+)", origin["location"]).groups()
            there = "".join(Path(path).read_text().splitlines(keepends=True)[int(line) - 1 :])
            assert document["text"].removesuffix("<|endoftext|>").strip("�") in there
            assert (document["tokens"], sample["source"]) == (origin["tokens"], origin["source"])
            assert f" · {origin['location']} · " in printed


NAMES = {"early": "[a-d]", "late": "[e-h]"}


@pytest.mark.slow
def test_sample_at_distributes_a_step_over_any_ranks(workspace, run, steps):
    whole = steps[7]
    for ranks in (1, 2):
        dealt = [step_json(workspace, run, 8, "--ranks", str(ranks), "--rank", str(rank))["samples"] for rank in range(ranks)]
        assert sorted((sample["slot"], sample["sample"]) for of_rank in dealt for sample in of_rank) == [
            (sample["slot"], sample["sample"]) for sample in whole["samples"]
        ]
    (only,) = step_json(workspace, run, 8, "--slot", "3")["samples"]
    assert only == whole["samples"][3]
    printed = workspace.manta("data", "sample-at", run, "8", "--slot", "3", "--full").stdout
    assert "equals the run's log: this is what was trained on" in printed
    assert f"sample {only['sample']:,} · {only['source']} · epoch 1" in printed
    shown = "".join(line[6:] for line in printed.splitlines() if "┃" in line)
    assert "".join(only["sequences"][0]["documents"][0]["text"].split("\n")) in shown


def test_sample_at_exits_1_if_digests_differ(workspace, run):
    copy = workspace.directory / "another digest"
    shutil.copytree(workspace.directory / run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    metrics = copy / "metrics.jsonl"
    lines = read_metrics(metrics)
    lines[2]["data/digest"] ^= 1
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines[:5]))
    done = workspace.manta("data", "sample-at", copy.name, "3")
    assert done.returncode == 1
    assert "THIS IS NOT WHAT WAS TRAINED ON" in done.stdout
    assert step_json(workspace, copy.name, 3, code=1)["digest"]["matches"] is False
    assert workspace.manta("data", "sample-at", copy.name, "2").returncode == 0
    assert step_json(workspace, copy.name, 7)["digest"]["logged"] is None


@pytest.mark.slow
def test_sample_at_shows_masked_tokens(workspace, masked):
    found = step_json(workspace, masked, 2)
    assert found["digest"]["matches"] is True
    for sample in found["samples"]:
        (sequence,) = sample["sequences"]
        assert sequence["pair"] in {"B follows A", "B is from elsewhere"}
        pieces = [piece for document in sequence["documents"] for piece in document["pieces"]]
        assert [piece["text"] for piece in pieces if piece["kind"] == "special" and "[" in piece["text"]] == ["[CLS]", "[SEP]", "[SEP]"]
        assert sum(piece["wanted"] is not None for piece in pieces) == round(0.15 * 29)
    assert "⟦[MASK]→" in workspace.manta("data", "sample-at", masked, "2").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere.yaml"], "nowhere.yaml: expected a config, got an error: No such file or directory"),
        (["inspect", "FILE", "tokenizer.vocabulary=333"], "expected a prepared corpus, got none. Run: manta prepare 'run file.yaml'"),
        (["inspect", "documents"], "documents: expected a run directory, got no config.yaml"),
        (["inspect", "FILE", "data.live=true"], "data.live: expected a prepared corpus to inspect, got true"),
        (
            ["inspect", "FILE", "--png", "run file.yaml/below"],
            "--png: expected a directory that can be written, got run file.yaml/below (Not a directory)",
        ),
        (["verify", "FILE", "tokenizer.vocabulary=333"], "expected a prepared corpus, got none. Run: manta prepare 'run file.yaml'"),
        (["mixture", "FILE", "data.mixture=[{weights: {web: 1}}]"], "mixture: expected names of sources, got 'web'"),
        (["sample-at", "FILE", "1"], "run file.yaml: expected a run directory, got a file"),
        (["sample-at", "RUN", "0"], "STEP: expected 1 to 9, the run's train.steps, got 0"),
        (["sample-at", "RUN", "10"], "STEP: expected 1 to 9, the run's train.steps, got 10"),
        (["sample-at", "RUN", "1", "--slot", "4"], "--slot: expected 0 to 3, the samples of step 1, got 4"),
        (["sample-at", "RUN", "9", "--rank", "2"], "--rank: expected 0 to 1, the step's data ranks, got 2"),
        (
            ["sample-at", "RUN", "9", "--ranks", "3"],
            "--ranks: expected a divisor of train.global_batch / train.micro_batch (2), got 3. Use 1 or 2.",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(workspace, run, arguments, message):
    named = {"FILE": workspace.config_file.name, "RUN": run}
    done = workspace.manta("data", *(named.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("manta: ")
    assert message in line


@pytest.mark.parametrize("command", [["inspect", "RUN"], ["verify", "RUN"], ["mixture", "RUN"], ["sample-at", "RUN", "2"]])
def test_no_command_imports_torch(workspace, run, command):
    heavy = "{'torch', 'ray', 'deepspeed', 'datasets', 'matplotlib', 'pyarrow'}"
    script = f"""
import sys
from manta.launch.cli import main
sys.argv = ["manta", "data", *{[run if word == "RUN" else word for word in command]}]
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
sys.stderr.write('imported: ' + ' '.join({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], cwd=workspace.directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "imported: "
    assert f"For example: manta data {command[0]} " in workspace.manta("data", command[0], "--help").stdout


def test_png_without_matplotlib_is_refused_in_one_line(workspace, run):
    script = """
import sys
sys.modules["matplotlib"] = None
from manta.launch.cli import main
sys.argv = ["manta", "data", "mixture", "RUN", "--png", "charts"]
main()
""".replace("RUN", run)
    done = subprocess.run([sys.executable, "-P", "-c", script], cwd=workspace.directory, capture_output=True, text=True, check=False)
    message = "manta: --png: expected matplotlib, which is not installed. Run pip install 'manta[plots]'.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_control_characters_are_made_visible():
    assert visible("a\x1b[2J\tb\r\n\x7f\x9b1m é") == "a␛[2J\tb␍\n␡�1m é"
