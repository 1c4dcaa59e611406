"""Nodes of a run: their agents, the placement of ranks, and the capacity there is."""
