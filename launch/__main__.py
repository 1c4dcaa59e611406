"""The `manta` command, also as `python -m manta.launch`."""

import signal


def main() -> None:
    """Run it. A Ctrl-C during its imports, which a shared disk can make slow, ends it without a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # else it is ignored, as in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from manta.launch import cli

    signal.signal(signal.SIGINT, handler)
    cli.main()


if __name__ == "__main__":
    main()
