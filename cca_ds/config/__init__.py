"""A recipe, its schema and overrides, and DeepSpeed's file."""
