"""Alerts: a real server that fails twice before it accepts, and a real command."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from recorded_run import RecordedRun

from manta.launch.config import load
from manta.launch.track import alerts
from manta.launch.track.follow import track
from manta.launch.track.trackers import open_trackers

FAILED = "manta: mine: failure: rank 1 at step 9: killed by SIGKILL | see http://***@host/x"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(alerts, "FIRST_PAUSE", 0.02)


class Server(HTTPServer):
    """Answers with 503 at first, then accepts."""

    def __init__(self, failures: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures, self.received, self.times = failures, list[dict](), list[float]()
        self.url = f"http://127.0.0.1:{self.server_port}/hook"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.times.append(time.monotonic())
        if is_accepted := len(self.server.times) > self.server.failures:
            assert self.headers["Content-Type"] == "application/json"
            self.server.received.append(json.loads(content))
        self.send_response(200 if is_accepted else 503)
        self.end_headers()

    def log_message(self, *_):
        pass


def send(run: RecordedRun, *alerts_: dict) -> list[dict]:
    """Run the alerts over the run as it is. Returns what alerts.jsonl has."""
    config = load(run.run_dir.config_file, ["track.tensorboard=false", f"track.on_event={json.dumps(alerts_)}"]).track
    assert track(run.run_dir, open_trackers(run.run_dir, config), threading.Event()) == {}
    return [json.loads(line) for line in (run.directory / "alerts.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    recorded = RecordedRun(tmp_path / "mine")
    recorded.to_the_kill()
    recorded.to_the_end()
    return recorded


def test_a_server_that_fails_twice_gets_each_alert_once(run):
    with Server(failures=2) as server:
        delivered = send(run, {"url": server.url})
        assert [alert["kind"] for alert in server.received] == ["failure", "restart", "end"]
        assert len(server.times) == 5
        assert server.times[2] - server.times[1] > server.times[1] - server.times[0] > 0.02
        assert server.received[0]["text"] == FAILED
        assert server.received[2]["text"] == "manta: mine: end: exit code 0, done"
        assert server.received[0]["event"]["rank"] == 1
        assert [line["error"] for line in delivered] == [None] * 3
        send(run, {"url": server.url})  # as after a restart of the tracker
        assert len(server.received) == 3
        run.event("run-started", 3)
        run.event("run-ended", 3, exit_code=75)
        send(run, {"url": server.url, "events": ["end"]})
        assert [alert["text"] for alert in server.received[3:]] == ["manta: mine: end: exit code 75 (saved)"]


def test_a_spike_is_one_alert_and_no_failure(run):
    run.event("run-started", 3)
    run.event("spike", 3, step=70, message="step 70: expected a loss of at most 4, got 9", action="rollback", number=1)
    run.event("rank-failed", 3, rank=0, cause="SPIKE", step=69, message="SpikeError: step 70")
    with Server(failures=0) as server:
        send(run, {"url": server.url})
        assert [(alert["kind"], alert["text"]) for alert in server.received] == [
            ("spike", "manta: mine: spike: step 70: expected a loss of at most 4, got 9")
        ]


def test_alerts_before_the_newest_start_are_not_sent(run):
    run.event("run-started", 3)
    with Server(failures=0) as server:
        run.event("run-ended", 3, exit_code=1)
        send(run, {"url": server.url})
        assert [alert["text"] for alert in server.received] == ["manta: mine: end: exit code 1 (failed)"]


def test_a_command_reads_the_alert_from_its_standard_input(run, tmp_path):
    out = tmp_path / "out"
    script = 'test -e "$1.again" || { touch "$1.again"; exit 1; }; cat >> "$1"'  # fails at first
    send(run, {"command": ["sh", "-c", script, "sh", str(out)], "events": ["failure", "end"]})
    read = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(alert["kind"], alert["run"]) for alert in read] == [("failure", str(run.directory)), ("end", str(run.directory))]


def test_a_secret_url_is_read_from_the_environment(run, monkeypatch):
    with Server(failures=0) as server:
        monkeypatch.setenv("HOOK", server.url)
        send(run, {"url_variable": "HOOK", "events": ["end"]})
        assert len(server.received) == 1


@pytest.mark.parametrize(
    "target", [{"url": "http://127.0.0.1:9/x"}, {"url_variable": "MISSING"}, {"command": ["false"]}, {"command": ["/no"]}]
)
def test_one_that_never_succeeds_is_given_up_and_recorded(run, target, caplog):
    (line,) = send(run, target | {"events": ["end"]})
    assert line["event"] == "run-ended"
    assert line["error"]
    assert len([record for record in caplog.records if "alert, try" in record.message]) == alerts.TRIES
