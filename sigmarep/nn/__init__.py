"""Flax (Linen) modules under σReparam; needs jax and flax only."""

from sigmarep.nn.attention import MultiHeadAttention
from sigmarep.nn.check import check, decay_mask
from sigmarep.nn.convert import reparametrize
from sigmarep.nn.fold import fold
from sigmarep.nn.linear import SigmaConv, SigmaDense, SigmaDenseGeneral, SigmaEmbed
from sigmarep.nn.observe import observe
from sigmarep.nn.transformer import Mlp, TransformerBlock, TransformerStack
from sigmarep.nn.transformer_config import TransformerConfig

__all__ = [
    "Mlp",
    "MultiHeadAttention",
    "SigmaConv",
    "SigmaDense",
    "SigmaDenseGeneral",
    "SigmaEmbed",
    "TransformerBlock",
    "TransformerConfig",
    "TransformerStack",
    "check",
    "decay_mask",
    "fold",
    "observe",
    "reparametrize",
]
