"""A server that speaks as much of Weights & Biases' protocol as its client needs to write a run, on loopback. It keeps what was written."""

import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

API_KEY = "0123456789" * 4
ENTITY = "team"
HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"


@dataclass
class TrackedRun:
    """A run as the server has it: `rows` by their offset in the history."""

    project: str
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def history(self) -> list[dict[str, Any]]:
        assert sorted(self.rows) == list(range(len(self.rows))), "rows are missing"
        return [self.rows[offset] for offset in sorted(self.rows)]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """The client resets connections when it ends."""


class WandbServer:
    """`trouble`: None; an HTTP status that each request gets; "hang": no request is answered while it
    lasts; or "gone".
    """

    def __init__(self) -> None:
        self.runs = dict[str, TrackedRun]()
        self.requests = 0
        self.unknown = list[str]()
        self.trouble: int | str | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._answer(self)

            def do_PUT(self) -> None:
                server._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY, "WANDB_MODE": "online"}

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.trouble = None
        self.close()

    def close(self) -> None:
        """Stop listening, and answer no request any more."""
        self._server.shutdown()
        self._server.server_close()
        self.trouble = self.trouble or "gone"

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.requests += 1
        while self.trouble == "hang":
            time.sleep(0.05)
        if self.trouble == "gone":
            request.close_connection = True
            return
        if self.trouble:
            status, answer = int(self.trouble), {"error": "in trouble"}
        else:
            status, answer = 200, self._respond(request.command, request.path, body)
        content = json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _respond(self, method: str, path: str, body: bytes) -> Any:
        match method, path.strip("/").split("/"):
            case "POST", ["graphql"]:
                query = json.loads(body)
                return self._graphql(query["query"], query.get("variables") or {})
            case "POST", ["files", _, _, run, "file_stream"]:
                return self._stream(self.runs[run], json.loads(body))
            case "POST", ["sdk", "otel", *_]:  # what the client reports of itself
                return {}
            case "PUT", ["upload", run, *name]:
                self.runs[run].files["/".join(name)] = body
                return {}
            case _:
                self.unknown.append(f"{method} {path}")
                return {}

    def _graphql(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        operation = re.split(r"\W+", query.strip(), maxsplit=2)[1]
        match operation:
            case "Viewer":
                viewer = {"id": "1", "entity": ENTITY, "username": "user", "email": "", "flags": "{}", "teams": {"edges": []}}
                return {"data": {"viewer": viewer}}
            case "ServerFeaturesQuery":
                return {"data": {"serverInfo": {"features": []}}}
            case "RunResumeStatus":
                return {"data": {"model": self._resume_status(variables)}}
            case "UpsertBucket":
                return {"data": {"upsertBucket": self._upsert(variables)}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/upload/{variables['run']}/{name}"} for name in variables["files"]]
                return {"data": {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}}
            case _:
                self.unknown.append(operation)
                return {"errors": [{"message": f"unknown operation {operation}"}]}

    def _resume_status(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        run, bucket = self.runs.get(variables["name"]), None
        if run is not None:
            tail = [json.dumps(row) for row in run.history[-1:]]
            bucket = {
                "id": variables["name"],
                "name": variables["name"],
                "summaryMetrics": json.dumps(run.summary),
                "displayName": run.name,
                "logLineCount": 0,
                "historyLineCount": len(run.rows),
                "eventsLineCount": 0,
                "historyTail": json.dumps(tail),
                "eventsTail": "[]",
                "config": json.dumps(run.config),
                "tags": [],
                "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": ENTITY}, "bucket": bucket}

    def _upsert(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        is_new = name not in self.runs
        run = self.runs.setdefault(name, TrackedRun(variables["project"]))
        run.name = variables.get("displayName") or run.name
        run.config = json.loads(variables["config"]) if variables.get("config") else run.config
        project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}}
        bucket = {"id": name, "name": name, "displayName": run.name, "description": None, "config": None, "sweepName": None}
        return {"bucket": {**bucket, "project": project, "historyLineCount": len(run.rows)}, "inserted": is_new}

    def _stream(self, run: TrackedRun, content: Mapping[str, Any]) -> dict[str, Any]:
        for name, part in (content.get("files") or {}).items():
            if name == HISTORY:
                run.rows |= {part["offset"] + number: json.loads(line) for number, line in enumerate(part["content"])}
            if name == SUMMARY:
                run.summary = json.loads(part["content"][-1])
        if content.get("complete"):
            run.exit_codes.append(content["exitcode"])
        return {}
