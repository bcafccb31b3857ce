"""Checkpoints that are complete or absent, and the weights out of them."""
