"""Transformer blocks and stacks of them: one dataclass says everything about a block."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep.nn.attention import IMPLEMENTATIONS, QK_NORMS, QKV, WEIGHTS, MultiHeadAttention
from sigmarep.nn.axes import with_axes
from sigmarep.nn.linear import REPARAMS, SigmaDense
from sigmarep.nn.norms import BRANCH_SCALES, NORM_TYPES, BranchScale, DynamicTanh
from sigmarep.nn.seq_vcr import seq_vcr
from sigmarep.nn.visibility import FULL, Visibility

ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": nn.tanh,
}
NORMS = ("none", "pre", "post", "deepnorm")
REMATS: dict[str, Any] = {
    "none": None,
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
KERNEL_INITS = ("trunc_normal", "normal", "xavier_uniform", "lecun_normal", "fan_in_uniform")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """What a stack of Transformer blocks is made of; `config.model` uses the same names.

    Attributes:
      depth, width, num_heads, mlp_dim: blocks; D; attention heads; hidden units of the MLP.
      norm: "none"; "pre", LayerNorm before each branch and after the last block; "post", after each addition;
        "deepnorm", post with the residual scaled by α and the initial kernels by β (Wang et al., 2022).
      norm_type: what those norms are: "layer", "rms" or "dyt" (`sigmarep.nn.norms.DynamicTanh`).
      norm_epsilon, norm_bias: of the norms that have one.
      branch_scale, layer_scale_init: see `sigmarep.nn.norms.BranchScale`.
      reparam, gamma_init, gamma_trainable, power_vectors: see `sigmarep.nn.linear.ReparametrizedLayer`.
      qkv, qk_norm, logit_cap, entropy_target, attention_implementation: see `sigmarep.nn.attention.MultiHeadAttention`,
        whose `temperature` is attention_temperature and whose `weights` are attention_weights.
      seq_vcr: weight of the penalty of `sigmarep.nn.seq_vcr` on what the last block gives, sown in the collection `losses`;
        off at 0.
      rotary_base: rotary positions in self-attention, off at 0.
      activation: of the MLP, one of `ACTIVATIONS`.
      dropout: rate after the MLP's activation and, with branch_dropout, on each branch; attention_dropout: on the
        attention weights.
      drop_path: stochastic depth, the rate of the last block; it rises linearly from 0. Drops a branch per example and
        divides the others by 1 − rate.
      layer_drop: the rate at which a whole block is left out for the whole batch, without rescaling (the paper's speech
        model).
      attention_shift: adds one learned number, 0 at the start, to the input of each self-attention (the paper's speech
        model).
      kernel_init: one of `KERNEL_INITS`; init_std is the standard deviation of the normal ones. "fan_in_uniform" is
        U(±1/√inputs).
      scan: stack the parameters of all blocks and compile one block.
      remat: "none"; "full" recomputes each block in the backward pass; "dots" keeps the results of its matrix products.
      residual_scale, branch_init_scale: DeepNorm's α and β where its rule for an encoder alone, (2·depth)^¼ and
        (8·depth)^−¼, does not hold; None for that rule.
      dtype: of the computation; parameters and spectral vectors stay float32.
    """

    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    norm: str = "pre"
    norm_type: str = "layer"
    norm_epsilon: float = 1e-6
    norm_bias: bool = True
    branch_scale: str = "none"
    layer_scale_init: float = 1e-4
    reparam: str = "none"
    gamma_init: str | float = "one"
    gamma_trainable: bool = True
    power_vectors: int = 1
    qkv: str = "separate"
    qk_norm: str = "none"
    logit_cap: float = 0.0
    attention_temperature: float = 1.0
    attention_weights: str = "softmax"
    entropy_target: float = 0.0
    seq_vcr: float = 0.0
    rotary_base: float = 0.0
    attention_implementation: str = "auto"
    use_bias: bool = True
    activation: str = "gelu"
    dropout: float = 0.0
    branch_dropout: bool = True
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    layer_drop: float = 0.0
    attention_shift: bool = False
    kernel_init: str = "trunc_normal"
    init_std: float = 0.02
    scan: bool = True
    remat: str = "none"
    residual_scale: float | None = None
    branch_init_scale: float | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        words = {
            "norm": NORMS,
            "norm_type": NORM_TYPES,
            "branch_scale": BRANCH_SCALES,
            "reparam": REPARAMS,
            "qkv": QKV,
            "qk_norm": QK_NORMS,
            "attention_weights": WEIGHTS,
            "attention_implementation": IMPLEMENTATIONS,
            "activation": ACTIVATIONS,
            "remat": REMATS,
            "kernel_init": KERNEL_INITS,
        }
        for name, accepted in words.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(accepted)}")
        for name in ("depth", "width", "num_heads", "mlp_dim", "power_vectors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")
        for name in ("dropout", "attention_dropout", "drop_path", "layer_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a rate from 0 to below 1")
        if not 0 <= self.entropy_target <= 1:
            raise ValueError(f"entropy_target = {self.entropy_target}: expected a share from 0 (off) to 1")
        if not self.seq_vcr >= 0:
            raise ValueError(f"seq_vcr = {self.seq_vcr}: expected a weight of at least 0")
        if not self.attention_temperature > 0:
            raise ValueError(f"attention_temperature = {self.attention_temperature}: expected a number above 0")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads}: does not divide width = {self.width}")
        if not (self.gamma_init in ("one", "sigma") or isinstance(self.gamma_init, int | float)):
            raise ValueError(f"gamma_init = {self.gamma_init!r}: expected 'one', 'sigma' or a number")

    @property
    def alpha(self) -> float:
        """α, the factor on the residual stream; 1 but under DeepNorm."""
        if self.norm != "deepnorm":
            return 1.0
        return (2 * self.depth) ** 0.25 if self.residual_scale is None else self.residual_scale

    @property
    def beta(self) -> float:
        """β, the factor on the initial value, output and MLP kernels; 1 but under DeepNorm."""
        if self.norm != "deepnorm":
            return 1.0
        return (8 * self.depth) ** -0.25 if self.branch_init_scale is None else self.branch_init_scale

    def initializer(self, gain: float = 1.0) -> Callable:
        """The kernel initializer, its standard deviation multiplied by `gain`."""
        if self.kernel_init == "trunc_normal":
            # Cut at ±2, not at ±2 standard deviations: the original code's, and no cut at all in effect.
            std = self.init_std * gain
            return nn.initializers.truncated_normal(std, lower=-2.0 / std, upper=2.0 / std)
        if self.kernel_init == "normal":
            return nn.initializers.normal(self.init_std * gain)
        if self.kernel_init == "xavier_uniform":
            return nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")
        if self.kernel_init == "fan_in_uniform":
            return nn.initializers.variance_scaling(gain**2 / 3, "fan_in", "uniform")
        return nn.initializers.variance_scaling(gain**2, "fan_in", "truncated_normal")

    def norm_layer(self, name: str) -> nn.Module:
        """One of the norms."""
        if self.norm_type == "dyt":
            return DynamicTanh(use_bias=self.norm_bias, dtype=self.dtype, name=name)
        if self.norm_type == "rms":
            return nn.RMSNorm(epsilon=self.norm_epsilon, dtype=self.dtype, name=name)
        return nn.LayerNorm(epsilon=self.norm_epsilon, use_bias=self.norm_bias, dtype=self.dtype, name=name)

    def attention(self, name: str) -> MultiHeadAttention:
        """The attention layer of a block."""
        return MultiHeadAttention(
            self.num_heads,
            qkv=self.qkv,
            use_bias=self.use_bias,
            dropout=self.attention_dropout,
            implementation=self.attention_implementation,
            qk_norm=self.qk_norm,
            logit_cap=self.logit_cap,
            temperature=self.attention_temperature,
            weights=self.attention_weights,
            entropy_target=self.entropy_target,
            rotary_base=self.rotary_base,
            value_scale=self.beta,
            kernel_init=self.initializer(),
            name=name,
            **self.reparametrization(),
        )

    def reparametrization(self) -> dict[str, Any]:
        """The arguments that every reparametrised layer of the model shares."""
        return {
            "reparam": self.reparam,
            "gamma_init": self.gamma_init,
            "gamma_trainable": self.gamma_trainable,
            "power_vectors": self.power_vectors,
            "dtype": self.dtype,
        }


class Mlp(nn.Module):
    """Two dense layers with the activation and dropout between them."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        c = self.config
        options = c.reparametrization() | {
            "kernel_init": c.initializer(c.beta),
            "use_bias": c.use_bias,
        }
        hidden = with_axes(SigmaDense(c.mlp_dim, name="up", **options)(x), "batch", "length", "mlp")
        hidden = ACTIVATIONS[c.activation](hidden)
        hidden = nn.Dropout(c.dropout)(hidden, deterministic=deterministic)
        return SigmaDense(x.shape[-1], name="down", **options)(hidden)


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

    def _residual(self, x, name, branch, **options):
        """x and its branch, normalized where `config.norm` says."""
        c = self.config
        if c.norm == "none":
            x = x + self._dropped(branch(x), name, **options)
        elif c.norm == "pre":
            norm: Any = c.norm_layer(f"{name}_norm")
            x = x + self._dropped(branch(norm(x)), name, **options)
        else:
            norm = c.norm_layer(f"{name}_norm")
            x = norm(c.alpha * x + self._dropped(branch(x), name, **options))
        return with_axes(x, "batch", "length", "embed")

    def _dropped(self, branch, name, *, keep, drop_path, deterministic):
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
    """`depth` blocks, and under pre-normalization the last norm.

    Parameters: `block_0` … unrolled; with `scan`, `blocks` with a leading axis of length depth in every array.
    """

    config: TransformerConfig
    cross_attention: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, visibility: Visibility = FULL, **options) -> jax.Array:
        """Applies the blocks to (B, T, D); takes the options of `TransformerBlock`."""
        c = self.config
        rates = jnp.linspace(0.0, c.drop_path, c.depth) if c.depth > 1 else jnp.full(1, c.drop_path)

        x = with_axes(x, "batch", "length", "embed")

        def apply_block(block, x, rate):
            return block(x, rate, visibility=visibility, **options)

        if c.remat != "none":
            apply_block = nn.remat(apply_block, policy=REMATS[c.remat], prevent_cse=not c.scan)
        if c.scan:
            scanned = nn.scan(
                lambda block, carry, rate: (apply_block(block, carry, rate), None),
                variable_axes={"params": 0, "spectral": 0, "attention": 0, "losses": 0, "cache": 0},
                split_rngs={"params": True, "dropout": True},
                length=c.depth,
            )
            x, _ = scanned(TransformerBlock(c, self.cross_attention, name="blocks"), x, rates)
        else:
            for i in range(c.depth):
                x = apply_block(TransformerBlock(c, self.cross_attention, name=f"block_{i}"), x, rates[i])
        if c.seq_vcr and self.is_mutable_collection("losses"):
            real = visibility.real_tokens(self_attention=True)
            penalty = c.seq_vcr * seq_vcr(x, real.queries)
            self.sow("losses", "seq_vcr", penalty, init_fn=lambda: None, reduce_fn=lambda _, new: new)
        last: Any = c.norm_layer("norm") if c.norm == "pre" else None
        return x if last is None else last(x)
