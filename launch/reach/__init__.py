"""A run reached from wherever its directory is seen: stopped, read, watched, sent into the background."""
