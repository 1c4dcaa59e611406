"""What a run has achieved, from its event log and metrics alone."""
