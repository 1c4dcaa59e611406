"""`manta drill`: fault injection into a short run, on the machines that a long one is meant for."""
