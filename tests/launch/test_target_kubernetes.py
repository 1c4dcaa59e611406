"""RayJobs of KubeRay: a manifest that KubeRay accepts, without secrets, and a refusal of configs that pods could not run.

Write golden_rayjob.yaml with: MANTA_WRITE_GOLDEN=1 python -m pytest tests/launch/test_target_kubernetes.py -k golden
KubeRay's schema of a RayJob is not in the repository: set MANTA_RAYJOB_SCHEMA, or put it into ../shared/kuberay.
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
    return tuple(yaml.safe_load_all(kubernetes.render(config.load(file, [*overrides, f"cluster.nodes={nodes}"]))))


def pods(job: dict) -> tuple[dict, dict]:
    """The head's, and a node's."""
    cluster = job["spec"]["rayClusterSpec"]
    return cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]["template"]["spec"]


def environment(pod: dict) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}


def test_the_manifest_matches_the_golden_file(file):
    start, _, rest = kubernetes.render(config.load(file, [*EVERYTHING, "cluster.nodes=4"])).partition("run.yaml: |\n")
    _, end, job = rest.partition("---\n")
    manifest = f"{start}run.yaml: every key of the config\n{end}{job}"
    if "MANTA_WRITE_GOLDEN" in os.environ:
        GOLDEN.write_text(manifest)
    assert manifest == GOLDEN.read_text()


def closed(schema: object) -> object:
    """The schema, but refusing unknown keys, as `kubectl apply` does. int-or-string: any."""
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


@pytest.mark.parametrize("overrides", [[], EVERYTHING, ["cluster.kubernetes.gpus=0"]], ids=["minimum", "everything", "on CPUs"])
def test_the_schema_of_kuberay_accepts_the_manifest(file, kuberay, overrides):
    kuberay.validate(rendered(file, *overrides, nodes=4)[1])


def wrong_type(job: dict) -> None:
    job["spec"]["backoffLimit"] = "3"


def wrong_choice(job: dict) -> None:
    job["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "secret"


def wrong_depth(job: dict) -> None:
    pods(job)[1]["containers"][0]["env"][0]["value"] = 1


def unknown_key(job: dict) -> None:
    pods(job)[0]["containers"][0]["lifecycle"]["prestop"] = {}


@pytest.mark.parametrize("damage", [wrong_type, wrong_choice, wrong_depth, unknown_key])
def test_the_schema_of_kuberay_refuses_a_wrong_manifest(file, kuberay, damage):
    job = rendered(file, *EVERYTHING)[1]
    damage(job)
    with pytest.raises(jsonschema.ValidationError):
        kuberay.validate(job)


def test_the_manifest_contains_the_config(file, tmp_path):
    overrides = [*EVERYTHING, "train.steps=7"]
    (tmp_path / "in_pod.yaml").write_text(rendered(file, *overrides)[0]["data"]["run.yaml"])
    in_pod, expected = config.load(tmp_path / "in_pod.yaml"), config.load(file, [*overrides, "cluster.nodes=1", "cluster.ranks_per_node=8"])
    assert in_pod == expected


def test_the_head_mounts_the_config_that_its_command_names(file):
    run, job = rendered(file)
    head, node = pods(job)
    assert job["spec"]["entrypoint"] == "/usr/local/bin/python3 -P -m manta.launch train /manta/run.yaml --on auto"
    mounted = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    assert mounted == {"storage": "/mnt/manta", "run": "/manta"}
    assert {"name": "run", "configMap": {"name": run["metadata"]["name"]}} in head["volumes"]
    for pod in (head, node):
        assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}


def test_the_head_has_no_gpu_and_trains_nothing(file):
    job = rendered(file, nodes=4)[1]
    head, node = pods(job)
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 4
    assert node["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert environment(head)["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert "NVIDIA_VISIBLE_DEVICES" not in environment(node)


def test_ranks_per_node_and_gpus_default_to_each_other(file, tmp_path):
    unset = tmp_path / "unset.yaml"
    unset.write_text(RUN.replace(", gpus: 8", ""))
    _, job = rendered(unset, "cluster.ranks_per_node=4")
    assert pods(job)[1]["containers"][0]["resources"]["requests"]["nvidia.com/gpu"] == 4
    assert yaml.safe_load(rendered(file)[0]["data"]["run.yaml"])["cluster"]["ranks_per_node"] == 8
    on_cpus = rendered(file, "cluster.kubernetes.gpus=0", "cluster.ranks_per_node=2")[1]
    assert "nvidia.com/gpu" not in pods(on_cpus)[1]["containers"][0]["resources"]["limits"]


def test_a_pod_waits_longer_than_the_grace_period(file):
    head, node = pods(rendered(file, "cluster.grace_period=90.5")[1])
    assert environment(head)["RAY_JOB_STOP_WAIT_TIME_S"] == "106"  # Ray's default is 3
    for pod in (head, node):
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[3:] == ["manta.launch.targets.pre_stop", "/manta/run.yaml", "/mnt/manta/runs/mine", "106"]
        assert pod["terminationGracePeriodSeconds"] > 106


def test_two_directories_have_two_job_names(file):
    names = [rendered(file, f"run.dir=/mnt/manta/{path}")[1]["metadata"]["name"] for path in ("a/Mine_1", "b/Mine_1", f"a/{'x' * 99}")]
    assert names[0].startswith("run-mine-1-")
    assert len(set(names)) == 3
    assert max(map(len, names)) <= 47


def test_strings_that_look_like_numbers_are_quoted(file):
    manifest = kubernetes.render(config.load(file, ['cluster.kubernetes.node_selector={a: "1e3", b: "y", c: "0o7"}']))
    assert '"a": "1e3"' in manifest
    assert '"b": "y"' in manifest
    assert '"c": "0o7"' in manifest


BAD = {
    "no image": (
        "cluster.kubernetes.image=null",
        "cluster.kubernetes.image: expected an image with manta, got none",
        "Set cluster.kubernetes.image=",
    ),
    "no claim": ("cluster.kubernetes.claim=null", "cluster.kubernetes.claim: expected the PersistentVolumeClaim", "Set it"),
    "no GPUs set": (
        "cluster.kubernetes.gpus=null",
        "cluster.kubernetes.gpus: expected the GPUs of a node, got none",
        "or to 0 to train on CPUs",
    ),
    "more ranks than GPUs": (
        "cluster.ranks_per_node=9",
        "cluster.ranks_per_node: expected at most cluster.kubernetes.gpus (8), got 9",
        "Lower it",
    ),
    "a run on the laptop": (
        "run.dir=runs/mine",
        "run.dir: expected a path below /mnt/manta",
        "got runs/mine. Copy it there: pods do not see files of this machine.",
    ),
    "a run in a bucket": ("run.dir=s3://bucket/run", "run.dir: expected a directory", "checkpoint.directory=s3://bucket/run."),
    "a run beside the claim": ("run.dir=/mnt/manta/../run", "run.dir: expected a path below /mnt/manta", "got /mnt/manta/../run."),
    "a run that is the claim": ("run.dir=/mnt/manta", "run.dir: expected a path below /mnt/manta", "got /mnt/manta."),
    "a claim mounted elsewhere": ("cluster.kubernetes.mount=/data", "run.dir: expected a path below /data", "got /mnt/manta/runs/mine."),
    "text on the laptop": (
        "data.sources=[text/*.txt]",
        "data.sources: expected a path below /mnt/manta",
        "or a URL such as s3://bucket/mine, got text/*.txt.",
    ),
    "validation on the laptop": (
        "data.sources=[{path: 'hf:name', validation: v.txt}]",
        "data.sources: expected a path below /mnt/manta",
        "got v.txt.",
    ),
    "a data set on the laptop": ("data.sources=['hf:/home/me/set']", "data.sources: expected a path below /mnt/manta", "got /home/me/set."),
    "a corpus on the laptop": (
        "data.directory=corpora",
        "data.directory: expected a path below /mnt/manta",
        "or a URL such as s3://bucket/mine, got corpora.",
    ),
    "a tokenizer on the laptop": (
        "tokenizer.file=tokenizer.json",
        "tokenizer.file: expected a path below /mnt/manta",
        "mine, got tokenizer.json.",
    ),
    "weights on the laptop": (
        "run.start_from=/imported/gpt2",
        "run.start_from: expected a path below /mnt/manta",
        "mine, got /imported/gpt2.",
    ),
    "checkpoints on the laptop": (
        "checkpoint.directory=/ssd/mine",
        "checkpoint.directory: expected a path below /mnt/manta",
        "mine, got /ssd/mine.",
    ),
    "a relative cache": (
        "data.cache.directory=cache",
        "data.cache.directory: expected an absolute path, or one below ~, got cache",
        "Change it",
    ),
    "an invalid name": (
        "cluster.kubernetes.name=Mine",
        "cluster.kubernetes.name: expected at most 47 of a-z, 0-9 and -, starting with a letter, got 'Mine'",
        "Change it.",
    ),
    "a long name": (f"cluster.kubernetes.name={'x' * 48}", "cluster.kubernetes.name: expected at most 47", "got 'xxx"),
    "an invalid namespace": (
        "cluster.kubernetes.namespace=a.b",
        "cluster.kubernetes.namespace: expected a namespace of at most 63 of a-z, 0-9 and -, got 'a.b'",
        "Change it.",
    ),
    "an invalid claim": (
        "cluster.kubernetes.claim=my_claim",
        "cluster.kubernetes.claim: expected an object's name of a-z, 0-9, - and ., got 'my_claim'",
        "Change it.",
    ),
    "an invalid secret": (
        "cluster.kubernetes.secrets=[KEY=x]",
        "cluster.kubernetes.secrets.0: expected an object's name of a-z, 0-9, - and ., got 'KEY=x'",
        "Change it.",
    ),
    "an unknown unit of memory": (
        "cluster.kubernetes.memory=64GB",
        "cluster.kubernetes.memory: expected a quantity of memory, got '64GB'",
        "64Gi",
    ),
    "no memory": ("cluster.kubernetes.head_memory=0Gi", "cluster.kubernetes.head_memory: expected a quantity of memory, got '0Gi'", "64Gi"),
    "shared memory that fills memory": (
        "cluster.kubernetes.shared_memory=64Gi",
        "cluster.kubernetes.shared_memory: expected less than memory (64Gi), got 64Gi",
        "Lower it.",
    ),
    "a label that is a list": (
        "cluster.kubernetes.node_selector={pool: [3]}",
        "cluster.kubernetes.node_selector: expected a string for 'pool', got [3]",
        "quotes",
    ),
    "an invalid taint": (
        "cluster.kubernetes.tolerations=['a b']",
        "cluster.kubernetes.tolerations.0: expected the key of a taint, such as nvidia.com/gpu, got 'a b'",
        "Change it.",
    ),
    "a relative interpreter": (
        "cluster.kubernetes.python=python3",
        "cluster.kubernetes.python: expected an absolute path of letters, digits and . _ + -, got 'python3'",
        "Change it.",
    ),
    "an interpreter with shell syntax": (
        "cluster.kubernetes.python='/bin/sh;ls'",
        "cluster.kubernetes.python: expected an absolute path of letters, digits and . _ + -, got '/bin/sh;ls'",
        "Change it.",
    ),
    "a mount over the config": (
        "cluster.kubernetes.mount=/manta",
        "cluster.kubernetes.mount: expected a directory that pods do not use, got '/manta'",
        "Try /mnt/manta.",
    ),
    "an unknown key": (
        "cluster.kubernetes.imagee=x",
        "cluster.kubernetes.imagee: expected a key of cluster.kubernetes",
        "Did you mean image?",
    ),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input_is_refused_by_key(file, mistake):
    override, message, remedy = BAD[mistake]
    with pytest.raises(InputError) as error:
        rendered(file, override)
    lines = [line for line in str(error.value).splitlines() if message in line]
    assert len(lines) == 1, str(error.value)
    assert remedy in lines[0]


def test_a_batch_that_nodes_cannot_share_is_refused(file):
    assert rendered(file, "parallel.tensor=2", nodes=2)
    with pytest.raises(InputError, match=r"parallel\.tensor"):
        rendered(file, "parallel.tensor=2", "cluster.ranks_per_node=1", "cluster.kubernetes.gpus=1")


def test_a_dry_run_prints_the_manifest_and_does_nothing(workspace, file, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = workspace.manta(
        "train", str(file), *EVERYTHING, "--on", "kubernetes", "--dry-run", AWS_SECRET_ACCESS_KEY="hunter2", PATH="/nowhere"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == kubernetes.render(config.load(file, EVERYTHING))
    assert "hunter2" not in result.stdout + result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def kubectl(folder: Path, *, code: int = 0, status: str = "created") -> str:
    """Write a kubectl that stores its arguments and input, and return the PATH that finds it."""
    folder.mkdir()
    store = f'echo "$@" > {folder}/arguments; cat > {folder}/stdin'
    (folder / "kubectl").write_text(f"#!/bin/sh\n{store}\necho 'configmap/x {status}'\necho 'rayjob.ray.io/x {status}'\nexit {code}\n")
    (folder / "kubectl").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_the_manifest_is_applied_by_kubectl(workspace, file, tmp_path):
    result = workspace.manta("train", str(file), *EVERYTHING, "--on", "kubernetes", PATH=kubectl(tmp_path / "bin"))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "configmap/x created\nrayjob.ray.io/x created\n"
    assert (tmp_path / "bin" / "arguments").read_text() == "apply -f -\n"
    assert (tmp_path / "bin" / "stdin").read_text() == kubernetes.render(config.load(file, EVERYTHING))


def test_an_existing_job_is_reported_as_not_started(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", kubectl(tmp_path / "bin", status="unchanged"))
    assert launch(config.load(file, EVERYTHING), "kubernetes", dry_run=False) == 0
    assert "run kubectl delete rayjob mine --namespace training, then" in capsys.readouterr().err


def test_a_refusal_of_kubectl_is_exit_code_1(file, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", kubectl(tmp_path / "bin", code=7))
    assert launch(config.load(file), "kubernetes", dry_run=False) == 1


def test_without_kubectl_the_command_is_refused(workspace, file):
    result = workspace.manta("train", str(file), "--on", "kubernetes", PATH="/nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--on kubernetes: expected kubectl on PATH, got none. Install it, or add --dry-run" in result.stderr


def test_an_unsupported_target_is_refused(file):
    with pytest.raises(InputError, match=r"--on: expected one of local, ssh:FILE.*, got 'kubernets'"):
        launch(config.load(file), "kubernets")


STAND_IN = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(75)))
print(flush=True)
time.sleep(60)
"""


