"""A rank without a model: follows the contract of manta.cluster, counts steps with sleeps, and misbehaves when told to.

FAKE is a JSON dict in the environment: steps, step_time, warm_time, faults, each tied to an attempt and a rank, and slow: a rank, and
from which step to which it works twice as long as the others, who wait for it.
"""

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path


class Leave(BaseException):
    pass


def leave(*_):
    raise Leave


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
    signal.signal(signal.SIGTERM, leave)
    file = os.open(os.environ["MANTA_HEARTBEAT"], os.O_WRONLY | os.O_CREAT)
    progress, work = {"step": 0, "phase": "start"}, {}

    def beat(step, phase, **told):
        progress.update(step=step, phase=phase)
        work.update(told)
        os.pwrite(file, json.dumps({**progress, "time": time.monotonic(), **work}).encode().ljust(256), 0)

    beat(0, "start")
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        run(plan, beat)
    except Leave:
        if plan.get("save_fails"):
            sys.exit(143)
        time.sleep(plan.get("save_time", 0))
        sys.exit(75)
    except Exception as error:  # noqa: BLE001  whatever it is, it is to be reported
        report = {"type": type(error).__name__, "message": str(error), "traceback": traceback.format_exc(), **progress}
        report["category"] = "input" if isinstance(error, LookupError) else "exception"
        Path(os.environ["MANTA_ERROR"]).write_text(json.dumps(report))
        sys.exit(1)


def run(plan, beat):
    rank, attempt = int(os.environ["RANK"]), int(os.environ["MANTA_ATTEMPT"])
    faults = {int(step): fault for step, who, fault in plan.get("faults", []) if rank == who[1] and attempt in who[0]}
    start = plan.get("every", 0) * (attempt - 1)
    beat(start, "load")
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
        beat(step + 1, "step", **worked(plan, rank, step))
    beat(plan.get("steps", 10), "done")


def worked(plan, rank, step):
    if "slow" not in plan:  # as ranks that do not know it
        return {}
    who, first, last = plan["slow"]
    return {"work": 0.4 if rank == who and first <= step < last else 0.2}


if __name__ == "__main__":
    main()
