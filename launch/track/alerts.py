"""Alerts: at certain events of a run, run a command of the user's, or send JSON to a URL. Each is tried several times."""

import json
import logging
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from manta.cluster.line_file import LineFile
from manta.cluster.protocol import ExitCode
from manta.cluster.supervise.event_log import read_events
from manta.cluster.tail import Tail
from manta.data.errors import cut, one_line, printable, redact
from manta.launch.track.follow import Event
from manta.trainer.config.sections import AlertConfig, TrackConfig
from manta.trainer.metrics import Line
from manta.trainer.run_directory import RunDirectory
from manta.trainer.serve.texts import GeneratedText

TRIES, FIRST_PAUSE = 5, 1.0  # seconds; the pause doubles each time
URL_TIMEOUT, COMMAND_TIMEOUT = 10.0, 60.0  # seconds
RESTARTS = {"restart", "reallocate", "regroup"}
log = logging.getLogger(__name__)


class Alerts:
    """`alerts.jsonl` in the run directory lists those that were delivered or given up: a restart of the tracker does not repeat them.

    Events before the newest start of the run are not for alerts.
    """

    def __init__(self, run_dir: RunDirectory, config: TrackConfig) -> None:
        self._run_dir, self._alerts = run_dir, config.on_event
        starts = [event["time"] for event in read_events(run_dir.events_file) if event["event"] == "run-started"]
        self._since: float = max(starts, default=0.0)
        file = run_dir.path / "alerts.jsonl"
        self._done = {(line["time"], line["event"], line["alert"]) for line in Tail(file).lines(_parse)}
        self._file = LineFile(file)
        self.place = f"{len(self._alerts)} alerts"

    def write(self, _lines: Sequence[Line], events: Sequence[Event]) -> None:
        for event in events:
            kind = kind_of(event)
            for number, alert in enumerate(self._alerts):
                key = (event["time"], event["event"], number)
                if kind in alert.events and event["time"] >= self._since and key not in self._done:
                    error = _deliver(alert, _payload(self._run_dir, kind, event))
                    self._file.write(json.dumps({"time": key[0], "event": key[1], "alert": number, "error": error}).encode())

    def measure(self, _figures: Mapping[str, float]) -> None:
        """Figures are no alerts."""

    def show(self, _texts: Sequence[GeneratedText]) -> None:
        """Nor are texts."""

    def close(self) -> None:
        self._file.close()


def kind_of(event: Event) -> str | None:
    """Return the kind of alert that an event is for, if any."""
    match event:
        case {"event": "rank-failed", "cause": "SPIKE"}:
            return None  # the spike itself is an event
        case {"event": "rank-failed" | "node-lost" | "node-unfit"}:
            return "failure"
        case {"event": "spike" | "not-finite"}:
            return "spike"
        case {"event": "decided", "decision": str(decision)} if decision in RESTARTS:
            return "restart"
        case {"event": "run-ended"}:
            return "end"
        case _:
            return None


def _payload(run_dir: RunDirectory, kind: str | None, event: Event) -> dict[str, Any]:
    message = event.get("message") or event.get("reason") or ""
    if event["event"] == "run-ended":
        code = event["exit_code"]
        message = message or f"exit code {code}" + (f" ({ExitCode(code).name.lower()})" if code else ", done")
    if event["event"] == "rank-failed":
        message = f"rank {event['rank']} at step {event['step']}: {message}"
    text = f"manta: {run_dir.path.name}: {kind}" + (f": {printable(one_line(message))}" if message else "")
    details = {key: redact(cut(value, 1000)) if isinstance(value, str) else value for key, value in event.items() if key != "traceback"}
    return {"text": text, "run": str(run_dir.path), "kind": kind, "event": details}


def _deliver(alert: AlertConfig, payload: dict[str, Any]) -> str | None:
    """Run the command and send the request. Returns the errors of what failed to the last."""
    content = json.dumps(payload).encode() + b"\n"
    actions = [partial(_run, alert.command, content)] if alert.command else []
    if alert.url or alert.url_variable:
        actions.append(partial(_post, alert, content))
    return "; ".join(error for act in actions if (error := _try(act))) or None


def _try(act: Callable[[], None]) -> str | None:
    error = None
    for number in range(TRIES):
        time.sleep(FIRST_PAUSE * 2 ** (number - 1) if number else 0.0)
        try:
            return act()
        except (OSError, ValueError, subprocess.SubprocessError) as problem:
            error = f"{type(problem).__name__}: {printable(one_line(problem))}"
            log.warning("alert, try %d of %d: %s", number + 1, TRIES, error)
    return error


def _run(command: Sequence[str], content: bytes) -> None:
    subprocess.run(command, input=content, check=True, timeout=COMMAND_TIMEOUT, stdout=subprocess.DEVNULL)


def _post(alert: AlertConfig, content: bytes) -> None:
    url = alert.url or os.environ.get(alert.url_variable or "", "")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"expected an http or https URL in the environment variable {alert.url_variable}")
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})  # noqa: S310  it is http or https
    with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:  # noqa: S310
        response.read(1)


def _parse(line: bytes) -> dict[str, Any]:
    delivered = json.loads(line)
    if not isinstance(delivered, dict) or not {"time", "event", "alert"} <= delivered.keys():
        raise ValueError("expected a delivered alert")
    return delivered
