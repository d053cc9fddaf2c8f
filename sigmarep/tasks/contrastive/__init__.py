"""Contrastive learning of a ViT without labels: SimCLR and MoCo v3.

Labels are read by evaluation only: by nearest neighbours and by a linear probe on frozen features, always of whole
splits. `config.batch_size` counts pictures, of which each gives two views.
"""

from sigmarep.tasks.contrastive.data import open_data
from sigmarep.tasks.contrastive.model import FIELDS, create_model, default_config

__all__ = ["FIELDS", "create_model", "default_config", "open_data"]
