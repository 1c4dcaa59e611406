"""Preparation of a corpus: documents are tokenized once, into shards."""
