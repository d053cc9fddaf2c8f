"""Masked-image modelling as a task of sigmarep's, from outside: `config.task = "masked_images.task"`."""
