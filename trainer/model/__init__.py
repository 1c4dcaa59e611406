"""Transformers as in their papers: single-device code, independent of ranks."""
