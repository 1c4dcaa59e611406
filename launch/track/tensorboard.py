"""TensorBoard's event files, in RUN/tensorboard. All that they hold is in metrics.jsonl and events.jsonl: each start writes it again."""
# pyright: reportAttributeAccessIssue=false
# Generated classes have no types.

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event as Record
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from manta.data.errors import cut, redact
from manta.launch.track.follow import Event, scalars
from manta.trainer.config.sections import TrackConfig
from manta.trainer.config.yaml_file import to_yaml
from manta.trainer.metrics import Line
from manta.trainer.run_directory import RunDirectory
from manta.trainer.serve.texts import GeneratedText

START = SessionLog(status=SessionLog.START)  # TensorBoard then drops what it has read of this step and later ones
SUFFIX = ".manta"
SHOWN_EVENTS = 500


class TensorBoard:
    def __init__(self, run_dir: RunDirectory, _config: TrackConfig) -> None:
        directory = run_dir.path / "tensorboard"
        self.place = str(directory)
        directory.mkdir(exist_ok=True)
        for earlier in directory.glob(f"events.out.tfevents.*{SUFFIX}"):
            if earlier.stat().st_size:
                os.truncate(earlier, 0)  # not deleted yet: an open TensorBoard would wait for the rest of it
            else:
                earlier.unlink()
        now = time.time_ns()
        # Written without EventFileWriter: its thread holds errors back, of a full disk, for example.
        self._file = (directory / f"events.out.tfevents.{now // 10**9:010d}.{now % 10**9:09d}{SUFFIX}").open("wb")
        self._writer = RecordWriter(self._file)
        self._step, self._events = 0, list[Event]()
        self._add(file_version="brain.Event:2")
        self._add(session_log=START)
        config = to_yaml(run_dir.config().model_dump(mode="json"))
        self._add(summary=_text("config", "\n".join(f"    {line}" for line in redact(config).splitlines())))
        self._file.flush()

    def write(self, lines: Sequence[Line], events: Sequence[Event]) -> None:
        for line in lines:
            if line["step"] <= self._step:
                self._add(step=line["step"], session_log=START)
            self._step = line["step"]
            self._add(step=self._step, wall_time=line.get("time", 0.0), summary=_numbers(scalars(line)))
        if events:
            self._events = [*self._events, *events][-SHOWN_EVENTS:]
            self._add(summary=_text("events", "\n".join(["| time | attempt | event | |", "|---|---|---|---|", *map(_row, self._events)])))
        self._file.flush()

    def measure(self, figures: Mapping[str, float]) -> None:
        self._add(step=self._step, summary=_numbers(figures))
        self._file.flush()

    def show(self, texts: Sequence[GeneratedText]) -> None:
        for step in sorted({text.step for text in texts}):
            self._add(step=step, summary=_text("samples", *(_sample(text) for text in texts if text.step == step)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _add(self, *, wall_time: float | None = None, **content: Any) -> None:
        self._writer.write(Record(wall_time=time.time() if wall_time is None else wall_time, **content).SerializeToString())


def _numbers(values: Mapping[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=key, simple_value=value) for key, value in values.items()])


def _text(tag: str, *markdown: str) -> Summary:
    """Return texts that TensorBoard shows in a table. Those of step 0 are dropped by no restart of the run."""
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(markdown))])
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[text.encode(errors="replace") for text in markdown])
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])


def _sample(text: GeneratedText) -> str:
    """Return a text verbatim, below its seed and prompt."""
    prompt = cut(text.prompt, 200).replace("`", "'")
    title = f"seed {text.seed}, prompt: `{prompt}`" if prompt else f"seed {text.seed}"
    return "\n".join([title, "", *(f"    {line}" for line in text.text.split("\n"))])


def _row(event: Event) -> str:
    details = {key: value for key, value in event.items() if key not in {"time", "attempt", "event"}}
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"]))
    text = redact(cut(json.dumps(details), 300)).replace("|", "\\|").replace("`", "'")
    return f"| {when} | {event['attempt']} | {event['event']} | `{text}` |"
