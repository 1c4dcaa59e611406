"""`manta status --watch`: the state of a run, live."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from manta.cluster.supervise.event_log import read_events
from manta.launch.config import find_run
from manta.launch.control.status import RUNNING, status, status_table
from manta.launch.inspect.charts import bar, console, grid, visible
from manta.trainer.metrics import format_duration, read_metrics

INTERVAL, MAX_SHARE = 1.0, 0.1  # seconds between two looks, and the share of the time that reading a long run's files may take
LEVELS = "▁▂▃▄▅▆▇█"
CURVES = {"train/loss": "loss", "eval/loss": "validation", "tokens_per_second": "tokens/s"}
EVENTS, RANKS, WIDTH = 6, 8, 60  # events and ranks that are shown, and columns of a curve


def watch(directory: Path) -> dict[str, Any]:
    """Show the state until the run has ended. Return the last one. A Ctrl-C ends only this."""
    run_dir = find_run(directory)
    state, out = status(run_dir.path), console()
    with Live(console=out, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            start = time.monotonic()
            lines, events = read_metrics(run_dir.metrics_file), read_events(run_dir.events_file)
            live.update(Group(status_table(state), progress(state), curves(lines), ranks(state), last_events(events)), refresh=True)
            if state["state"] != RUNNING:
                break
            time.sleep(max(INTERVAL, (time.monotonic() - start) / MAX_SHARE))
            state = status(run_dir.path)
    if not out.is_terminal:
        out.line()  # after the last line, as on a terminal
    return state


def progress(state: dict[str, Any]) -> Text:
    share = state["step"] / state["steps"]
    return Text(f"\n{bar(share, WIDTH):<{WIDTH}} {share:.0%}\n")


def curves(lines: Sequence[dict[str, Any]]) -> Any:
    """Return a table with the course of each value so far, its range and its newest value."""
    table = grid(3)
    for key, name in CURVES.items():
        if values := [line[key] for line in lines if isinstance(line.get(key), int | float)]:
            table.add_row(name, sparkline(values, WIDTH), f"{values[0]:,.5g} to {values[-1]:,.5g}")
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """Return means of at most `width` parts of the values, as bars between the least and the greatest of them."""
    count = min(width, len(values))
    parts = [values[number * len(values) // count : (number + 1) * len(values) // count] for number in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join(LEVELS[round((mean - low) / (high - low) * (len(LEVELS) - 1)) if high > low else 0] for mean in means)


def ranks(state: dict[str, Any]) -> Any:
    """Return a table of the ranks; of many, those that are silent the longest."""
    found = state["ranks"]
    silent = sorted(found, key=lambda rank: -rank["silent_seconds"])[:RANKS]
    table = grid(5)
    for rank in sorted(silent, key=lambda rank: rank["rank"]):
        heartbeat = f"heartbeat {rank['silent_seconds']:.1f} s ago"
        table.add_row(f"rank {rank['rank']}", visible(rank["node"]), rank["phase"] or "starting", f"step {rank['step']}", heartbeat)
    more = [Text(f"and {len(found) - RANKS:,} ranks with newer heartbeats")] if len(found) > RANKS else []
    return Group(Text(), table, *more) if found else Text()


def last_events(events: Sequence[dict[str, Any]]) -> Any:
    table = grid(3)
    now = time.time()
    for event in events[-EVENTS:]:
        text = str(event.get("message") or event.get("reason") or event.get("decision") or "")
        table.add_row(f"{format_duration(max(0.0, now - event['time']))} ago", event["event"], visible(text)[:300])
    return Group(Text(), table)
