"""Load a trained or imported model into one process that does not train."""
