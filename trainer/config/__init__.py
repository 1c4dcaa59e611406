"""The sections of a run config that a rank reads."""
