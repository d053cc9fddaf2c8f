"""σReparam for JAX and Flax: Transformers whose attention cannot collapse while they train."""
