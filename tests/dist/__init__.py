"""Tests that start several ranks, and what starts them."""
