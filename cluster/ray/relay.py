"""`python -P -m manta.cluster.ray.relay PIPE ...`: pass standard input on to the hosts of a SLURM job, which its script starts.

A controller in a container cannot call srun. It runs this instead, as it would run srun: it ends when the hosts have ended, and they end
when its standard input is closed.
"""

import os
import select
import sys
from pathlib import Path

from manta.cluster.protocol import ExitCode


def main() -> int:
    with Path(sys.argv[1]).open("wb", buffering=0) as pipe:  # waits for the script's srun
        poll = select.poll()
        poll.register(sys.stdin, select.POLLIN)
        poll.register(pipe, 0)  # reports only that its reader is gone
        while True:
            for file, _ in poll.poll():
                if file == pipe.fileno():
                    return ExitCode.FAILED
                if not (content := os.read(file, 1 << 16)):
                    return ExitCode.DONE
                pipe.write(content)


if __name__ == "__main__":
    sys.exit(main())
