"""Checkpoints that forget the machines that wrote them."""
