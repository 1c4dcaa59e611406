"""Micro batches, prefetched by a thread."""
