"""`python -m manta.launch` runs `manta`."""

from manta.launch.cli import main

main()
