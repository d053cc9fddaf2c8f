"""σReparam in place of Flax's linear layers: `SigmaDense`, `SigmaDenseGeneral`, `SigmaConv`, `SigmaEmbed`.

Each is the Flax layer of the same name, with the same arguments and behaviour, whose kernel is replaced on its way into
the product (see `sigmarep.core.spectral`). Variables: `params/{kernel, bias, gamma}` and, changing as training goes on,
`spectral/{u, sigma}` (and `basis` with more than one power vector), float32 and of fixed shape.

    variables = layer.init(rng, x)
    y, updates = layer.apply(variables, x, mutable=["spectral"])   # training: one power step, stored
    y = layer.apply({"params": params, **updates}, x)              # evaluation: one power step, nothing stored

Each apply that may change `spectral` takes one power step from the state it was given, however often the layer is
called in it. A stack under `nn.scan` is the exception: each call of it takes one.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sigmarep.core import spectral

REPARAMS = ("none", "sigma", "spectral", "weight")


class Reparametrised(nn.Module):
    """What the layers share: the fields, and the replacement of the kernel.

    Attributes:
      reparam: "sigma", Ŵ = (γ/σ)W with γ learned; "spectral", the same with γ = 1 (spectral normalisation);
        "weight", weight normalisation with one gain an output; "none", the plain layer.
      gamma_init: γ at the start: a number, "one", or "sigma" for σ(W₀), which makes Ŵ₀ = W₀. For weight normalisation
        "sigma" stands for each output's own norm, which does the same.
      gamma_trainable: False keeps γ at its start; it then receives a zero gradient.
      power_vectors: vectors of the power iteration. 1 is the paper's; 4 follow fast training far more closely, with the
        same two reads of the kernel (see `sigmarep.core.spectral`). Cut to the smaller side of the kernel's matrix.
    """

    reparam: str = "sigma"
    gamma_init: str | float = "one"
    gamma_trainable: bool = True
    power_vectors: int = 1

    matrix_name: ClassVar[str] = "kernel"

    @nn.nowrap
    def param(self, name, init_fn, *init_args, unbox=True, **init_kwargs):
        """Flax's `param`, except that the layer receives the effective kernel when it asks for its kernel."""
        value = super().param(name, init_fn, *init_args, unbox=unbox, **init_kwargs)
        return self._effective(value) if name == self.matrix_name else value

    @nn.nowrap
    def _effective(self, kernel: jax.Array) -> jax.Array:
        if self.reparam == "none":
            return kernel
        if self.reparam not in REPARAMS:
            raise ValueError(f"reparam = {self.reparam!r}: expected one of {', '.join(REPARAMS)}")
        if getattr(self, "batch_dims", ()):
            raise ValueError("batch_dims: several kernels in one have no single spectral norm; use nn.vmap")
        features = self.features
        outputs = int(np.prod(features))
        matrix = spectral.matrix_view(kernel, outputs)
        if self.reparam == "weight":
            return spectral.weight_normalised(kernel, self._gamma(spectral.column_norms(matrix)))

        if self.power_vectors < 1:
            raise ValueError(f"power_vectors = {self.power_vectors}: expected at least 1")
        vectors = min(self.power_vectors, *matrix.shape)
        start = None

        def svd():
            nonlocal start
            if start is None:
                start = spectral.svd_block(matrix, vectors)
            return start

        if not (self.has_variable("spectral", "u") or self.is_mutable_collection("spectral")):
            raise ValueError(
                f"{type(self).__name__} {'/'.join(self.path)}: no spectral variables were given; pass the 'spectral' "
                "collection beside 'params', or fold the parameters and use reparam='none'"
            )
        u = self.variable("spectral", "u", lambda: svd()[0][0])
        basis = self.variable("spectral", "basis", lambda: svd()[0][1:]) if vectors > 1 else None
        sigma = self.variable("spectral", "sigma", lambda: svd()[1])
        gamma = jnp.float32(1.0)
        if self.reparam == "sigma":
            gamma = self._gamma(svd()[1] if self.is_initializing() else sigma.value)
        start_u, start_basis = self._start_of_this_apply(u.value, None if basis is None else basis.value)
        result = spectral.reparametrise(kernel, gamma, start_u, basis=start_basis)
        if self.is_mutable_collection("spectral") and not self.is_initializing():
            u.value, sigma.value = result.u, result.sigma
            if basis is not None:
                basis.value = result.basis
        return result.kernel

    @nn.nowrap
    def _gamma(self, of_kernel: jax.Array) -> jax.Array:
        def init(_):
            if self.gamma_init == "sigma":
                return of_kernel
            if isinstance(self.gamma_init, str) and self.gamma_init != "one":
                raise ValueError(f"gamma_init = {self.gamma_init!r}: expected 'one', 'sigma' or a number")
            value = 1.0 if self.gamma_init == "one" else float(self.gamma_init)
            return jnp.full(of_kernel.shape, value, jnp.float32)

        gamma = super().param("gamma", init)
        return gamma if self.gamma_trainable else jax.lax.stop_gradient(gamma)

    @nn.nowrap
    def _start_of_this_apply(self, *vectors: Any) -> tuple[Any, ...]:
        assert self.scope is not None
        # The root scope lives as long as one apply. The second call of a shared layer starts from the same vectors as
        # the first, so two views of a batch cost one power step, not two.
        starts = vars(self.scope.root).setdefault("_spectral_starts", {})
        return starts.setdefault(self.scope.path, vectors)


class SigmaDense(Reparametrised, nn.Dense):
    """`flax.linen.Dense` under σReparam; kernel (inputs, features), γ of shape ()."""


class SigmaDenseGeneral(Reparametrised, nn.DenseGeneral):
    """`flax.linen.DenseGeneral` under σReparam.

    σ is that of the matrix contracted axes × features: (d, heads, head_dim) is d × (heads · head_dim).
    """


class SigmaConv(Reparametrised, nn.Conv):
    """`flax.linen.Conv` under σReparam.

    σ is that of the kernel read as the matrix (window · in / groups) × features, as in the paper's code; it is not the
    norm of the convolution operator.
    """


class SigmaEmbed(Reparametrised, nn.Embed):
    """`flax.linen.Embed` under σReparam; σ is that of the table (num_embeddings, features), γ of shape ()."""

    matrix_name: ClassVar[str] = "embedding"
