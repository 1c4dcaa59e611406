"""Transformers as their papers write them: single-device code that knows no ranks."""