@contextmanager
def python(*arguments: str) -> Iterator[subprocess.Popen]:
    """A process with the arguments of controller or rank, which takes half a second to exit."""
    with subprocess.Popen([sys.executable, "-c", STAND_IN, *arguments], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def pre_stop(*arguments: str) -> float:
    """Run the hook and return its seconds."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-P", "-m", "manta.launch.targets.pre_stop", *arguments], check=True, timeout=30)
    return time.monotonic() - start


def test_a_pod_stops_its_controller_and_waits_for_it(tmp_path):
    file, run = str(tmp_path / "run.yaml"), str(tmp_path / "run")
    with (
        python("-m", "manta.launch", "train", file, "--on", "auto") as controller,
        python("-m", "manta.launch", "train", f"{file}.other", "--on", "auto") as other,
    ):
        pre_stop(file, run, "20")
        assert controller.poll() == 75, "the hook returned before the controller had exited"
        assert other.poll() is None


def test_a_pod_waits_for_its_ranks_but_not_forever(tmp_path):
    file, run = str(tmp_path / "run.yaml"), str(tmp_path / "run")
    with python("-m", "manta.trainer", run) as rank:
        assert pre_stop(file, run, "1") >= 1
        assert rank.poll() is None, "only the controller ends ranks"
        rank.send_signal(signal.SIGTERM)
        pre_stop(file, run, "20")
        assert rank.poll() == 75
