"""LlamaGen (arXiv 2406.06525)."""
