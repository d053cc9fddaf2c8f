"""Causal language modeling: predicts the next token of a text."""

from sigmarep.tasks.language_modeling.data import open_data
from sigmarep.tasks.language_modeling.model import FIELDS, create_model, default_config, planned_files

__all__ = ["FIELDS", "create_model", "default_config", "open_data", "planned_files"]
