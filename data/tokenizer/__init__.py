"""Tokenizers: text to token ids and back, and how one is trained."""
