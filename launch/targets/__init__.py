"""Launch targets: where a run is launched, as `--on` names it. New targets: dispatch.py."""
