"""A run as a RayJob: the manifest is what KubeRay takes, holds what a run needs and no secret, and is refused where pods could not run it.

The manifest in golden_rayjob.yaml is written anew by: MANTA_WRITE_GOLDEN=1 python -m pytest tests/test_target_kubernetes.py -k golden
KubeRay's schema of a RayJob is not ours to keep: MANTA_RAYJOB_SCHEMA names it, or it lies in ../shared/kuberay beside the repository.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import pytest
import yaml

from manta.data.errors import InputError
from manta.launch import config
from manta.launch.targets import kubernetes
from manta.launch.targets.dispatch import launch

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden_rayjob.yaml")
SCHEMA = Path(os.environ.get("MANTA_RAYJOB_SCHEMA", ROOT.parent / "shared" / "kuberay" / "rayjob-v1.schema.json"))
RUN = """
run: {dir: /mnt/manta/runs/mine}
data: {sources: ["/mnt/manta/text/*.jsonl", "s3://corpus/web"], sequence_length: 1024, directory: "s3://corpus/prepared"}
model: {preset: gpt2-tiny, positions: 1024}
train: {steps: 100, global_batch: 64, micro_batch: 2}
cluster:
  kubernetes: {image: "registry.example.com/manta:1.0", claim: training-data, gpus: 8}
"""
EVERYTHING = [
    "cluster.grace_period=90.5",
    "cluster.kubernetes.name=mine",
    "cluster.kubernetes.namespace=training",
    "cluster.kubernetes.queue=research",
    "cluster.kubernetes.token_secret=ray-token",
    "cluster.kubernetes.secrets=[bucket-access, tracker]",
    "cluster.kubernetes.service_account=trainer",
    'cluster.kubernetes.node_selector={pool: h100, example.com/rack: "1e3"}',
    "cluster.kubernetes.tolerations=[nvidia.com/gpu]",
    "cluster.kubernetes.backoff_limit=10",
]


@pytest.fixture
def file(tmp_path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    return file


def rendered(file: Path, *overrides: str, nodes: int = 1) -> tuple[dict, dict]:
    return tuple(yaml.safe_load_all(kubernetes.render(config.load(file, overrides), nodes=nodes)))


def pods(job: dict) -> tuple[dict, dict]:
    """Of the head, and of a node."""
    cluster = job["spec"]["rayClusterSpec"]
    return cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]["template"]["spec"]


def environment(pod: dict) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}


def test_the_manifest_is_the_golden_one(file):
    around, _, rest = kubernetes.render(config.load(file, EVERYTHING), nodes=4).partition("run.yaml: |\n")
    _, end, job = rest.partition("---\n")
    manifest = f"{around}run.yaml: that of the run, every key of it\n{end}{job}"
    if "MANTA_WRITE_GOLDEN" in os.environ:
        GOLDEN.write_text(manifest)
    assert manifest == GOLDEN.read_text()


def closed(schema: object) -> object:
    """The same schema, which refuses keys that it does not name, as `kubectl apply` does. int-or-string: any."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {}
    inner = {key: {name: closed(each) for name, each in value.items()} if key == "properties" else value for key, value in schema.items()}
    inner |= {key: closed(schema[key]) for key in ("items", "additionalProperties") if key in schema}
    if "properties" in schema and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        inner["additionalProperties"] = False
    return inner


@pytest.fixture(scope="module")
def kuberay() -> jsonschema.Draft202012Validator:
    if not SCHEMA.exists():
        pytest.skip(f"no {SCHEMA}: MANTA_RAYJOB_SCHEMA names KubeRay's schema of a RayJob")
    return jsonschema.Draft202012Validator(closed(json.loads(SCHEMA.read_text())))


@pytest.mark.parametrize("overrides", [[], EVERYTHING, ["cluster.kubernetes.gpus=0"]], ids=["least", "everything", "on CPUs"])
def test_the_schema_of_kuberay_takes_the_manifest(file, kuberay, overrides):
    kuberay.validate(rendered(file, *overrides, nodes=4)[1])


def wrong_type(job: dict) -> None:
    job["spec"]["backoffLimit"] = "3"


