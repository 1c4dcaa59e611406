"""Ranks: process groups, layout and collectives."""
