"""Named models that a config can start from."""
