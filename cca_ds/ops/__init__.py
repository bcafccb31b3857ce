"""What models are written in: each op chooses its kernel inside."""
