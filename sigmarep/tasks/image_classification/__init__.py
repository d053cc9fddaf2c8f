"""Supervised image classification with a Vision Transformer."""

from sigmarep.tasks.image_classification.data import open_data
from sigmarep.tasks.image_classification.model import FIELDS, create_model, default_config, planned_files

__all__ = ["FIELDS", "create_model", "default_config", "open_data", "planned_files"]
