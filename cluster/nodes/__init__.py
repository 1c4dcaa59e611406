"""The nodes of a run: placement of ranks, the agent on each node, and the processes that it supervises."""
