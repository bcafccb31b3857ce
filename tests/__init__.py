"""Tests of the project; helpers are imported as tests.<folder>.<module>."""
