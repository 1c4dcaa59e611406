"""Tie a command to its parent, then become it: `python -I -S leash.py PARENT_PID COMMAND…`.

A rank must never outlive its agent, however the agent ends. The kernel sees to it (PR_SET_PDEATHSIG), but only the child itself can
ask for that; this program is the place, for Popen's preexec_fn is unsafe in a process with threads. The tie survives exec and is cut
when the spawning thread ends, so the agent spawns from one that lives as long as it does.

A SIGTERM waits until the command unblocks it: one that comes while a rank still imports is for the run, not for this rank alone.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died before the tie was made
        sys.exit("the agent is gone")
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGTERM])  # Ray blocks SIGINT for its children
    try:
        os.execvp(command[0], command)  # noqa: S606  no shell is wanted
    except OSError as error:
        sys.exit(f"can not start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
