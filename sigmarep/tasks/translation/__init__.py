"""Machine translation with an encoder-decoder, scored by BLEU."""

from sigmarep.tasks.translation.data import open_data
from sigmarep.tasks.translation.model import FIELDS, create_model, default_config, planned_files

__all__ = ["FIELDS", "create_model", "default_config", "open_data", "planned_files"]
