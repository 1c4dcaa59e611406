"""MLflow: all measurements of the metrics lines, the config as parameters, and the files of the run."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run

from manta.cluster.protocol import ExitCode
from manta.data.errors import cut
from manta.launch.track.follow import Event, scalars
from manta.launch.track.run_id import run_id
from manta.trainer.config.sections import TrackConfig
from manta.trainer.metrics import Line
from manta.trainer.run_directory import RunDirectory
from manta.trainer.serve.texts import GeneratedText

AT_ONCE = 20  # lines in a request, which may hold 1000 numbers
MAX_PARAMS, LONGEST_PARAM = 100, 500  # in a request; characters
STOPPED = {ExitCode.SAVED, ExitCode.INTERRUPTED, ExitCode.UNSAVED}


class Mlflow:
    """MLflow keeps every value of a metric: those of a repeated step are both there, and the later one has the later time.

    How many values the metric `step` has says which lines are there already.
    """

    def __init__(self, run_dir: RunDirectory, config: TrackConfig) -> None:
        assert config.mlflow is not None
        self._run_dir, self._line, self._step, self._status = run_dir, 0, 0, "RUNNING"
        self._client = MlflowClient(config.mlflow.uri)
        self._id = self._find_or_create(config.mlflow.experiment).info.run_id
        self._client.update_run(self._id, "RUNNING")
        self._written = len(self._client.get_metric_history(self._id, "step"))
        self.place = f"{config.mlflow.uri}, run {self._id}"
        self._save("manifest.json")

    def write(self, lines: Sequence[Line], events: Sequence[Event]) -> None:
        new = lines[max(0, self._written - self._line) :]
        self._line += len(lines)
        self._step = lines[-1]["step"] if lines else self._step
        for start in range(0, len(new), AT_ONCE):
            metrics = [metric for line in new[start : start + AT_ONCE] for metric in _metrics(line)]
            self._client.log_batch(self._id, metrics=metrics)
        for event in events:
            if event["event"] == "run-ended":
                code = event["exit_code"]
                self._status = "FINISHED" if code == ExitCode.DONE else "KILLED" if code in STOPPED else "FAILED"
            if event["event"] == "run-started":
                self._status = "RUNNING"

    def measure(self, figures: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._id, metrics=[Metric(key, value, now, self._step) for key, value in figures.items()])

    def show(self, _texts: Sequence[GeneratedText]) -> None:
        self._save("samples.jsonl")

    def close(self) -> None:
        self._save("events.jsonl", "report.html")
        if self._status != "RUNNING":
            self._client.set_terminated(self._id, self._status)

    def _find_or_create(self, experiment_name: str) -> Run:
        client, own_id = self._client, run_id(self._run_dir)
        found = client.get_experiment_by_name(experiment_name)
        experiment = found.experiment_id if found else client.create_experiment(experiment_name)
        if runs := client.search_runs([experiment], f"tags.manta = '{own_id}'"):
            return runs[0]
        run = client.create_run(experiment, tags={"manta": own_id}, run_name=self._run_dir.path.name)
        params = [Param(key, cut(str(value), LONGEST_PARAM)) for key, value in _flat(self._run_dir.config().model_dump(mode="json"))]
        for start in range(0, len(params), MAX_PARAMS):
            client.log_batch(run.info.run_id, params=params[start : start + MAX_PARAMS])
        return run

    def _save(self, *names: str) -> None:
        for name in names:
            if (file := self._run_dir.path / name).exists():
                self._client.log_artifact(self._id, str(file))


def _metrics(line: Line) -> list[Metric]:
    """Return the measurements of a line. `step` is the last one: it says that the line is there."""
    values = scalars(line) | {"step": float(line["step"])}
    return [Metric(key, value, int(1000 * line.get("time", 0.0)), line["step"]) for key, value in values.items()]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
