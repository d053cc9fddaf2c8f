"""Transformer blocks and stacks of them."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep.nn.axes import with_axes
from sigmarep.nn.linear import SigmaDense
from sigmarep.nn.norms import BranchScale
from sigmarep.nn.seq_vcr import seq_vcr
from sigmarep.nn.sphere import HiddenScale, SphereStep, unit
from sigmarep.nn.transformer_config import REMATS, TransformerConfig
from sigmarep.nn.visibility import FULL, Visibility


class Mlp(nn.Module):
    """Two dense layers with the activation and dropout between them.

    With `mlp_gate` the activation is of a layer `gate` beside the first, `up`, and multiplies it.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        c = self.config
        options = c.reparametrization() | {
            "kernel_init": c.initializer(c.beta),
            "use_bias": c.use_bias,
        }

        def projected(name: str) -> jax.Array:
            hidden = SigmaDense(c.mlp_dim, name=name, **options)(x)
            if c.norm == "sphere":
                hidden = HiddenScale(x.shape[-1], name=f"{name}_scale")(hidden)
            return with_axes(hidden, "batch", "length", "mlp")

        hidden = projected("up")
        hidden = c.activate(projected("gate")) * hidden if c.mlp_gate else c.activate(hidden)
        rate = c.dropout if c.activation_dropout is None else c.activation_dropout
        hidden = nn.Dropout(rate)(hidden, deterministic=deterministic)
        return SigmaDense(x.shape[-1], name="down", adds=True, **options)(hidden)


class TransformerBlock(nn.Module):
    """Self-attention, attention to a context if `cross_attention`, and MLP, each around a residual connection."""

    config: TransformerConfig
    cross_attention: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        drop_path: jax.Array | float = 0.0,
        *,
        visibility: Visibility = FULL,
        positions: jax.Array | None = None,
        context: jax.Array | None = None,
        context_visibility: Visibility = FULL,
        cache_length: int = 0,
        deterministic: bool = True,
    ) -> jax.Array:
        """Applies the block to (B, T, D).

        Args:
          x: (B, T, D).
          drop_path: this block's rate.
          visibility, positions: of self-attention, as in `MultiHeadAttention`.
          context, context_visibility: (B, S, D), and its tokens that each query sees, for cross-attention.
          cache_length, deterministic: as in `MultiHeadAttention`.
        """
        c = self.config
        keep: jax.Array | float = 1.0
        if c.layer_drop and not deterministic:
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - c.layer_drop).astype(x.dtype)
        residual = functools.partial(self._residual, keep=keep, drop_path=drop_path, deterministic=deterministic)
        options: dict[str, Any] = {"cache_length": cache_length, "deterministic": deterministic}

        shift: jax.Array | float = 0.0
        if c.attention_shift:
            shift = self.param("attention_shift", nn.initializers.zeros, ()).astype(x.dtype)
        own = options | {"visibility": visibility, "positions": positions}
        x = residual(x, "attention", lambda y: c.attention("attention")(y + shift, **own))
        if self.cross_attention:
            across = options | {"visibility": context_visibility}
            x = residual(x, "cross_attention", lambda y: c.attention("cross_attention")(y, context, **across))
        return residual(x, "mlp", lambda y: Mlp(c, name="mlp")(y, deterministic=deterministic))

    def _residual(self, x: jax.Array, name: str, branch: Callable[[jax.Array], jax.Array], **options: Any) -> jax.Array:
        """x and its branch, normalized where `config.norm` says."""
        c = self.config
        if c.norm == "sphere":
            x = SphereStep(name=f"{name}_step")(x, self._dropped(branch(x), name, **options))
        elif c.norm == "none":
            x = x + self._dropped(branch(x), name, **options)
        elif c.norm in ("pre", "peri"):
            norm: Any = c.norm_layer(f"{name}_norm")
            y = branch(norm(x))
            if c.norm == "peri":
                end: Any = c.norm_layer(f"{name}_end_norm")
                y = end(y)
            x = x + self._dropped(y, name, **options)
        else:
            norm = c.norm_layer(f"{name}_norm")
            x = norm(c.alpha * x + self._dropped(branch(x), name, **options))
        return with_axes(x, "batch", "length", "embed")

    def _dropped(
        self,
        branch: jax.Array,
        name: str,
        *,
        keep: jax.Array | float,
        drop_path: jax.Array | float,
        deterministic: bool,
    ) -> jax.Array:
        """The branch scaled, under dropout and stochastic depth, and multiplied by `keep`, 0 for a block left out."""
        c = self.config
        if c.branch_scale != "none":
            branch = BranchScale(c.branch_scale, c.layer_scale_init, name=f"{name}_branch")(branch)
        if c.branch_dropout:
            branch = nn.Dropout(c.dropout)(branch, deterministic=deterministic)
        if c.drop_path and not deterministic:
            examples = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop_path, (branch.shape[0], 1, 1))
            branch = branch * (examples / (1 - drop_path)).astype(branch.dtype)
        return branch * keep


class TransformerStack(nn.Module):
    """`depth` blocks, and where the residual stream itself has no norms (pre, peri) the last norm.

    Parameters: `block_0` … unrolled; with `scan`, `blocks` with a leading axis of length depth in every array.
    """

    config: TransformerConfig
    cross_attention: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, visibility: Visibility = FULL, **options: Any) -> jax.Array:
        """Applies the blocks to (B, T, D); takes the options of `TransformerBlock`."""
        c = self.config
        rates = jnp.linspace(0.0, c.drop_path, c.depth) if c.depth > 1 else jnp.full(1, c.drop_path)

        x = with_axes(unit(x) if c.norm == "sphere" else x, "batch", "length", "embed")

        def call_block(block: TransformerBlock, x: jax.Array, rate: jax.Array) -> jax.Array:
            return block(x, rate, visibility=visibility, **options)

        apply_block: Callable[..., jax.Array] = call_block
        if c.remat != "none":
            apply_block = nn.remat(call_block, policy=REMATS[c.remat], prevent_cse=not c.scan or c.scan_unroll > 1)
        if c.scan:

            def iteration(block: TransformerBlock, x: jax.Array, rate: jax.Array) -> tuple[jax.Array, None]:
                return apply_block(block, x, rate), None

            scanned: Callable[..., tuple[jax.Array, None]] = nn.scan(
                iteration,
                variable_axes={"params": 0, "spectral": 0, "attention": 0, "losses": 0, "cache": 0},
                split_rngs={"params": True, "dropout": True},
                length=c.depth,
                unroll=min(c.scan_unroll, c.depth),
                # The check traces the block once more, and random numbers are drawn after as many traces as ever.
                check_constancy_invariants=self.is_initializing() or not options.get("deterministic", True),
            )
            x, _ = scanned(TransformerBlock(c, self.cross_attention, name="blocks"), x, rates)
        else:
            for i in range(c.depth):
                x = apply_block(TransformerBlock(c, self.cross_attention, name=f"block_{i}"), x, rates[i])
        if c.seq_vcr and self.is_mutable_collection("losses"):
            real = visibility.real_tokens(self_attention=True)
            penalty = c.seq_vcr * seq_vcr(x, real.queries)
            self.sow("losses", "seq_vcr", penalty, init_fn=lambda: None, reduce_fn=lambda _, new: new)
        last: Any = c.norm_layer("norm") if c.norm in ("pre", "peri") else None
        y: jax.Array = x if last is None else last(x)
        return y
