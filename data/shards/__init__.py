"""Token shards on disk, and the manifest of a corpus."""
