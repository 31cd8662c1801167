"""Image convolutional networks in JAX and Flax: exact architectures, exactly reproducible runs."""

__version__ = "0.1.0"
