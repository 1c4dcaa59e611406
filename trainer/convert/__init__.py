"""Convert models and checkpoints from and to other formats. No rank imports this."""
