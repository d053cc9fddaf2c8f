"""The dataclass that describes blocks and stacks of them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep import doors, fields
from sigmarep.fields import attribute
from sigmarep.nn import consensus, grouped_queries
from sigmarep.nn.attention import PIECE, AttentionConfig, create_attention
from sigmarep.nn.linear import REPARAMS, Reparam
from sigmarep.nn.norms import BRANCH_SCALES, NORM_TYPES, POINTWISE, BranchScaling

# Under a checkpoint the backward pass keeps the activation's input alone, not what its derivative is made of: by the bytes
# that are moved, computing these once more is the cheaper way.
ACTIVATIONS: dict[str, Callable[..., jax.Array]] = {
    "gelu": jax.checkpoint(lambda x: nn.gelu(x, approximate=False)),
    "gelu_tanh": jax.checkpoint(lambda x: nn.gelu(x, approximate=True)),
    "relu": nn.relu,
    "silu": jax.checkpoint(nn.silu),
    "tanh": nn.tanh,
}
Norm = Literal["none", "pre", "peri", "post", "deepnorm", "sphere"]
NORMS: tuple[Norm, ...] = get_args(Norm)
Remat = Literal["none", "full", "dots"]
REMATS: dict[Remat, Any] = {
    "none": None,
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
KERNEL_INITS = ("trunc_normal", "normal", "xavier_uniform", "lecun_normal", "fan_in_uniform")
REPARAM_SCOPES = ("all", "attention")
GAMMA_INITS = ("one", "sigma")


def _required(doc: str, **options: Any) -> Any:
    """Declares a whole number of at least 1 without a default."""
    return dataclasses.field(metadata=fields.metadata(fields.field(1, doc, at_least=1, **options)))


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True)
class TransformerConfig(AttentionConfig):
    """The parts of a stack of Transformer blocks; `config.model` has these fields and those of `AttentionConfig`.

    Raises:
      ValueError: a value is not accepted; the message begins with the field's name.
    """

    depth: int = _required("Number of blocks.", at_most=2**16)
    width: int = _required("Features of a token, D.", at_most=2**20)
    num_heads: int = _required("Attention heads; a divisor of the width.", at_most=2**20)
    mlp_dim: int = _required("Hidden units of the MLP.", at_most=2**24)
    token_mixing: str = attribute(
        "attention",
        "The layer by which tokens see each other: attention, or consensus (sigmarep.nn.consensus), which has no attention "
        "weights, takes none of their fields and cannot attend to a context.",
        choices=consensus.TOKEN_MIXINGS,
    )
    norm: Norm = attribute(  # noqa: RUF009
        "pre",
        "Place of the norms: none; pre, before each branch and after the last block; peri, pre and one more at the end of "
        "each branch (Kim et al., 2025, without their norm of the embedding); post, after each addition; deepnorm, post "
        "with the residual scaled by α and the initial kernels by β (Wang et al., 2022); sphere, steps from unit vector to "
        "unit vector, to go with qk_norm unit and optimizer.unit_kernels (nGPT, sigmarep.nn.sphere).",
        choices=NORMS,
    )
    norm_type: str = attribute(
        "layer",
        "Kind of those norms: LayerNorm, RMSNorm, or dyt or derf, tanh or erf in place of a norm (sigmarep.nn.norms). A "
        "Python name: a Flax module's class, called with dtype and name.",
        choices=NORM_TYPES,
        **PIECE,
    )
    norm_epsilon: float = attribute(1e-6, "Added to the variance that layer and rms divide by.", above=0)
    norm_bias: bool = attribute(True, "Biases in norms of type layer, dyt and derf.")
    branch_scale: BranchScaling = attribute(  # noqa: RUF009
        "none",
        "Learned scale of each residual branch: layer_scale, one number per feature (Touvron et al., 2021), or rezero, one "
        "number, 0 at first (Bachlechner et al., 2021).",
        choices=BRANCH_SCALES,
    )
    layer_scale_init: float = attribute(1e-4, "Initial value of layer_scale.", at_least=0)
    reparam: Reparam = attribute(  # noqa: RUF009
        "none",
        "Reparametrization of the linear layers: sigma, (γ/σ)W with a learned γ; spectral, the same with γ = 1; weight, "
        "one gain per output; scale, αW with a learned α and common_std (WeSaR).",
        choices=REPARAMS,
    )
    gamma_init: str | float = attribute(
        "one",
        "Initial γ: one, a number, or sigma for σ(W₀), so that the network at the start is the plain one.",
        choices=GAMMA_INITS,
        also=_is_number,
        also_doc="or a number",
    )
    gamma_trainable: bool = attribute(True, "False freezes γ at its initial value.")
    power_vectors: int = attribute(
        1,
        "Vectors of the power iteration; 4 follow fast training more closely than the paper's 1.",
        at_least=1,
        at_most=2**10,
    )
    power_steps: int = attribute(
        1, "Power steps of each training step; the paper makes one.", at_least=1, at_most=2**10
    )
    sigma_gradient: bool = attribute(
        True, "The gradient passes through σ, as in the paper; False takes σ as a constant of it."
    )
    reparam_scope: str = attribute(
        "all",
        "Layers under reparam: all, or attention for the projections of attention alone; the others are plain then.",
        choices=REPARAM_SCOPES,
    )
    common_std: float = attribute(
        4e-5**0.5, "Initial standard deviation of every kernel under scale, whatever the initializer's is.", above=0
    )
    seq_vcr: float = attribute(
        0.0, "Weight of the penalty of sigmarep.nn.seq_vcr on the output of the last block; 0 is off.", at_least=0
    )
    use_bias: bool = attribute(True, "Biases in attention and the MLP.")
    activation: str = attribute(
        "gelu",
        "Activation of the MLP. A Python name: a function of an array, as jax.nn.elu.",
        choices=ACTIVATIONS,
        **PIECE,
    )
    mlp_gate: bool = attribute(
        False, "Multiplies the MLP's activation by a projection of its own; with silu that is SwiGLU (Shazeer, 2020)."
    )
    dropout: float = attribute(
        0.0, "Rate of dropout after the MLP's activation and, with branch_dropout, on each branch.", at_least=0, below=1
    )
    activation_dropout: float | None = attribute(
        None, "Rate of dropout after the MLP's activation; that of dropout if None.", kind=float, optional=True
    )
    branch_dropout: bool = attribute(True, "Dropout on each residual branch.")
    drop_path: float = attribute(
        0.0,
        "Rate of stochastic depth in the last block, rising linearly from 0: drops a branch for an example and divides the "
        "others by 1 - rate.",
        at_least=0,
        below=1,
    )
    layer_drop: float = attribute(
        0.0, "Rate at which a whole block is left out for the whole batch, without rescaling.", at_least=0, below=1
    )
    attention_shift: bool = attribute(
        False, "Adds one learned number, 0 at first, to the input of each self-attention (the paper's speech model)."
    )
    kernel_init: str = attribute(
        "trunc_normal",
        "Initializer of the kernels; fan_in_uniform is U(±1/√inputs). A Python name: a function (key, shape, dtype) to an "
        "array.",
        choices=KERNEL_INITS,
        **PIECE,
    )
    init_std: float = attribute(0.02, "Standard deviation of trunc_normal and normal.", above=0)
    scan: bool = attribute(True, "Stacks the parameters of all blocks and compiles one block.")
    scan_unroll: int = attribute(
        1,
        "Blocks of the scan that are compiled one after another; with all of them nothing is copied between blocks, and "
        "compiling takes longer.",
        at_least=1,
    )
    remat: Remat = attribute(  # noqa: RUF009
        "none",
        "Recomputation in the backward pass: full, of each block; dots, of all but its matrix products.",
        choices=REMATS,
    )
    residual_scale: float | None = attribute(
        None, "DeepNorm's α; None for (2·depth)^¼, the rule for an encoder alone.", kind=float, optional=True, above=0
    )
    branch_init_scale: float | None = attribute(
        None, "DeepNorm's β; None for (8·depth)^-¼, the rule for an encoder alone.", kind=float, optional=True, above=0
    )
    # Of the computation; parameters and spectral vectors stay float32.
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        # As the command line gives it.
        object.__setattr__(self, "gamma_init", str(self.gamma_init))
        fields.check_attributes(self)
        for name in fields.of_dataclass(type(self)):
            if doors.is_dotted(word := getattr(self, name)):
                doors.load(word, field=name)
        if self.width % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads}: does not divide width = {self.width}")
        grouped_queries.check(self.num_heads, self.num_kv_heads, self.qkv)
        if self.rotary_base and self.width // self.num_heads % 2:
            raise ValueError(
                f"num_heads = {self.num_heads}: rotary positions need an even number of features a head, not "
                f"{self.width // self.num_heads}"
            )
        if self.token_mixing == "consensus":
            consensus.check(self)

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

    def initializer(self, gain: float = 1.0) -> Callable[..., jax.Array]:
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
        if self.kernel_init == "lecun_normal":
            return nn.initializers.variance_scaling(gain**2, "fan_in", "truncated_normal")
        init = doors.load(self.kernel_init, field="kernel_init")
        return lambda key, shape, dtype=jnp.float32: gain * init(key, shape, dtype)

    def norm_layer(self, name: str) -> nn.Module:
        """One of the norms."""
        if self.norm_type in POINTWISE:
            return POINTWISE[self.norm_type](use_bias=self.norm_bias, dtype=self.dtype, name=name)
        if self.norm_type == "rms":
            return nn.RMSNorm(epsilon=self.norm_epsilon, dtype=self.dtype, name=name)
        if self.norm_type == "layer":
            return nn.LayerNorm(epsilon=self.norm_epsilon, use_bias=self.norm_bias, dtype=self.dtype, name=name)
        layer: nn.Module = doors.load(self.norm_type, field="norm_type")(dtype=self.dtype, name=name)
        return layer

    def activate(self, x: jax.Array) -> jax.Array:
        """The MLP's activation of x."""
        function: Callable[..., jax.Array] = ACTIVATIONS.get(self.activation) or doors.load(
            self.activation, field="activation"
        )
        return function(x)

    def attention(self, name: str) -> nn.Module:
        """The attention layer of a block, or the one that `token_mixing` puts in its place."""
        create = consensus.create_consensus if self.token_mixing == "consensus" else create_attention
        return create(
            self,
            self.num_heads,
            use_bias=self.use_bias,
            value_scale=self.beta,
            kernel_init=self.initializer(),
            name=name,
            **self.reparametrization(attention=True),
        )

    def reparametrization(self, *, attention: bool = False) -> dict[str, Any]:
        """The arguments that all reparametrized layers of the model share.

        Args:
          attention: the layer is one of attention's projections.
        """
        return {
            "reparam": self.reparam if attention or self.reparam_scope == "all" else "none",
            "gamma_init": self.gamma_init,
            "gamma_trainable": self.gamma_trainable,
            "power_vectors": self.power_vectors,
            "power_steps": self.power_steps,
            "sigma_gradient": self.sigma_gradient,
            "common_std": self.common_std,
            "dtype": self.dtype,
        }
