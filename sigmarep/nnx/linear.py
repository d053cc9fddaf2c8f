"""NNX's linear layers under σReparam."""

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from sigmarep.core import norms, spectral
from sigmarep.nn.layers import Axes, Layer

Reparam = Literal["sigma", "spectral"]


class Spectral(nnx.Variable):
    """u, σ or the other vectors of the power iteration."""


class Sigma(nnx.Module):
    """The common part of the layers; comes before the plain layer among the bases.

    Attributes:
      use_running_average: True, or `model.eval()`, stores no power step; `model.train()` sets it to False.
      gamma: γ, of the shape of the stacked axes; None under spectral normalization, where it is 1.
      u, sigma, basis: see `sigmarep.nn.linear`.
    """

    plain: ClassVar[type[nnx.Module]]
    matrix_name: ClassVar[str] = "kernel"

    use_running_average: bool
    gamma: Any
    u: Any
    sigma: Any
    basis: Any

    def __init__(
        self,
        *args: Any,
        reparam: Reparam = "sigma",
        gamma_init: float | str = "one",
        power_vectors: int = 1,
        **kwargs: Any,
    ):
        """Takes the arguments of the plain layer.

        Args:
          reparam: "sigma", or "spectral" for γ = 1.
          gamma_init: "one", a number, or "sigma" for γ = σ(W₀), so that the layer is the plain one at first.
          power_vectors: see `sigmarep.nn.linear.ReparametrizedLayer`.

        Raises:
          ValueError: one of these is none of the accepted.
        """
        super().__init__(*args, **kwargs)
        begin(self, reparam=reparam, gamma_init=gamma_init, power_vectors=power_vectors)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._on_effective(self.plain.__call__, *args, **kwargs)

    def effective_kernel(self) -> jax.Array:
        """Ŵ of the next evaluation; stores nothing."""
        return self._step()[0]

    def _on_effective(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        kernel, state = self._step()
        if not self.use_running_average:
            for name, value in state.items():
                getattr(self, name)[...] = value
        return method(_View(self, kernel), *args, **kwargs)

    def _step(self) -> tuple[jax.Array, dict[str, jax.Array]]:
        layer = layer_of(self)

        def step(kernel, gamma, u, basis):
            return spectral.reparametrize(kernel, gamma, u, basis=basis)

        for _ in layer.stacked:
            step = jax.vmap(step)
        sigma = self.sigma[...]
        gamma = jnp.ones_like(sigma) if self.gamma is None else self.gamma[...]
        basis = None if self.basis is None else self.basis[...]
        result = step(layer.ordered(getattr(self, self.matrix_name)[...]), gamma, self.u[...], basis)
        state = {"u": result.u, "sigma": result.sigma} | ({} if basis is None else {"basis": result.basis})
        return layer.restored(result.kernel), state


class _View:
    """A module with another kernel, for one call of a method of the plain layer."""

    def __init__(self, module: Any, kernel: jax.Array):
        self._module = module
        setattr(self, module.matrix_name, nnx.Param(kernel))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def begin(module: Any, *, reparam: Reparam, gamma_init: float | str, power_vectors: int) -> None:
    """Gives a module γ and the state of the power iteration."""
    if reparam not in ("sigma", "spectral"):
        raise ValueError(f"reparam = {reparam!r}: expected sigma or spectral")
    if power_vectors < 1:
        raise ValueError(f"power_vectors = {power_vectors}: expected at least 1")
    layer = layer_of(module)
    if layer.batch:
        raise ValueError(f"{type(module).__name__}: a batch of kernels has no single spectral norm; use nnx.vmap")

    def start(matrix):
        return norms.leading_vectors(matrix, min(power_vectors, *matrix.shape))

    for _ in layer.stacked:
        start = jax.vmap(start)
    rows, sigma = start(layer.matrices(getattr(module, module.matrix_name)[...]))
    module.use_running_average = False
    module.u, module.sigma = Spectral(rows[..., 0, :]), Spectral(sigma)
    module.basis = Spectral(rows[..., 1:, :]) if power_vectors > 1 else nnx.data(None)
    if reparam == "spectral":
        module.gamma = nnx.data(None)
        return
    module.gamma = nnx.Param(_initial_gamma(gamma_init, sigma))


def _initial_gamma(gamma_init: float | str, sigma: jax.Array) -> jax.Array:
    if gamma_init == "sigma":
        return sigma
    value = 1.0 if gamma_init == "one" else gamma_init
    if isinstance(value, str):
        raise ValueError(f"gamma_init = {gamma_init!r}: expected 'one', 'sigma' or a number")
    return jnp.full(sigma.shape, value, jnp.float32)


def layer_of(module: Any, path: str = "") -> Layer:
    """The axes of a plain or σReparam layer's kernel; leading axes that the layer does not know are stacked ones."""
    name = getattr(module, "matrix_name", "embedding" if isinstance(module, nnx.Embed) else "kernel")
    shape = tuple(getattr(module, name)[...].shape)
    axes = _axes(module)
    stacked = len(shape) - len(axes.batch) - len(axes.inputs) - len(axes.outputs)
    moved = {
        each: tuple(axis + stacked for axis in getattr(axes, each)) for each in ("inputs", "outputs", "batch", "window")
    }
    return Layer(**(vars(axes) | moved), name=f"{path}/{name}".lstrip("/"), shape=shape, stacked=tuple(range(stacked)))


def _axes(module: Any) -> Axes:
    if isinstance(module, nnx.LinearGeneral):
        batch, inputs, outputs = len(module.batch_axis), len(module.in_features), len(module.out_features)
        order = tuple(range(batch + inputs + outputs))
        return Axes(inputs=order[batch : batch + inputs], outputs=order[batch + inputs :], batch=order[:batch])
    if isinstance(module, nnx.Conv):
        window = tuple(range(len(module.kernel_size)))
        return Axes(
            inputs=(*window, len(window)),
            outputs=(len(window) + 1,),
            window=window,
            groups=module.feature_group_count,
        )
    return Axes(inputs=(0,), outputs=(1,), table=isinstance(module, nnx.Embed))


class SigmaLinear(Sigma, nnx.Linear):
    """`flax.nnx.Linear` under σReparam; the further arguments are those of `Sigma`."""

    plain = nnx.Linear


class SigmaLinearGeneral(Sigma, nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral` under σReparam: σ is the norm of the matrix (in_features, out_features)."""

    plain = nnx.LinearGeneral


class SigmaConv(Sigma, nnx.Conv):
    """`flax.nnx.Conv` under σReparam: σ is the norm of the matrix (window · inputs / groups, outputs)."""

    plain = nnx.Conv


class SigmaEmbed(Sigma, nnx.Embed):
    """`flax.nnx.Embed` under σReparam: σ is the norm of the table."""

    plain = nnx.Embed
    matrix_name = "embedding"

    def attend(self, query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        return self._on_effective(nnx.Embed.attend, query, *args, **kwargs)


KINDS: dict[type[nnx.Module], type[Sigma]] = {
    each.plain: each for each in (SigmaLinear, SigmaLinearGeneral, SigmaConv, SigmaEmbed)
}
