"""cca_ds: large-scale fine-tuning of autoregressive image models with Condition Contrastive Alignment on DeepSpeed."""

__version__ = "0.1.0"
