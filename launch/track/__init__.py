"""Trackers and alerts: they follow the files of a run, in a separate process."""
