"""Read checkpoints that plain DeepSpeed saved."""
