"""Ray for a run: private or joined, its hosts, and the cluster as Ray lists it."""
