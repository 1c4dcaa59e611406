"""Model classes of transformers that have an equal of ours: the names of their config keys and tensors. New classes: families.py."""
