"""The trackers of a run, beside its controller: `python -m manta.launch.track RUN`. The run has ended when its standard input ends."""

import logging
import os
import signal
import sys
import threading
from pathlib import Path

from manta.launch.track.follow import track
from manta.launch.track.trackers import open_trackers
from manta.trainer.run_directory import RunDirectory


def main() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # it was started with SIGTERM blocked, and so would be the commands of alerts
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("manta.launch.track").setLevel(logging.INFO)
    run_dir, ended = RunDirectory(Path(sys.argv[1])), threading.Event()

    def wait_for_end() -> None:
        while os.read(0, 1024):
            pass
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    sys.exit("\n".join(track(run_dir, open_trackers(run_dir, run_dir.config().track), ended).values()) or 0)


if __name__ == "__main__":
    main()
