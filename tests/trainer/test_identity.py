"""The identity of a run stays the same across renamed and added config keys, and changes with everything else."""

import os
from pathlib import Path

import pytest
from old_run import IDENTITIES, MODIFIED, copy_old_run
from pydantic import BaseModel

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.config_history import RENAMED, as_version_1, identifying_keys, upgrade, version_1_keys
from manta.data.errors import InputError
from manta.data.prepare import prepare
from manta.data.source_config import FilterConfig, SourceConfig
from manta.data.sources.source import identity as source_identity
from manta.launch.config import RunConfig, load
from manta.launch.run.resume_check import check_same_run
from manta.trainer.checkpoint.manifest import from_bytes
from manta.trainer.config.identity import identity_of
from manta.trainer.config.model import ExpertsConfig, ModelConfig
from manta.trainer.optim.schedules import learning_rate
from manta.trainer.pretrained.load import ImportSource, _read_import
from manta.trainer.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDirectory:
    home = RunDirectory(copy_old_run(tmp_path / "somewhere else"))
    monkeypatch.chdir(home.path.parent)
    return home


def digest(config: RunConfig, run: RunDirectory) -> str:
    return identity_of(config, run.prepared())["config"]


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_of_an_old_config_is_unchanged(run, name):
    config = RunConfig.model_validate(upgrade(IDENTITIES[name]["config"]))
    assert digest(config, run) == IDENTITIES[name]["digest"]
    seed = config.run.model_copy(update={"seed": 6})
    assert digest(config.model_copy(update={"run": seed}), run) != IDENTITIES[name]["digest"]


def test_identity_of_the_old_run_is_the_stored_one(run):
    [name] = run.open_checkpoints().names()
    stored = from_bytes(run.open_checkpoints().manifest(name), name).identity
    assert identity_of(run.config(), run.prepared()) == stored
    assert identity_of(load(run.config_file), run.prepared()) == stored
    changed = load(run.config_file, ["data.sources=[{name: prose, path: text/prose.jsonl}, {name: code, path: text/code.jsonl}]"])
    assert identity_of(changed, run.prepared()) != stored


def test_an_old_run_is_refused_under_another_config(run):
    check_same_run(run, load(run.config_file, ["train.activation_checkpointing=none", "guard.replica_check_every_steps=1"]))
    with pytest.raises(InputError, match=r"model.dropout 0.1 -> 0.2\. "):
        check_same_run(run, load(run.config_file, ["model.dropout=0.2"]))
    with pytest.raises(InputError, match=r'data.sources \[.*\] -> \[{"path": "other", "name": "prose", "filter": ') as refused:
        check_same_run(run, load(run.config_file, ["data.sources=[{name: prose, path: other}, {name: code, path: text/code.jsonl}]"]))
    assert "null" not in str(refused.value), "what is unset is not shown"


def test_an_extended_run_says_how_its_learning_rate_jumps(run, capsys):
    """The run was saved at step 10 of 20: linear warmup over 5 steps, then a cosine."""
    check_same_run(run, load(run.config_file))
    check_same_run(run, load(run.config_file, ["train.steps=40", "schedule.steps=20"]))
    assert capsys.readouterr().err == ""
    check_same_run(run, load(run.config_file, ["train.steps=40"]))
    old = load(run.config_file)
    rates = [learning_rate(old.schedule, peak=old.optimizer.learning_rate, step=10, steps=steps) for steps in (20, 40)]
    assert rates[0] < 0.9 * rates[1]
    notice = f"learning rate of step 11: {rates[0]:.3g} in the schedule of 20 steps, {rates[1]:.3g} in that of 40"
    assert capsys.readouterr().err == f"{notice}; to keep the first schedule: schedule.steps=20\n"


def test_an_old_corpus_is_found(run):
    config = run.config()
    found = prepare.find_prepared(config.data, config.tokenizer)
    assert found == run.prepared().model_copy(update={"tokenizer": Path("prepared/tokenizer-89bf5898d874/tokenizer.json").absolute()})
    os.utime("text/code.jsonl", ns=(0, 0))
    assert prepare.find_prepared(config.data, config.tokenizer) is None


def test_identity_of_a_source_hashes_the_old_names(run):
    code = run.config().data.sources[1]
    size = Path(code.path).stat().st_size
    assert source_identity(code) == [code.path, [(code.path, size, MODIFIED)], {"filter": {"without": "secret"}}]


class LaterExperts(ExpertsConfig):
    capacity: float | None = None


class LaterModel(ModelConfig):
    experts: LaterExperts | None = None
    norm_bias: bool = True


class LaterFilter(FilterConfig):
    language: str = "any"


class LaterSource(SourceConfig):
    filter: LaterFilter = LaterFilter()
    weight: float = 1.0


class LaterData(DataConfig):
    sources: tuple[LaterSource, ...]


