"""Text tokenized while it is read, without preparation."""
