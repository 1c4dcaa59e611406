"""Where a run is launched, as `--on` names it: this machine, or a cluster."""
