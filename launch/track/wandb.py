"""Weights & Biases: a row for each metrics line, with the files of the run."""

from collections.abc import Mapping, Sequence

import wandb

from manta.cluster.protocol import ExitCode
from manta.launch.track.follow import Event, scalars
from manta.launch.track.run_id import run_id
from manta.trainer.config.sections import TrackConfig
from manta.trainer.metrics import Line
from manta.trainer.run_directory import RunDirectory
from manta.trainer.serve.texts import GeneratedText

GOOD = {ExitCode.DONE, ExitCode.SAVED, ExitCode.INTERRUPTED, ExitCode.UNSAVED}
QUIET = wandb.Settings(
    console="off", silent=True, disable_code=True, disable_git=True, x_disable_meta=True, x_disable_stats=True, x_save_requirements=False
)


class Wandb:
    """A row's number is that of its line, so a restart writes only rows that are missing. A step that a run repeats has
    two rows: the later one, with the greater `attempt`, is valid.
    """

    def __init__(self, run_dir: RunDirectory, config: TrackConfig) -> None:
        assert config.wandb is not None
        self._run_dir, self._line = run_dir, 0
        self._figures: Mapping[str, float] = {}
        self._code: int = ExitCode.KILLED  # unless it says otherwise: the server shows whether a run has failed
        wandb.setup(QUIET)
        self._run = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            id=run_id(run_dir),
            name=run_dir.path.name,
            resume="allow",
            dir=run_dir.path,
            config=run_dir.config().model_dump(mode="json"),
            settings=QUIET,
        )
        self.place = self._run.dir if self._run.offline else self._run.url or ""
        self._written = self._run.step
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._save("manifest.json", "events.jsonl")

    def write(self, lines: Sequence[Line], events: Sequence[Event]) -> None:
        for event in events:
            if event["event"] in {"run-started", "run-ended"}:
                code = event.get("exit_code", ExitCode.KILLED)
                self._code = ExitCode.DONE if code in GOOD else code
        for line in lines:
            if self._line >= self._written:
                self._run.log({"step": line["step"], **scalars(line), **self._figures}, step=self._line, commit=True)
                self._figures = {}
            self._line += 1
        if events:
            self._save("events.jsonl")

    def measure(self, figures: Mapping[str, float]) -> None:
        self._figures = figures  # in the next row: the last one cannot change any more
        self._run.summary.update(dict(figures))

    def show(self, _texts: Sequence[GeneratedText]) -> None:
        self._save("samples.jsonl")

    def close(self) -> None:
        self._save("report.html")
        self._run.finish(exit_code=self._code)

    def _save(self, *names: str) -> None:
        for name in names:
            if (file := self._run_dir.path / name).exists():
                self._run.save(str(file), base_path=str(self._run_dir.path), policy="now")
