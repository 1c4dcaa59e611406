"""The `manta` command, also as `python -m manta.launch`."""

import os
import signal
import sys


def main() -> None:
    """Run it. A Ctrl-C during its imports, which a shared disk can make slow, ends it without a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # else it is ignored, as in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from manta.launch import cli

    signal.signal(signal.SIGINT, handler)
    try:
        cli.main()
    except SystemExit as end:
        if "ray" in sys.modules and isinstance(end.code, int):
            os._exit(end.code)  # everything is closed and flushed, and Ray's C++ code can hang while Python ends
        raise


if __name__ == "__main__":
    main()
