"""Ranks: how the batch is split over them, and their process groups."""
