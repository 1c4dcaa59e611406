"""How a model lies on ranks: which weight is cut where, and what is exchanged for it."""
