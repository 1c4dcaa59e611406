"""Ranks: layouts, sharding, process groups and collectives."""
