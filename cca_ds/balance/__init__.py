"""Unequal ranks: their speed and memory, and the partition of a global batch over them."""
