"""What a person asks of checkpoints."""
