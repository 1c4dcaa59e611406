"""Write a run's last event if Ray ends the controller's process: `python -I -S witness.py EVENT_LOG LINE MESSAGE`.

Ray's code ends the process if its head dies while the process connects, and holds Python's lock until then: only another process can act.
It waits for the end of its standard input. What it reads before is sent once Ray has started.
"""

import json
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def witness(event_log: Path, line: dict[str, object]) -> Generator[None]:
    """Have the line written if this process ends before the context does."""
    message = "manta: expected a Ray that starts, got one with processes that ended. Run the command again.\n"
    command = [sys.executable, "-I", "-S", __file__, str(event_log), json.dumps(line), message]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    except OSError:  # no process is left: Ray's start reports it
        yield
        return
    try:
        yield
    finally:
        process.communicate(b"started")


def main() -> None:
    path, line, message = sys.argv[1:]
    if not sys.stdin.read():
        with Path(path).open("a") as event_log:
            event_log.write(f"{line}\n")
        sys.stderr.write(message)


if __name__ == "__main__":
    main()
