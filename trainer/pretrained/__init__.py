"""Load a trained or imported model in one process."""
