"""σReparam for JAX and Flax: Transformers whose attention cannot collapse while they train."""

__version__ = "0.1.0"
