"""`python -m manta.launch` is `manta`."""

from manta.launch.cli import main

main()
