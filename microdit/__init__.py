"""microdit: train text-to-image diffusion transformers from scratch on a micro-budget."""

__version__ = "0.1.0"
