"""Supervision of a run: attempts, failures, restarts, and the event log."""
