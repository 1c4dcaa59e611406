"""MLflow: its own client reads back what was written to its file store."""

import pytest
from fuzz import manta
from recorded_run import RecordedRun

from manta.launch.goodput import goodput
from manta.trainer.serve.texts import GeneratedText

mlflow = pytest.importorskip("mlflow")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path / "store"


def test_each_line_is_there_once_also_after_a_resume(tmp_path, store):
    run = RecordedRun(tmp_path / "mine")
    client = mlflow.MlflowClient(str(store))
    run.to_the_kill()
    for status, go_on in (("RUNNING", run.to_the_end), ("FINISHED", lambda: None), ("FINISHED", lambda: None)):
        done = manta("track", str(run.directory), "--mlflow", str(store), seconds=60)
        assert done.code == 0, done.stderr
        (found,) = client.search_runs([client.get_experiment_by_name("manta").experiment_id])
        assert (found.info.run_name, found.info.status) == ("mine", status)
        for key in ("train/loss", "eval/loss", "seconds/step"):
            history = client.get_metric_history(found.info.run_id, key)
            logged = [line for line in run.lines if key != "eval/loss" or key in line]
            expected = [(line["step"], line["seconds"]["step"] if key == "seconds/step" else line[key]) for line in logged]
            assert [(metric.step, metric.value) for metric in history] == expected
            newest = {metric.step: metric.value for metric in sorted(history, key=lambda metric: metric.timestamp)}
            assert key == "seconds/step" or newest == run.valid(key)
        assert found.data.metrics["goodput/training"] == pytest.approx(goodput(run.events(), run.lines).share)
        assert found.data.params["train.steps"] == "12"
        assert not any(key.startswith("cluster") for key in found.data.params)
        assert {file.path for file in client.list_artifacts(found.info.run_id)} == {"manifest.json", "events.jsonl"}
        go_on()
    (run.directory / "samples.jsonl").write_bytes(GeneratedText(step=12, seed=1, prompt="", text="a text").to_json() + b"\n")
    assert manta("track", str(run.directory), "--mlflow", str(store), seconds=60).code == 0
    assert "samples.jsonl" in {file.path for file in client.list_artifacts(found.info.run_id)}