class LaterSection(BaseModel):
    enabled: bool = False


class LaterConfig(RunConfig):
    data: LaterData
    model: LaterModel
    distillation: LaterSection = LaterSection()
    note: str = ""


ADDED = {
    "model.norm_bias": {"model": {"norm_bias": False}},
    "model.experts.capacity": {"model": {"experts": {"capacity": 1.5}}},
    "data.sources.weight": {"data": {"sources": [{"weight": 2.0}, {}]}},
    "data.sources.filter.language": {"data": {"sources": [{"filter": {"language": "en"}}, {}]}},
    "a section": {"distillation": {"enabled": True}},
    "a key without a section": {"note": "x"},
}


def laid_over(tree, more):
    if isinstance(tree, list):
        return [laid_over(one, other) for one, other in zip(tree, more, strict=True)]
    return {**tree, **{k: laid_over(tree[k], v) if isinstance(v, dict | list) and k in tree else v for k, v in more.items()}}


def test_an_added_key_counts_only_if_it_differs_from_its_default(run):
    old = IDENTITIES["every renamed key"]
    tree = upgrade(old["config"])
    digests = {name: digest(LaterConfig.model_validate(laid_over(tree, more)), run) for name, more in ADDED.items()}
    assert digest(LaterConfig.model_validate(tree), run) == old["digest"]
    assert len({old["digest"], *digests.values()}) == 1 + len(ADDED)


def test_an_added_key_of_a_source_names_another_corpus_only_if_it_differs(run):
    data, tokens = run.config().data, TokenizerConfig(vocabulary=300)
    same = tuple(LaterSource.model_validate(source.model_dump()) for source in data.sources)
    other = tuple(source.model_copy(update={"filter": LaterFilter(language="en")}) for source in same)
    found = [prepare.find_prepared(data.model_copy(update={"sources": sources}), tokens) for sources in (data.sources, same, other)]
    assert found[0] == found[1] is not None
    assert found[2] is None


def test_a_resumed_run_is_refused_with_an_added_key(run, monkeypatch):
    monkeypatch.setattr("manta.launch.run.resume_check.load", lambda _: LaterConfig.model_validate(tree))
    tree = load(run.config_file).model_dump()
    check_same_run(run, LaterConfig.model_validate(tree))
    with pytest.raises(InputError, match=r"model.norm_bias default -> false\. "):
        check_same_run(run, LaterConfig.model_validate(laid_over(tree, ADDED["model.norm_bias"])))


def flattened(tree, prefix=""):
    if isinstance(tree, list):
        return {key for one in tree for key in flattened(one, prefix)}
    if not isinstance(tree, dict):
        return set()
    return {f"{prefix}{key}" for key in tree} | {inner for key, value in tree.items() for inner in flattened(value, f"{prefix}{key}.")}


def test_renamed_keys_stay_in_their_section_and_exist():
    tree = upgrade(IDENTITIES["every renamed key"]["config"])
    written = flattened(RunConfig.model_validate(tree).model_dump(mode="json"))
    for old, new in RENAMED.items():
        assert old.rpartition(".")[0] == new.rpartition(".")[0]
        assert new in written
        assert old not in written


def test_keys_are_renamed_in_sections_and_lists_and_not_in_values():
    old = {"data": {"sources": [{"filter": {"without": "unique"}}]}, "model": {"options": {"experts": {"router_z": 1}}}}
    new = {"data": {"sources": [{"filter": {"not_matching": "unique"}}]}, "model": {"options": {"experts": {"router_z": 1}}}}
    assert upgrade(old) == new
    assert as_version_1(new) == old
    assert upgrade({"experts": {"router_z": 1}}, "model") == {"experts": {"router_z_loss": 1}}
    assert as_version_1({"data.ray_address": 1, "model.experts": {"router_z_loss": 2}}) == {"data.ray": 1, "model.experts": {"router_z": 2}}


def test_keys_of_version_1_are_all_still_there():
    experts = ExpertsConfig(experts=4, width=8)
    assert version_1_keys("model.experts") == identifying_keys(experts, "model.experts").keys()
    assert version_1_keys("model") <= ModelConfig.model_fields.keys()
    assert version_1_keys("data.sources.filter") == FilterConfig.model_fields.keys()


def test_the_model_of_an_old_import_is_read(tmp_path):
    file = tmp_path / "model.yaml"
    file.write_text("{layers: 1, width: 8, heads: 2, experts: {experts: 4, width: 8, router_z: 0.0}}")
    source = ImportSource(architecture="", dtype="float32", dtypes={}, end_of_text="", sequence_length=8, config={})
    (tmp_path / "source.json").write_bytes(source.to_json())
    model = _read_import(tmp_path)[1]
    assert model.experts is not None
    assert model.experts.router_z_loss == 0
    assert RunDirectory(tmp_path).model_differences(model) == []
