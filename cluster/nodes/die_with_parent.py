"""Run a command that the kernel kills when its parent ends: `python -I -S die_with_parent.py PARENT_PID COMMAND…`.

A rank must never outlive its agent, however the agent ends. Only the child itself can ask the kernel for that (PR_SET_PDEATHSIG), and
Popen's preexec_fn is unsafe in a process with threads. The setting survives exec. It applies to the end of the spawning thread, so the
agent spawns from a thread that lives as long as the agent.

SIGTERM stays blocked until the command unblocks it: during imports, a stop request is for the whole run, not for one rank.
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
    if os.getppid() != parent:  # it died before prctl
        sys.exit("the agent is gone")
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGTERM])  # Ray blocks SIGINT for its children
    try:
        os.execvp(command[0], command)  # noqa: S606  needs no shell
    except OSError as error:
        sys.exit(f"can not start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
