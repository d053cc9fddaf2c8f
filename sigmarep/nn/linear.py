"""Flax's linear layers under σReparam: `SigmaDense`, `SigmaDenseGeneral`, `SigmaConv`, `SigmaEmbed`.

Each is the Flax layer of that name with the same arguments and behavior, except that the product uses the effective
kernel (see `sigmarep.core.spectral`). Variables: `params/{kernel, bias, gamma}`, and the collection
`spectral/{u, sigma}` (also `basis` with more than one power vector), which training updates; float32, of fixed shape.

    variables = layer.init(rng, x)
    y, updates = layer.apply(variables, x, mutable=["spectral"])   # training: one power step, stored
    y = layer.apply({"params": params, **updates}, x)              # evaluation: one power step, nothing stored

An apply with a mutable `spectral` makes one power step from the state that it was given, however often it calls the
layer. Layers stacked by `nn.scan` are the exception: they make one step per call.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sigmarep.core import norms, spectral

Reparam = Literal["none", "sigma", "spectral", "weight", "scale"]
REPARAMS: tuple[Reparam, ...] = get_args(Reparam)
Role = Literal["hidden", "input", "output", "projector", "position"]
ROLES: tuple[Role, ...] = get_args(Role)
Initializer = Callable[..., jax.Array]


# Traced once for all layers of one shape, where Python would trace the same dozens of operations for each of them and
# again in every scan; inlined, so that the program that is compiled is the same.
_reparametrize = jax.jit(spectral.reparametrize, inline=True, static_argnames=("steps", "through_sigma"))


# Fields that a module with dense layers of its own has under the layers' names.
HANDED_ON = (
    "use_bias",
    "reparam",
    "gamma_init",
    "gamma_trainable",
    "power_vectors",
    "power_steps",
    "sigma_gradient",
    "common_std",
    "bias_init",
    "dtype",
)


def handed_on(module: nn.Module) -> dict[str, Any]:
    """The arguments that the dense layers of `module` take from its own fields, `HANDED_ON`."""
    return {name: getattr(module, name) for name in HANDED_ON}


class ReparametrizedLayer(nn.Module):
    """Base class of the layers: their common fields, and the replacement of the kernel by the effective one.

    Attributes:
      reparam: "sigma", Ŵ = (γ/σ)W with a learned γ; "spectral", the same with γ = 1 (spectral normalization);
        "weight", weight normalization with one gain per output; "scale", αW with one learned α, named kernel_scale, where W
        has the standard deviation `common_std` at the start and α is such that αW₀ is what `kernel_init` gives (WeSaR,
        Nishida et al., 2024, arXiv 2410.05052; γ's fields have no part in it); "none", the plain layer.
      gamma_init: initial γ: a number, "one", or "sigma" for σ(W₀), so that Ŵ₀ = W₀. Under weight normalization "sigma"
        means the norm of each output's weights, so that again Ŵ₀ = W₀.
      gamma_trainable: False freezes γ at its initial value and gives it a zero gradient.
      power_vectors: number of vectors in the power iteration. The paper uses 1; 4 follow fast training far more closely
        for the same two reads of the kernel (see `sigmarep.core.spectral`). At most the smaller side of the kernel's
        matrix is used.
      power_steps: power steps of each call; the paper makes one, and found no gain in more.
      sigma_gradient: False takes σ as a constant of the gradient (`sigmarep.core.spectral.reparametrize`).
      common_std: initial standard deviation of all kernels under "scale". The paper's variance is 4e-5. Each kernel is
        measured, where the paper takes the deviation that its initializer is meant to have. The paper was read in a
        summary of its formulas alone.
      role: the layer's place in the model, one of `ROLES`, for those who treat layers by it (`sigmarep.nn.layers`): "input"
        reads what the model is given, "output" makes its predictions, "projector" is left away after pre-training,
        "position" is a table of positions; all others are "hidden". Changes nothing in the layer.
      makes: "query", "key" or "value", in a layer of attention whose output axes are heads and their dimensions; one word
        for each index of the first output axis if there are several.
      adds: its outputs are added to the residual stream, whose features they are.
    """

    reparam: Reparam = "sigma"
    gamma_init: str | float = "one"
    gamma_trainable: bool = True
    power_vectors: int = 1
    power_steps: int = 1
    sigma_gradient: bool = True
    common_std: float = 4e-5**0.5
    role: Role = "hidden"
    makes: tuple[str, ...] = ()
    adds: bool = False

    matrix_name: ClassVar[str] = "kernel"

    @nn.nowrap
    def param(
        self, name: str, init_fn: Callable[..., Any], *init_args: Any, unbox: bool = True, **init_kwargs: Any
    ) -> Any:
        """Flax's `param`, except that asking for the kernel returns the effective kernel."""
        if name == self.matrix_name and np.min(self.features) < 1:
            raise ValueError(f"{self._label()}: features = {self.features}: expected at least 1")
        if name == self.matrix_name and self.reparam == "scale":
            return self._scaled(init_fn, *init_args, unbox=unbox, **init_kwargs)
        value: Any = self._given(name, *init_args, unbox=unbox)
        if value is None:
            value = super().param(name, init_fn, *init_args, unbox=unbox, **init_kwargs)
        return self._effective(value) if name == self.matrix_name else value

    @nn.nowrap
    def _given(self, name: str, shape: Any = None, *_: Any, unbox: bool = True) -> Any:
        """A parameter of the expected shape, where there is one; None for Flax to make one, or to refuse it.

        To check the shape Flax traces the initializer of every parameter anew, a tenth of the tracing of a step.
        """
        if shape is None or self.is_initializing() or not self.has_variable("params", name):
            return None
        value: Any = self.get_variable("params", name)
        unboxed = nn.meta.unbox(value)
        if np.shape(unboxed) != tuple(np.atleast_1d(shape).tolist()):
            return None
        return unboxed if unbox else value

    @nn.nowrap
    def _scaled(self, init_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> jax.Array:
        """αW, whose W starts with the standard deviation `common_std`; a kernel of zeros stays with α = 1."""
        start = jnp.ones((), jnp.float32)

        def common(*args: Any, **kwargs: Any) -> Any:
            nonlocal start
            made = init_fn(*args, **kwargs)
            kernel = nn.meta.unbox(made)
            deviation = jnp.sqrt(jnp.mean(kernel.astype(jnp.float32) ** 2))
            start = jnp.where(deviation > 0, deviation / self.common_std, 1.0)
            return nn.meta.replace_boxed(made, (kernel / start).astype(kernel.dtype))

        kernel: Any = super().param(self.matrix_name, common, *args, **kwargs)
        scale: jax.Array = super().param("kernel_scale", lambda _: start)
        scale = scale if self.gamma_trainable else jax.lax.stop_gradient(scale)
        return spectral.scaled(kernel, scale)

    @nn.nowrap
    def _effective(self, kernel: jax.Array) -> jax.Array:
        if self.reparam == "none":
            return kernel
        if self.reparam not in REPARAMS:
            raise ValueError(f"reparam = {self.reparam!r}: expected one of {', '.join(REPARAMS)}")
        if getattr(self, "batch_dims", ()):
            raise ValueError("batch_dims: a batch of kernels has no single spectral norm; use nn.vmap")
        features = self.features
        outputs = int(np.prod(features))
        if self.reparam == "weight":
            return spectral.weight_normalized(
                kernel, self._gamma(spectral.column_norms(spectral.matrix_view(kernel, outputs)))
            )

        for name in ("power_vectors", "power_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")
        vectors = min(self.power_vectors, outputs, kernel.size // outputs)
        start = functools.cache(lambda: norms.leading_vectors(spectral.matrix_view(kernel, outputs), vectors))
        if not (self.has_variable("spectral", "u") or self.is_mutable_collection("spectral")):
            lifted = "inside nn.scan or nn.vmap also name it in variable_axes={'params': 0, 'spectral': 0}"
            if self.is_initializing():
                # `init` may change every collection, but for those that a transformation of Flax's does not pass on.
                raise ValueError(f"{self._label()}: the collection 'spectral' does not reach it; {lifted}")
            raise ValueError(
                f"{self._label()}: no spectral variables were given; pass the 'spectral' collection together with 'params' "
                f"({lifted}), or fold the parameters and use reparam='none'"
            )
        u = self.variable("spectral", "u", lambda: start()[0][0])
        basis = self.variable("spectral", "basis", lambda: start()[0][1:]) if vectors > 1 else None
        sigma = self.variable("spectral", "sigma", lambda: start()[1])
        gamma = jnp.float32(1.0)
        if self.reparam == "sigma":
            gamma = self._gamma(start()[1] if self.is_initializing() else sigma.value)
        start_u, start_basis = self._start_of_this_apply(u.value, None if basis is None else basis.value)
        result: spectral.Reparametrized = _reparametrize(
            kernel,
            gamma,
            start_u,
            basis=start_basis,
            steps=self.power_steps,
            through_sigma=self.sigma_gradient,
        )
        if self.is_mutable_collection("spectral") and not self.is_initializing():
            u.value, sigma.value = result.u, result.sigma
            if basis is not None:
                basis.value = result.basis
        return result.kernel

    @nn.nowrap
    def _label(self) -> str:
        """The layer's kind and path, for messages."""
        return f"{type(self).__name__} {'/'.join(self.path)}".rstrip()

    @nn.nowrap
    def _gamma(self, of_kernel: jax.Array) -> jax.Array:
        def init(_: jax.Array) -> jax.Array:
            if self.gamma_init == "sigma":
                return of_kernel
            try:
                value = 1.0 if self.gamma_init == "one" else float(self.gamma_init)
            except ValueError:
                raise ValueError(f"gamma_init = {self.gamma_init!r}: expected 'one', 'sigma' or a number") from None
            return jnp.full(of_kernel.shape, value, jnp.float32)

        gamma: jax.Array | None = self._given("gamma", of_kernel.shape)
        if gamma is None:
            gamma = super().param("gamma", init)
        return gamma if self.gamma_trainable else jax.lax.stop_gradient(gamma)

    @nn.nowrap
    def _start_of_this_apply(self, *vectors: Any) -> tuple[Any, ...]:
        assert self.scope is not None
        # The root scope lives as long as one apply. Every call of a shared layer starts from the vectors of the first
        # call, so that two views of a batch make one power step, not two.
        starts: dict[Any, tuple[Any, ...]] = vars(self.scope.root).setdefault("_spectral_starts", {})
        return starts.setdefault(self.scope.path, vectors)


class SigmaDense(ReparametrizedLayer, nn.Dense):
    """`flax.linen.Dense` under σReparam: kernel (inputs, features), γ of shape ()."""


class SigmaDenseGeneral(ReparametrizedLayer, nn.DenseGeneral):
    """`flax.linen.DenseGeneral` under σReparam.

    σ is the norm of the matrix (contracted axes, features): a kernel (d, heads, head_dim) is d × (heads · head_dim).
    """

    @nn.nowrap
    def __call__(self, inputs: jax.Array) -> jax.Array:
        axes = self.axis if isinstance(self.axis, Iterable) else (self.axis,)
        if not all(-inputs.ndim <= axis < inputs.ndim for axis in axes):
            raise ValueError(
                f"{self._label()}: axis = {self.axis}: expected axes of its input of shape {inputs.shape}, "
                f"{-inputs.ndim} to {inputs.ndim - 1}"
            )
        return super().__call__(inputs)


class SigmaConv(ReparametrizedLayer, nn.Conv):
    """`flax.linen.Conv` under σReparam.

    σ is the norm of the kernel reshaped to the matrix (window · inputs / groups, features), as in the paper's code. It is
    not the norm of the convolution operator.
    """


class SigmaEmbed(ReparametrizedLayer, nn.Embed):
    """`flax.linen.Embed` under σReparam: σ is the norm of the table (num_embeddings, features), γ of shape ()."""

    role: Role = "input"

    matrix_name: ClassVar[str] = "embedding"


def slot_scaled(init: Initializer, factors: tuple[float, ...]) -> Initializer:
    """An initializer of fused projections (D, slots · N · H) whose slots are multiplied by `factors`."""
    if set(factors) == {1.0}:
        return init

    def initializer(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        slots = init(key, shape, dtype).reshape(shape[0], len(factors), -1)
        return (slots * jnp.asarray(factors, dtype)[:, None]).reshape(shape)

    return initializer
