"""The objective: pure losses, and what joins policy and reference to one number with its metrics."""
