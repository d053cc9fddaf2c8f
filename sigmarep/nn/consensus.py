"""Consensus in place of attention (arXiv 2601.22614): tokens take gradient steps on an energy of their local graph.

After a public implementation of the layer, which may not be the authors' own; the paper itself could not be read. Two
choices are this project's: η is one number for each iteration, where that implementation has one for each position as
well, so that sequences have any length; and causal layers keep the edges towards the past alone.

Shapes: B batch, T tokens, E edges that leave a token, N heads, H head_dim, D width.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep import fields
from sigmarep.nn.attention import DEFAULT_KERNEL_INIT, AttentionConfig
from sigmarep.nn.axes import with_axes
from sigmarep.nn.linear import Initializer, Reparam, SigmaDenseGeneral, handed_on, slot_scaled
from sigmarep.nn.positions import rotated
from sigmarep.nn.visibility import FULL, Visibility

TOKEN_MIXINGS = ("attention", "consensus")
NO_CONTEXT = (
    "token_mixing = 'consensus': cannot attend to a context, as decoders of translation do; expected 'attention'"
)
# Values of the fields of `AttentionConfig` that the layer honors beside their defaults.
HONORED: dict[str, tuple[Any, ...]] = {"attention_implementation": ("auto", "xla")}
# softplus(−2.2) = 0.105.
STEP_START = -2.2


class Consensus(nn.Module):
    """Mixes tokens by a few steps that lower the disagreement along the edges of a graph.

    Every ordered pair (i, j) with 0 < |i − j| ≤ `window` is an edge if both tokens see each other. With u the projected
    tokens, ρ their rotation by i − j (none without `rotary_base`), α_ij > 0 and the rows of Λ_ij unit vectors, both from
    the layer's inputs x_i and x_j by an MLP each,

        r_ij = (α_ij I + Λ_ijᵀ Λ_ij) (ρ u_i − u_j)    and    u_i ← u_i − η (Σ_j r_ij − Σ_k r_ki),

    `iterations` times, each with its own learned η > 0. In a causal layer an edge leads from the later token to the
    earlier one and moves the later one alone: no token depends on what follows. A projection ends the layer.

    It has no attention weights, and records no statistics of attention. Tokens far apart are mixed by depth alone: one
    layer reaches `window` · `iterations` tokens.

    Attributes:
      num_heads: N, a divisor of D. α is shared by the heads.
      use_bias: biases in all dense layers.
      value_scale: factor on the first and the last initial kernel (DeepNorm's β).
      rotary_base: as in `sigmarep.nn.MultiHeadAttention`.
      window, rank, hidden, iterations: largest distance of an edge; rows of Λ of a head; hidden units of the two MLPs;
        number of steps.
      reparam, gamma_init, gamma_trainable, power_vectors, power_steps, sigma_gradient, common_std: see
        `sigmarep.nn.linear.ReparametrizedLayer`.
      kernel_init, bias_init, dtype: as in `flax.linen.Dense`.
    """

    num_heads: int
    use_bias: bool = True
    value_scale: float = 1.0
    rotary_base: float = 0.0
    window: int = 4
    rank: int = 8
    hidden: int = 16
    iterations: int = 2
    reparam: Reparam = "sigma"
    gamma_init: str | float = "one"
    gamma_trainable: bool = True
    power_vectors: int = 1
    power_steps: int = 1
    sigma_gradient: bool = True
    common_std: float = SigmaDenseGeneral.common_std
    kernel_init: Initializer = DEFAULT_KERNEL_INIT
    bias_init: Initializer = nn.initializers.zeros_init()
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        visibility: Visibility = FULL,
        positions: jax.Array | None = None,
        cache_length: int = 0,
        deterministic: bool = True,
    ) -> jax.Array:
        """Mixes tokens (B, T, D) to (B, T, D); has the arguments of `sigmarep.nn.MultiHeadAttention`.

        Args:
          x: (B, T, D).
          context: refused.
          visibility: the tokens that see each other, by its `key_mask`, `segments` and `is_causal`.
          positions: of no account; an edge's rotation is by the distance of its tokens in the sequence.
          cache_length: decoding, if not 0; apply with `mutable=["cache"]`. x holds the next tokens, which see the earlier
            ones that the layer reaches through the collection `cache`, whatever `visibility` says.
          deterministic: of no account; the block has the dropout after the layer.

        Raises:
          ValueError: there is a context or a `visibility.mask`, or N does not divide D.
        """
        if context is not None:
            raise ValueError(NO_CONTEXT)
        if visibility.mask is not None:
            raise ValueError(
                f"visibility.mask of shape {visibility.mask.shape}: token_mixing = 'consensus' has no matrix to mask; "
                "expected key_mask, segments and is_causal alone"
            )
        if x.shape[-1] % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads}: does not divide the width {x.shape[-1]}")
        if not cache_length:
            return self._mixed(x, visibility)
        reach = self.window * self.iterations
        before = self.variable("cache", "cached_tokens", jnp.zeros, (x.shape[0], reach, x.shape[-1]), x.dtype)
        index = self.variable("cache", "cached_index", lambda: jnp.zeros((), jnp.int32))
        whole = jnp.concatenate([before.value, x], axis=1)
        real = jnp.arange(whole.shape[1])[None] >= reach - index.value
        before.value, index.value = whole[:, -reach:], index.value + x.shape[1]
        return self._mixed(whole, Visibility(key_mask=real, is_causal=True))[:, reach:]

    def _mixed(self, x: jax.Array, visibility: Visibility) -> jax.Array:
        past = range(-self.window, 0)
        offsets = [*past] if visibility.is_causal else [*past, *range(1, self.window + 1)]
        edges = _edges(visibility, x.shape[1], offsets)
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        init = slot_scaled(self.kernel_init, (self.value_scale,))
        state = self._dense(heads, "value", kernel_init=init)(x)
        strength = jax.nn.softplus(self._dense(1, "strength")(self._of_pairs(x, offsets, "strength")))[..., 0]
        rows = self._rows(x, offsets, heads)
        # Where there is no edge, its residual is 0.
        graph = _Graph(
            jnp.where(edges, strength, 0), rows._replace(scale=jnp.where(edges[..., None, None], rows.scale, 0))
        )
        steps = self.param("step_scale", nn.initializers.constant(STEP_START), (self.iterations,), jnp.float32)
        for step in jax.nn.softplus(steps).astype(state.dtype):
            state = with_axes(state, "batch", "length", "heads", "head_dim")
            state = state - step * self._gradient(state, graph, offsets, causal=visibility.is_causal)
        return self._dense(x.shape[-1], "out", axis=(-2, -1), adds=True, kernel_init=init)(state)

    def _rows(self, x: jax.Array, offsets: list[int], heads: tuple[int, int]) -> "_Rows":
        """Λ of every edge, its last kernel apart from the hidden units."""
        units = self._of_pairs(x, offsets, "rows")
        shape = (heads[0], self.rank, heads[1])
        # The effective kernel is what the layer makes of unit vectors.
        kernel = self._dense(shape, "rows", use_bias=False)(jnp.eye(self.hidden, dtype=units.dtype))
        if self.use_bias:
            bias = self.param("rows_bias", self.bias_init, shape, jnp.float32)
            kernel = jnp.concatenate([kernel, bias[None].astype(kernel.dtype)])
            units = jnp.concatenate([units, jnp.ones_like(units[..., :1])], axis=-1)
        wide, wide_kernel = units.astype(jnp.float32), kernel.astype(jnp.float32)
        products = jnp.einsum("knrh,lnrh->klnr", wide_kernel, wide_kernel)
        square = jnp.einsum("btek,btel->btekl", wide, wide).reshape(*units.shape[:3], -1)
        square = (square @ products.reshape(square.shape[-1], -1)).reshape(*units.shape[:3], *shape[:2])
        scale = jnp.where(square > 0, 1.0 / jnp.where(square > 0, square, 1.0), 0.0)
        return _Rows(units, kernel, scale.astype(units.dtype))

    def _gradient(self, state: jax.Array, graph: "_Graph", offsets: list[int], *, causal: bool) -> jax.Array:
        """Σ r_ij − Σ r_ki of every token, (B, T, N, H)."""
        turned = [state] * len(offsets)
        if self.rotary_base:
            turned = [rotated(state, jnp.array([[-offset]]), self.rotary_base) for offset in offsets]
        arriving = _starts(graph.strength, offsets)
        direct = jnp.zeros_like(state)
        for e, offset in enumerate(offsets):
            end = jnp.roll(state, -offset, axis=1)
            direct += graph.strength[:, :, e, None, None] * (turned[e] - end)
            if not causal:
                start = jnp.roll(turned[e], offset, axis=1)
                direct -= arriving[:, :, e, None, None] * (start - state)
        stacked = jnp.stack(turned, axis=2) if self.rotary_base else None
        return direct + graph.rows.applied(state, stacked, offsets, causal=causal)

    def _dense(self, features: int | tuple[int, ...], name: str, **options: Any) -> SigmaDenseGeneral:
        shared = handed_on(self) | {"kernel_init": self.kernel_init}
        return SigmaDenseGeneral(features, name=name, **(shared | options))

    def _of_pairs(self, x: jax.Array, offsets: list[int], name: str) -> jax.Array:
        """Hidden units (B, T, E, hidden) of an MLP of the pairs [x_i, x_j].

        The product with [x_i, x_j] is that with [x_i, 0] plus that with [0, x_j]: each token is multiplied twice in all,
        and not twice for each of its edges.
        """
        empty = jnp.zeros_like(x)
        halves = jnp.stack([jnp.concatenate(pair, axis=-1) for pair in ((x, empty), (empty, x))])
        start, end = self._dense(self.hidden, f"{name}_hidden", use_bias=False)(halves)
        hidden = start[:, :, None] + _ends(end, offsets)
        if self.use_bias:
            bias = self.param(f"{name}_hidden_bias", self.bias_init, (self.hidden,), jnp.float32)
            hidden = hidden + bias.astype(hidden.dtype)
        return nn.gelu(hidden, approximate=False)


class _Rows(NamedTuple):
    """Λ of every edge in parts; of its whole (B, T, E, N, rank, H) there is never an array.

    Λ is a sum over hidden units. So the kernel multiplies each token once, whatever the number of its edges, and what is
    shifted along the sequence has no features.

    Attributes:
      units: hidden units (B, T, E, K), the last of them 1 if there is a bias.
      kernel: (K, N, rank, H); their product with it is Λ before its rows are unit vectors.
      scale: 1 / the square of the length of each row, (B, T, E, N, rank); 0 for a row of zeros.
    """

    units: jax.Array
    kernel: jax.Array
    scale: jax.Array

    def applied(self, state: jax.Array, turned: jax.Array | None, offsets: list[int], *, causal: bool) -> jax.Array:
        """Σ Λ_ijᵀ Λ_ij (ρ u_i − u_j) − Σ Λ_kiᵀ Λ_ki (ρ u_k − u_i), (B, T, N, H); the first sum alone if causal.

        Args:
          state: u.
          turned: ρ u_i, (B, T, E, N, H); None where nothing turns.
        """
        own = jnp.einsum("btnh,knrh->btknr", state, self.kernel)
        # Units of the edges that arrive at a token.
        arriving = _starts(self.units, offsets)
        if turned is None:
            start = jnp.einsum("btek,btknr->btenr", self.units, own)
        else:
            start = jnp.sum(self.units[..., None, None] * jnp.einsum("btenh,knrh->bteknr", turned, self.kernel), axis=3)
        end = _ends_of_each(jnp.einsum("btek,btknr->btenr", arriving, own), offsets)
        along, units = self.scale * (start - end), self.units
        if not causal:
            along = jnp.concatenate([along, _starts(along, offsets)], axis=2)
            units = jnp.concatenate([units, -arriving], axis=2)
        return jnp.einsum("btknr,knrh->btnh", jnp.einsum("btek,btenr->btknr", units, along), self.kernel)


class _Graph(NamedTuple):
    """α (B, T, E) and Λ of the edges."""

    strength: jax.Array
    rows: _Rows


def _ends(x: jax.Array, offsets: list[int]) -> jax.Array:
    """The entries of (B, T, …) at the ends i + offset of every token's edges, (B, T, E, …).

    Past the ends of the sequence they are those of other tokens.
    """
    return jnp.stack([jnp.roll(x, -offset, axis=1) for offset in offsets], axis=2)


def _ends_of_each(x: jax.Array, offsets: list[int]) -> jax.Array:
    """As `_ends`, of (B, T, E, …) that has an entry for each edge."""
    return jnp.stack([jnp.roll(x[:, :, e], -offset, axis=1) for e, offset in enumerate(offsets)], axis=2)


def _starts(x: jax.Array, offsets: list[int]) -> jax.Array:
    """The entries of (B, T, E, …) of the edges that arrive at every token, from i − offset."""
    return _ends_of_each(x, [-offset for offset in offsets])


def _edges(visibility: Visibility, length: int, offsets: list[int]) -> jax.Array:
    """Bool (B or 1, T, E): the token i + offset is in the sequence, and both see each other but for causality."""
    tokens = jnp.arange(length)[None]
    ends = jnp.stack([tokens + offset for offset in offsets], axis=2)
    edges = (ends >= 0) & (ends < length)
    if visibility.key_mask is not None:
        edges &= visibility.key_mask[:, :, None] & _ends(visibility.key_mask, offsets)
    if visibility.segments is not None:
        edges &= visibility.segments[:, :, None] == _ends(visibility.segments, offsets)
    return edges


def check(config: Any) -> None:
    """Refuses fields of an `AttentionConfig` that change attention alone, where consensus stands in its place.

    Raises:
      ValueError: one of them is not at its default; the message begins with the field's name.
    """
    for name, declared in fields.of_dataclass(AttentionConfig).items():
        accepted = HONORED.get(name, (declared.default,))
        value = getattr(config, name)
        if name != "rotary_base" and value not in accepted:
            words = " or ".join(repr(each) for each in accepted)
            raise ValueError(f"{name} = {value!r}: expected {words} with token_mixing = 'consensus'")


def create_consensus(config: Any, num_heads: int, **others: Any) -> Consensus:
    """The layer in the place of that of `sigmarep.nn.attention.create_attention`, with its arguments."""
    return Consensus(num_heads, rotary_base=config.rotary_base, **others)
