"""Read checkpoints that plain DeepSpeed saved, and convert them to ours. Imports nothing of DeepSpeed."""
