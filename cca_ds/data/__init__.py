"""Images and their codes on disk, and how they reach training."""
