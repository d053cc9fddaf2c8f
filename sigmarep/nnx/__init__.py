"""Flax NNX under σReparam: its linear layers with the same arguments, and whole models converted in place.

    model = SomeModel(…, rngs=nnx.Rngs(0))
    reparametrize(model)                       # every linear layer and convolution in it; or build it of SigmaLinear, …
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)        # trains γ with the kernels

    model.train()                              # a call makes one power step and stores it
    model.eval()                               # a call makes one power step and stores nothing
    fold(model)                                # plain layers again, with the same outputs

γ is an `nnx.Param`; u, σ and the other vectors are `Spectral` variables, which belong in checkpoints. In training mode
every call of a layer makes a step: a layer that is called twice in one update makes two. The pair of functions in
`sigmarep.nn.trees` makes one, however often a layer is called (`layers` describes a model to it).
"""

from sigmarep.nnx.convert import as_variables, fold, layers, reparametrize
from sigmarep.nnx.linear import SigmaConv, SigmaEmbed, SigmaLinear, SigmaLinearGeneral, Spectral

__all__ = [
    "SigmaConv",
    "SigmaEmbed",
    "SigmaLinear",
    "SigmaLinearGeneral",
    "Spectral",
    "as_variables",
    "fold",
    "layers",
    "reparametrize",
]
