"""Model families of transformers that ours equal: config keys and tensor names."""
