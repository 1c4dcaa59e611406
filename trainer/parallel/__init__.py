"""Parallel layers: the collectives that each kind of parallelism adds to a model."""
