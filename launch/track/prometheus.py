"""Prometheus: the newest metrics line as gauges, at a port of 127.0.0.1."""

import re
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from manta.launch.track.follow import Event, scalars
from manta.trainer.config.sections import TrackConfig
from manta.trainer.metrics import Line
from manta.trainer.run_directory import RunDirectory
from manta.trainer.serve.texts import GeneratedText


class Prometheus:
    def __init__(self, run_dir: RunDirectory, config: TrackConfig) -> None:
        assert config.prometheus is not None
        self._run, self._registry = run_dir.path.name, CollectorRegistry()
        self._gauges = dict[str, Gauge]()
        self._events = Counter("manta_events", "Events of the run by kind.", ["run", "event"], registry=self._registry)
        self._server, self._thread = start_http_server(config.prometheus, "127.0.0.1", self._registry)
        self.place = f"http://127.0.0.1:{config.prometheus}/metrics"

    def write(self, lines: Sequence[Line], events: Sequence[Event]) -> None:
        for line in lines[-1:]:
            self._set({**scalars(line), "step": line["step"], "time": line.get("time", 0.0)}, "of metrics.jsonl")
        for event in events:
            self._events.labels(self._run, event["event"]).inc()

    def measure(self, figures: Mapping[str, float]) -> None:
        self._set(figures, "so far")

    def show(self, _texts: Sequence[GeneratedText]) -> None:
        """Prometheus takes numbers only."""

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _set(self, values: Mapping[str, float], what: str) -> None:
        for key, value in values.items():
            name = "manta_" + re.sub(r"\W", "_", key, flags=re.ASCII)
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, f"{key} {what}.", ["run"], registry=self._registry)
            self._gauges[name].labels(self._run).set(value)
