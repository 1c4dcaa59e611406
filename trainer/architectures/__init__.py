"""Model classes of transformers that our models equal: their config keys and tensor names. New classes: families.yaml."""
