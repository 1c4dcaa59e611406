"""`manta drill`: what will happen to a run is done to it beforehand, on the cluster it is meant for."""
