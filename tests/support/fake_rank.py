"""A rank without a model: follows cluster/protocol.py, counts steps by sleeping, and injects faults into itself.

FAKE is a JSON object in the environment: steps, step_time, warm_time, faults (each for an attempt and a rank), and slow: a rank, and the
steps between which it works twice as long as the others, who wait for it.
"""

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path


class StopRequested(BaseException):
    pass


def stop(*_):
    raise StopRequested


def main():
    plan = json.loads(os.environ.get("FAKE", "{}"))
    time.sleep(plan.get("warm_time", 0))
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    os.environ.update(json.loads(line))
    log = os.open(os.environ["MANTA_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    signal.signal(signal.SIGTERM, stop)
    file = os.open(os.environ["MANTA_HEARTBEAT"], os.O_WRONLY | os.O_CREAT)
    progress, optional = {"step": 0, "phase": "start"}, {}

    def beat(step, phase, **fields):
        progress.update(step=step, phase=phase)
        optional.update(fields)
        os.pwrite(file, json.dumps({**progress, "time": time.monotonic(), **optional}).encode().ljust(256), 0)

    beat(0, "start")
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        run(plan, beat)
    except StopRequested:
        if plan.get("save_fails"):
            sys.exit(143)
        time.sleep(plan.get("save_time", 0))
        sys.exit(75)
    except Exception as error:  # noqa: BLE001  every error is reported
        report = {"type": type(error).__name__, "message": str(error), "traceback": traceback.format_exc(), **progress}
        report["category"] = "input" if isinstance(error, LookupError) else "exception"
        Path(os.environ["MANTA_ERROR"]).write_text(json.dumps(report))
        sys.exit(1)


def run(plan, beat):
    rank, attempt = int(os.environ["RANK"]), int(os.environ["MANTA_ATTEMPT"])
    faults = {int(step): fault for step, where, fault in plan.get("faults", []) if rank == where[1] and attempt in where[0]}
    start = plan.get("every", 0) * (attempt - 1)
    beat(start, "load", resumed_from=start)
    sys.stdout.write(f"environment {json.dumps(dict(os.environ))}\n")
    sys.stdout.flush()
    for step in range(start, plan.get("steps", 10)):
        beat(step, "step")
        match faults.get(step):
            case None:
                pass
            case "raise":
                raise RuntimeError("a loss of nan")
            case "input":
                raise LookupError("no such file: corpus.jsonl")
            case "hang":
                time.sleep(1000)
            case number:
                os.kill(os.getpid(), signal.Signals[number])
        time.sleep(plan.get("step_time", 0.02))
        beat(step + 1, "step", **work_of(plan, rank, step))
    beat(plan.get("steps", 10), "done")


def work_of(plan, rank, step):
    if "slow" not in plan:  # like ranks that do not measure it
        return {}
    slow_rank, first, last = plan["slow"]
    return {"work": 0.4 if rank == slow_rank and first <= step < last else 0.2}


if __name__ == "__main__":
    main()
