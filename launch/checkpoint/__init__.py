"""`manta checkpoint`: list, verify, inspect, prune, request and convert checkpoints."""
