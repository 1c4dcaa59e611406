"""Training with DeepSpeed, its memory, and its checks."""