def wrong_choice(job: dict) -> None:
    job["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "secret"


def wrong_depth(job: dict) -> None:
    pods(job)[1]["containers"][0]["env"][0]["value"] = 1


def unknown_key(job: dict) -> None:
    pods(job)[0]["containers"][0]["lifecycle"]["prestop"] = {}


@pytest.mark.parametrize("spoil", [wrong_type, wrong_choice, wrong_depth, unknown_key])
def test_the_schema_of_kuberay_refuses_a_spoilt_manifest(file, kuberay, spoil):
    job = rendered(file, *EVERYTHING)[1]
    spoil(job)
    with pytest.raises(jsonschema.ValidationError):
        kuberay.validate(job)


def test_the_run_of_the_manifest_is_the_run_of_the_config(file, tmp_path):
    overrides = [*EVERYTHING, "train.steps=7"]
    (tmp_path / "there.yaml").write_text(rendered(file, *overrides)[0]["data"]["run.yaml"])
    there, here = config.load(tmp_path / "there.yaml"), config.load(file, [*overrides, "cluster.ranks_per_node=8"])
    assert there == here


def test_the_head_sees_the_config_where_its_command_looks_for_it(file):
    run, job = rendered(file)
    head, node = pods(job)
    assert job["spec"]["entrypoint"] == "/usr/local/bin/python3 -P -m manta.launch train /manta/run.yaml --on auto"
    mounted = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    assert mounted == {"storage": "/mnt/manta", "run": "/manta"}
    assert {"name": "run", "configMap": {"name": run["metadata"]["name"]}} in head["volumes"]
    for pod in (head, node):
        assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}


def test_only_nodes_train(file):
    job = rendered(file, nodes=4)[1]
    head, node = pods(job)
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 4
    assert node["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert environment(head)["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert "NVIDIA_VISIBLE_DEVICES" not in environment(node)


def test_ranks_a_node_are_its_gpus_either_way_round(file, tmp_path):
    unset = tmp_path / "unset.yaml"
    unset.write_text(RUN.replace(", gpus: 8", ""))
    _, job = rendered(unset, "cluster.ranks_per_node=4")
    assert pods(job)[1]["containers"][0]["resources"]["requests"]["nvidia.com/gpu"] == 4
    assert yaml.safe_load(rendered(file)[0]["data"]["run.yaml"])["cluster"]["ranks_per_node"] == 8
    on_cpus = rendered(file, "cluster.kubernetes.gpus=0", "cluster.ranks_per_node=2")[1]
    assert "nvidia.com/gpu" not in pods(on_cpus)[1]["containers"][0]["resources"]["limits"]


def test_a_pod_waits_longer_than_the_run_may_take_to_leave(file):
    head, node = pods(rendered(file, "cluster.grace_period=90.5")[1])
    assert environment(head)["RAY_JOB_STOP_WAIT_TIME_S"] == "106"  # Ray's own would be 3
    for pod in (head, node):
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[3:] == ["manta.launch.targets.pre_stop", "/manta/run.yaml", "/mnt/manta/runs/mine", "106"]
        assert pod["terminationGracePeriodSeconds"] > 106


def test_runs_of_two_directories_have_two_names(file):
    names = [rendered(file, f"run.dir=/mnt/manta/{place}")[1]["metadata"]["name"] for place in ("a/Mine_1", "b/Mine_1", f"a/{'x' * 99}")]
    assert names[0].startswith("run-mine-1-")
    assert len(set(names)) == 3
    assert max(map(len, names)) <= 47


def test_a_text_that_others_read_as_a_number_is_quoted(file):
    manifest = kubernetes.render(config.load(file, ['cluster.kubernetes.node_selector={a: "1e3", b: "y", c: "0o7"}']), nodes=1)
    assert 'a: "1e3"\n' in manifest
    assert 'b: "y"\n' in manifest
    assert 'c: "0o7"\n' in manifest


BAD = {
    "no image": ("cluster.kubernetes.image=null", "cluster.kubernetes.image: got nothing, wants an image", "try cluster.kubernetes.image="),
    "no claim": ("cluster.kubernetes.claim=null", "cluster.kubernetes.claim: got nothing", "name it"),
    "no GPUs told": ("cluster.kubernetes.gpus=null", "cluster.kubernetes.gpus: got nothing", "or 0 to train on CPUs"),
    "more ranks than GPUs": ("cluster.ranks_per_node=9", "cluster.ranks_per_node: got 9, wants at most one a GPU", "lower it"),
    "a run on the laptop": (
        "run.dir=runs/mine",
        "run.dir: got runs/mine, wants a path below /mnt/manta",
        "do not see this machine's files",
    ),
    "a run in a bucket": ("run.dir=s3://bucket/run", "run.dir: got s3:/bucket/run, wants a path below /mnt/manta", "the claim;"),
    "a run beside the claim": ("run.dir=/mnt/manta/../run", "run.dir: got /mnt/manta/../run, wants a path below", ""),
    "a run that is the claim": ("run.dir=/mnt/manta", "run.dir: got /mnt/manta, wants a path below", ""),
    "a claim that lies elsewhere": ("cluster.kubernetes.mount=/data", "run.dir: got /mnt/manta/runs/mine, wants a path below /data", ""),
    "text on the laptop": (
        "data.sources=[text/*.txt]",
        "data.sources: got text/*.txt, wants a path below /mnt/manta",
        "or a URL such as s3://",
    ),
    "validation on the laptop": ("data.sources=[{path: 'hf:name', validation: v.txt}]", "data.sources: got v.txt", ""),
    "a data set on the laptop": ("data.sources=['hf:/home/me/set']", "data.sources: got /home/me/set", ""),
    "a corpus on the laptop": ("data.directory=corpora", "data.directory: got corpora, wants a path below /mnt/manta", "or a URL"),
    "a tokenizer on the laptop": ("tokenizer.file=tokenizer.json", "tokenizer.file: got tokenizer.json", "or a URL"),
    "weights on the laptop": ("run.start_from=/imported/gpt2", "run.start_from: got /imported/gpt2", "or a URL"),
    "checkpoints on the laptop": ("checkpoint.directory=/ssd/mine", "checkpoint.directory: got /ssd/mine, wants a path below", "or a URL"),
    "a cache from wherever": ("data.cache.directory=cache", "data.cache.directory: got cache, wants an absolute path", "change it"),
    "a name that is none": (
        "cluster.kubernetes.name=Mine",
        "cluster.kubernetes.name: expected at most 47 of a-z, 0-9 and -, starting with a letter, got 'Mine'",
        "Change it.",
    ),
    "a name that is long": (f"cluster.kubernetes.name={'x' * 48}", "cluster.kubernetes.name: expected at most 47", "got 'xxx"),
    "a namespace that is none": (
        "cluster.kubernetes.namespace=a.b",
        "cluster.kubernetes.namespace: expected a namespace of at most 63 of a-z, 0-9 and -, got 'a.b'",
        "Change it.",
    ),
    "a claim that is none": (
        "cluster.kubernetes.claim=my_claim",
        "cluster.kubernetes.claim: expected an object's name of a-z, 0-9, - and ., got 'my_claim'",
        "Change it.",
    ),
    "a secret that is none": (
        "cluster.kubernetes.secrets=[KEY=x]",
        "cluster.kubernetes.secrets.0: expected an object's name of a-z, 0-9, - and ., got 'KEY=x'",
        "Change it.",
    ),
    "memory as others spell it": (
        "cluster.kubernetes.memory=64GB",
        "cluster.kubernetes.memory: expected a quantity of memory, got '64GB'",
        "64Gi",
    ),
    "no memory": ("cluster.kubernetes.head_memory=0Gi", "cluster.kubernetes.head_memory: expected a quantity of memory, got '0Gi'", "64Gi"),
    "shared memory beyond all": (
        "cluster.kubernetes.shared_memory=64Gi",
        "cluster.kubernetes.shared_memory: expected less than memory (64Gi), got 64Gi",
        "Lower it.",
    ),
    "a label that is no text": (
        "cluster.kubernetes.node_selector={pool: 3}",
        "cluster.kubernetes.node_selector: expected a string for 'pool', got 3",
        "quotes",
    ),
    "a taint that is none": (
        "cluster.kubernetes.tolerations=['a b']",
        "cluster.kubernetes.tolerations.0: expected the key of a taint, such as nvidia.com/gpu, got 'a b'",
        "Change it.",
    ),
    "an interpreter of the path": (
        "cluster.kubernetes.python=python3",
        "cluster.kubernetes.python: expected an absolute path of letters, digits and . _ + -, got 'python3'",
        "Change it.",
    ),
    "a shell's work": (
        "cluster.kubernetes.python='/bin/sh;ls'",
        "cluster.kubernetes.python: expected an absolute path of letters, digits and . _ + -, got '/bin/sh;ls'",
        "Change it.",
    ),
    "a claim over the config": (
        "cluster.kubernetes.mount=/manta",
        "cluster.kubernetes.mount: expected a directory that pods do not use, got '/manta'",
        "Try /mnt/manta.",
    ),
    "an unknown key": ("cluster.kubernetes.imagee=x", "cluster.kubernetes.imagee: got an unknown key", "did you mean image?"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input_is_told_before_anything_is_rendered(file, mistake):
    override, told, remedy = BAD[mistake]
    with pytest.raises(InputError) as error:
        rendered(file, override)
    lines = [line for line in str(error.value).splitlines() if told in line]
    assert len(lines) == 1, str(error.value)
    assert remedy in lines[0]


def test_a_batch_that_the_nodes_can_not_share_is_told(file):
    assert rendered(file, "parallel.tensor=2", nodes=2)
    with pytest.raises(InputError, match=r"parallel\.tensor"):
        rendered(file, "parallel.tensor=2", "cluster.ranks_per_node=1", "cluster.kubernetes.gpus=1")


def test_a_password_in_a_url_is_refused_and_not_repeated(file):
    with pytest.raises(InputError) as error:
        rendered(file, "data.sources=['sftp://me:hunter2@host/text']")
    assert "data.sources: got a password in a URL of host" in str(error.value)
    assert "hunter2" not in str(error.value)


def test_a_dry_run_prints_the_manifest_and_does_nothing(workspace, file, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = workspace.manta(
        "train", str(file), *EVERYTHING, "--on", "kubernetes", "--dry-run", AWS_SECRET_ACCESS_KEY="hunter2", PATH="/nowhere"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == kubernetes.render(config.load(file, EVERYTHING), nodes=1)
    assert "hunter2" not in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def kubectl(folder: Path, *, code: int = 0, told: str = "created") -> str:
    """A stand-in that keeps what it is given; the PATH on which it is found."""
    folder.mkdir()
    kept = f'echo "$@" > {folder}/arguments; cat > {folder}/stdin'
    (folder / "kubectl").write_text(f"#!/bin/sh\n{kept}\necho 'configmap/x {told}'\necho 'rayjob.ray.io/x {told}'\nexit {code}\n")
    (folder / "kubectl").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_the_manifest_is_applied_by_kubectl(workspace, file, tmp_path):
    done = workspace.manta("train", str(file), *EVERYTHING, "--on", "kubernetes", PATH=kubectl(tmp_path / "bin"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "configmap/x created\nrayjob.ray.io/x created\n"
    assert (tmp_path / "bin" / "arguments").read_text() == "apply -f -\n"
    assert (tmp_path / "bin" / "stdin").read_text() == kubernetes.render(config.load(file, EVERYTHING), nodes=1)


def test_a_job_that_was_there_is_said_not_to_begin_again(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", kubectl(tmp_path / "bin", told="unchanged"))
    assert launch(config.load(file, EVERYTHING), "kubernetes", dry_run=False) == 0
    assert "kubectl delete rayjob mine --namespace training, then" in capsys.readouterr().err


def test_what_kubectl_refuses_has_failed(file, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", kubectl(tmp_path / "bin", code=7))
    assert launch(config.load(file), "kubernetes", dry_run=False) == 1


def test_without_kubectl_the_command_says_what_to_do(workspace, file):
    done = workspace.manta("train", str(file), "--on", "kubernetes", PATH="/nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert "got no kubectl on PATH, wants it to hand the job over; install it, or add --dry-run" in done.stderr


@pytest.mark.parametrize(
    ("on", "dry_run", "told"),
    [("kubernets", False, "--on: got 'kubernets', wants one of local, ssh:FILE"), ("local", True, "--dry-run: got it with --on local")],
)
def test_a_target_that_there_is_not_is_bad_input(file, on, dry_run, told):
    with pytest.raises(InputError, match=told):
        launch(config.load(file), on, dry_run=dry_run)


STAND_IN = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(75)))
print(flush=True)
time.sleep(60)
"""


@contextmanager
def python(*arguments: str) -> Iterator[subprocess.Popen]:
    """A process that was started as one of ours would be, takes half a second to leave, and is gone in the end."""
    with subprocess.Popen([sys.executable, "-c", STAND_IN, *arguments], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def leave(*arguments: str) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-P", "-m", "manta.launch.targets.pre_stop", *arguments], check=True, timeout=30)
    return time.monotonic() - began


def test_a_pod_tells_its_controller_to_leave_and_waits_for_it(tmp_path):
    file, run = str(tmp_path / "run.yaml"), str(tmp_path / "run")
    with (
        python("-m", "manta.launch", "train", file, "--on", "auto") as controller,
        python("-m", "manta.launch", "train", f"{file}.other", "--on", "auto") as other,
    ):
        leave(file, run, "20")
        assert controller.poll() == 75, "it came back before the controller had left"
        assert other.poll() is None


def test_a_pod_waits_for_its_ranks_but_not_for_ever(tmp_path):
    file, run = str(tmp_path / "run.yaml"), str(tmp_path / "run")
    with python("-m", "manta.trainer", run) as rank:
        assert leave(file, run, "1") >= 1
        assert rank.poll() is None, "it is for the controller to end ranks"
        rank.send_signal(signal.SIGTERM)
        leave(file, run, "20")
        assert rank.poll() == 75
