"""Multi-head attention that records its entropy, with or without forming the attention matrix.

Shapes: B batch, T queries, S keys, N heads, H head_dim, D width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep import doors, fields
from sigmarep.core import entropy
from sigmarep.fields import attribute
from sigmarep.nn import attention_statistics, grouped_queries, key_value_cache
from sigmarep.nn.axes import with_axes
from sigmarep.nn.fused_attention import cudnn_attention, cudnn_supports, flash
from sigmarep.nn.linear import Initializer, Reparam, SigmaDenseGeneral, handed_on, slot_scaled
from sigmarep.nn.positions import Rotary
from sigmarep.nn.sphere import UnitHeads
from sigmarep.nn.visibility import FULL, RealTokens, Visibility

QKV = ("separate", "fused", "qk_v")
IMPLEMENTATIONS = ("auto", "xla", "cudnn", "flash")
QK_NORMS: dict[str, Any] = {
    "none": None,
    "layer": functools.partial(nn.LayerNorm, use_bias=False),
    "rms": nn.RMSNorm,
    "unit": None,
}
WEIGHTS = ("softmax", "sigmoid")
GATES = ("none", "headwise", "elementwise")
DEFAULT_KERNEL_INIT = nn.initializers.lecun_normal()
# Fields that `config.model` calls otherwise.
MODEL_NAMES = {
    "dropout": "attention_dropout",
    "float32": "attention_float32",
    "implementation": "attention_implementation",
    "temperature": "attention_temperature",
    "weights": "attention_weights",
}
PIECE: dict[str, Any] = {"also": doors.is_dotted, "also_doc": "or a dotted Python name"}

# Queries (B, T, N, H), keys and values (B, S, N, H).
Heads = tuple[jax.Array, jax.Array, jax.Array]
# Gives the statistics of every query of a call; called only if the call records them.
Statistics = Callable[[], entropy.AttentionStatistics]


class MultiHeadAttention(nn.Module):
    """softmax(s·Q Kᵀ)·V over heads, with reparametrized projections.

    Apply with `mutable=["attention"]` to receive, in that collection: `entropy` (N,), the mean over real queries in
    nats; `entropy_normalised` (N,), the same divided by ln(visible keys); `max_logit` (N,); `logit_variance` (N,), the
    mean over queries of the variance over the keys each sees; `qk_norm` (N,), the spectral norm of each head's W_q W_kᵀ;
    `bound` (N,), the mean over queries of the least entropy that Theorem 3.1 allows these inputs. They are taken before
    dropout, and cost nothing when not asked for.

    The fields made by `attribute` are declared with their meaning, and are fields of `config.model` as well
    (`AttentionConfig`). Where they take a dotted Python name they take the object itself too.

    Attributes:
      num_heads: N.
      head_dim: H; D / N if None.
      use_bias: biases in all projections.
      value_scale: factor on the initial value and output kernels (DeepNorm's β).
      reparam, gamma_init, gamma_trainable, power_vectors, power_steps, sigma_gradient, common_std: see
        `sigmarep.nn.linear.ReparametrizedLayer`.
      kernel_init, bias_init, dtype: as in `flax.linen.Dense`.
    """

    num_heads: int
    head_dim: int | None = None
    qkv: str = attribute(
        "separate",
        "Projections: separate, with a γ each; fused, one projection with one γ; qk_v, one of queries and keys and one of "
        "values. Attention to a context always projects separately.",
        choices=QKV,
    )
    num_kv_heads: int = attribute(
        0, "Heads of keys and values, each shared by a group of heads of queries; 0: one for each.", at_least=0
    )
    use_bias: bool = True
    dropout: float = attribute(0.0, "Rate of dropout on the attention weights.", at_least=0, below=1)
    implementation: str | Callable[..., Any] = attribute(
        "auto",
        "xla forms the attention matrix, and the statistics are of its logits; cudnn is the fused kernel of "
        "jax.nn.dot_product_attention, beside which the statistics are taken by blocks of keys; flash is a kernel for TPUs "
        "and GPUs that gives both under padding, segments, causality, soft-cap and dropout; auto is cuDNN's in half "
        "precision on a GPU without mask, attention dropout, soft-cap and other weights than softmax, else xla. A Python "
        "name: a fused kernel, (query, key, value, mask=, is_causal=) to (B, T, N, H).",
        choices=IMPLEMENTATIONS,
        **PIECE,
    )
    float32: bool = attribute(
        False, "Logits, weights and their sums in float32 under a half compute type, as in the paper's translation."
    )
    weights: str | Callable[..., Any] = attribute(
        "softmax",
        "Attention weights of the logits: softmax, or sigmoid (Ramapuram et al., 2024), whose entropy is that of the "
        "weights divided by their sum. A Python name: a function of logits and mask, (B, N, T, S), to weights.",
        choices=WEIGHTS,
        **PIECE,
    )
    qk_norm: str | Callable[..., Any] = attribute(
        "none",
        "Normalization of queries and keys over the features of a head: layer (without bias), rms, or unit, nGPT's "
        "(sigmarep.nn.sphere). A Python name: a Flax module's class, called with dtype and name.",
        choices=QK_NORMS,
        **PIECE,
    )
    logit_cap: float = attribute(0.0, "Soft-cap of the logits; 0 is off.", at_least=0)
    temperature: float = attribute(1.0, "Divides the logits, before the soft-cap.", above=0)
    head_temperature: bool = attribute(
        False, "Multiplies the logits of each head, before the soft-cap, by a learned exp(head_log_scale), 1 at first."
    )
    entropy_target: float = attribute(
        0.0,
        "Share of the largest possible entropy to which a learned factor on the logits of each layer drives its mean over "
        "queries and heads; 0 is off. Only (entropy/ln(visible keys) - entropy_target)² moves the factor, as the "
        "temperature of maximum-entropy reinforcement learning (Haarnoja et al., 2018).",
        at_least=0,
        at_most=1,
    )
    attention_gate: str = attribute(
        "none",
        "Sigmoid gate on the attended values, projected from the layer's input (Qiu et al., 2025, arXiv 2505.06708): "
        "headwise, one number for each head, or elementwise, one for each of its features.",
        choices=GATES,
    )
    rotary_base: float = attribute(
        0.0, "Base of rotary positions in self-attention, usually 10000; 0 is off.", at_least=0
    )
    process_heads: str | Callable[..., Any] = attribute(
        "none",
        "A Python name: a function that changes queries, keys and values after their normalization and rotation, (query, "
        "key, value, positions) to (query, key, value), each (B, T, N, H); positions are None in attention to a context.",
        choices=("none",),
        **PIECE,
    )
    value_scale: float = 1.0
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
        """Attends from x to `context`, or to itself; returns (B, T, D).

        Args:
          x: (B, T, D).
          context: (B, S, D), x if None.
          visibility: the keys that each query sees.
          positions: int (B, T) for rotary positions; 0, 1, … if None.
          cache_length: decoding, if not 0; apply with `mutable=["cache"]`. x holds the next T tokens, which see the
            earlier ones through the collection `cache` (made by the first call, for so many tokens) and each other
            causally, whatever `visibility` says. With a context, its keys and values are kept from the first call.
          deterministic: no dropout.
        """
        self._check(x.shape[-1], deterministic)
        real = visibility.real_tokens(self_attention=context is None)
        query, key, value = self._project(x, context, cache_length)
        query, key = self._normalize(query, key)
        query, key, value = self._process(query, key, value, positions, context)
        query, factor = self._scale(query, grouped_queries.repeated(key, self.num_heads), visibility, real)
        appending = cache_length and context is None
        if appending:
            key, value, visibility = key_value_cache.append(self, key, value, cache_length)
        key, value = (grouped_queries.repeated(each, self.num_heads) for each in (key, value))
        recording = self.is_mutable_collection("attention") and not (self.is_initializing() or appending)
        attended, statistics = self._attend(query, key, value, visibility, deterministic, recording)
        if recording:
            self._record(statistics(), query, key, x, context, real, factor)
        attended = with_axes(self._gated(attended, x), "batch", "length", "heads", "head_dim")
        return self._dense(x.shape[-1], "out", axis=(-2, -1), adds=True, kernel_init=self._scaled_init())(attended)

    def _check(self, width: int, deterministic: bool) -> None:
        if self.head_dim is None and width % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads}: does not divide the width {width}")
        grouped_queries.check(self.num_heads, self.num_kv_heads, self.qkv)
        for name, declared in fields.of_dataclass(type(self)).items():
            value = getattr(self, name)
            if not callable(value) and (expected := declared.problem(value)):
                raise ValueError(f"{name} = {value!r}: expected {expected}")
        if self.implementation == "flash" and self.weights != "softmax":
            raise ValueError(
                f"weights = {self.weights!r}: implementation = 'flash' has softmax weights; use 'xla' or 'auto'"
            )
        if self.implementation not in ("auto", "xla", "flash") and self._needs_matrix(deterministic):
            raise ValueError(
                f"implementation = {self.implementation!r}: attention dropout, logit_cap and weights other than softmax "
                "need 'xla' or 'auto'"
            )
        if self.entropy_target and self.weights not in WEIGHTS:
            raise ValueError(f"entropy_target = {self.entropy_target}: needs weights of {' or '.join(WEIGHTS)}")

    def _piece(self, name: str) -> Any:
        """The word or the object of a field that may have a dotted Python name."""
        value = getattr(self, name)
        return doors.load(value, field=MODEL_NAMES.get(name, name)) if doors.is_dotted(value) else value

    def _dense(self, features: int | tuple[int, ...], name: str, **options: Any) -> SigmaDenseGeneral:
        return SigmaDenseGeneral(features, name=name, **handed_on(self), **options)

    def _scaled_init(self) -> Initializer:
        return slot_scaled(self.kernel_init, (self.value_scale,))

    def _project(self, x: jax.Array, context: jax.Array | None, cache_length: int) -> Heads:
        """Queries (B, T, N, H) of x; keys and values (B, S, N, H) of the context, or of x without one."""
        heads = (self.num_heads, self.head_dim or x.shape[-1] // self.num_heads)
        kv_heads = (self.num_kv_heads or self.num_heads, heads[1])
        cached = key_value_cache.of_context(self) if cache_length and context is not None else None
        if cached is not None:
            query, (key, value) = self._dense(heads, "query", makes=("query",), kernel_init=self.kernel_init)(x), cached
        elif context is not None or self.qkv == "separate":
            source = x if context is None else context
            query = self._dense(heads, "query", makes=("query",), kernel_init=self.kernel_init)(x)
            key = self._dense(kv_heads, "key", makes=("key",), kernel_init=self.kernel_init)(source)
            value = self._dense(kv_heads, "value", makes=("value",), kernel_init=self._scaled_init())(source)
            if cache_length and context is not None:
                key_value_cache.store_context(self, key, value)
        elif self.qkv == "qk_v":
            both = self._dense((2, *heads), "qk", makes=("query", "key"), kernel_init=self.kernel_init)(x)
            query, key = both[..., 0, :, :], both[..., 1, :, :]
            value = self._dense(heads, "value", makes=("value",), kernel_init=self._scaled_init())(x)
        else:
            init = slot_scaled(self.kernel_init, (1.0, 1.0, self.value_scale))
            fused = self._dense((3, *heads), "qkv", makes=("query", "key", "value"), kernel_init=init)(x)
            query, key, value = (fused[..., i, :, :] for i in range(3))
        query, key, value = (with_axes(each, "batch", "length", "heads", "head_dim") for each in (query, key, value))
        return query, key, value

    def _normalize(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.qk_norm in ("none", "unit"):
            return query, key
        norm = QK_NORMS.get(str(self.qk_norm)) or self._piece("qk_norm")
        query = norm(name="query_norm", dtype=self.dtype)(query)
        return query, norm(name="key_norm", dtype=self.dtype)(key)

    def _process(
        self, query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array | None, context: jax.Array | None
    ) -> Heads:
        """Queries, keys and values after rotation and after the hook of the caller."""
        processes: list[Callable[..., Heads]] = (
            [Rotary(self.rotary_base)] if self.rotary_base and context is None else []
        )
        if self.process_heads != "none":
            processes.append(self._piece("process_heads"))
        if context is not None:
            positions = None
        elif processes and positions is None:
            positions = jnp.arange(query.shape[1])[None]
        for process in processes:
            query, key, value = process(query, key, value, positions)
        if self.qk_norm == "unit":
            query, key = UnitHeads(name="query_key")(query, key)
        if self.float32:
            query, key, value = (each.astype(jnp.float32) for each in (query, key, value))
        return query, key, value

    def _scale(
        self, query: jax.Array, key: jax.Array, visibility: Visibility, real: RealTokens
    ) -> tuple[jax.Array, jax.Array]:
        """Queries multiplied by the factors on the logits other than 1/√H, and the product of these, () or (N,)."""
        if self.temperature != 1.0:
            query = query / jnp.asarray(self.temperature, query.dtype)
        factor = jnp.float32(1.0 / self.temperature)
        if self.head_temperature:
            zeros = nn.initializers.zeros_init()
            scale = jnp.exp(self.param("head_log_scale", zeros, (self.num_heads,), jnp.float32))
            query, factor = query * scale[:, None].astype(query.dtype), factor * jax.lax.stop_gradient(scale)
        if self.entropy_target:
            learned = self._learned_factor(query, key, visibility, real)
            query, factor = query * learned.astype(query.dtype), factor * learned
        return query, factor

    def _learned_factor(self, query: jax.Array, key: jax.Array, visibility: Visibility, real: RealTokens) -> jax.Array:
        """The factor on the logits, (); sows its loss. No gradient flows through either to anything but `log_scale`."""
        log_scale = self.param("log_scale", nn.initializers.zeros_init(), (), jnp.float32)
        if self.is_mutable_collection("losses"):
            query = jax.lax.stop_gradient(query) * jnp.exp(log_scale).astype(query.dtype)
            statistics = self._statistics_by_blocks(query, jax.lax.stop_gradient(key), visibility)
            counted = attention_statistics.CountedQueries.of(statistics, real.queries)
            share = jnp.mean(counted.mean(entropy.normalised_entropy(statistics.entropy, statistics.visible)))
            self._store("losses", "entropy_target", (share - self.entropy_target) ** 2)
        return jax.lax.stop_gradient(jnp.exp(log_scale))

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        visibility: Visibility,
        deterministic: bool,
        recording: bool,
    ) -> tuple[jax.Array, Statistics]:
        """Averages of the values by the attention weights, (B, T, N, H), and what gives the statistics of every query."""
        if self.implementation == "flash" and not self.is_initializing():
            rate = 0.0 if deterministic else self.dropout
            random = self.make_rng("dropout") if rate else None
            attended, own = flash(
                *(query, key, value, visibility),
                logit_cap=self.logit_cap,
                dropout=rate,
                dropout_key=random,
                statistics=recording,
            )
            return attended, lambda: cast(entropy.AttentionStatistics, own)
        queries, keys = query.shape[1], key.shape[1]
        mask, is_causal = visibility.for_kernel(queries, keys)
        kernel = self._kernel(query, mask, deterministic)
        if kernel is not None:
            attended = kernel(query, key, value, mask=mask, is_causal=is_causal)
            inputs = jax.lax.stop_gradient((query, key))
            return attended, lambda: self._statistics_by_blocks(*inputs, visibility)
        mask, logits = visibility.matrix(queries, keys), self._logits(query, key)
        weights = self._weights(logits, mask)
        dropped = nn.Dropout(self.dropout)(weights, deterministic=deterministic)
        attended = jnp.einsum("bnts,bsnh->btnh", dropped.astype(value.dtype), value)
        return attended, lambda: self._statistics_of_matrix(logits, mask, weights)

    def _needs_matrix(self, deterministic: bool) -> bool:
        return bool(self.logit_cap or self.weights != "softmax" or (self.dropout and not deterministic))

    def _kernel(self, query: jax.Array, mask: jax.Array | None, deterministic: bool) -> Callable[..., jax.Array] | None:
        """The fused kernel that attends, or None if the attention matrix is formed."""
        if self.implementation == "auto":
            # cuDNN would be given a mask as an array (B, N or 1, T, S).
            fits = mask is None and not self._needs_matrix(deterministic) and cudnn_supports(query)
            return cudnn_attention if fits else None
        if self.implementation in IMPLEMENTATIONS:
            return cudnn_attention if self.implementation == "cudnn" else None
        return cast(Callable[..., jax.Array], self._piece("implementation"))

    def _logits(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """The logits (B, N, T, S) in float32, soft-capped."""
        # The cotangent of the logits is float32; this rounds it, so that products are of bfloat16 backwards too.
        precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if query.dtype == jnp.bfloat16 else None
        logits = jnp.einsum("btnh,bsnh->bnts", query, key, precision=precision, preferred_element_type=jnp.float32)
        return entropy.soft_capped(logits * query.shape[-1] ** -0.5, self.logit_cap)

    def _weights(self, logits: jax.Array, mask: jax.Array | None) -> jax.Array:
        if self.weights != "softmax":
            function = entropy.sigmoid_weights if self.weights == "sigmoid" else self._piece("weights")
            return function(logits, jnp.ones((1, 1, *logits.shape[-2:]), bool) if mask is None else mask)
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
        return jax.nn.softmax(logits, axis=-1)

    def _statistics_of_matrix(
        self, logits: jax.Array, mask: jax.Array | None, weights: jax.Array
    ) -> entropy.AttentionStatistics:
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        own = None if self.weights in WEIGHTS else jax.lax.stop_gradient(weights)
        logits = jax.lax.stop_gradient(logits)
        return entropy.statistics_of_logits(logits, mask, sigmoid=self.weights == "sigmoid", weights=own)

    def _statistics_by_blocks(
        self, query: jax.Array, key: jax.Array, visibility: Visibility
    ) -> entropy.AttentionStatistics:
        return entropy.attention_statistics(
            query,
            key,
            **visibility.for_blocks_of_keys(),
            logit_cap=self.logit_cap or None,
            sigmoid=self.weights == "sigmoid",
        )

    def _gated(self, attended: jax.Array, x: jax.Array) -> jax.Array:
        if self.attention_gate == "none":
            return attended
        features = attended.shape[-1] if self.attention_gate == "elementwise" else 1
        return attended * nn.sigmoid(self._dense((self.num_heads, features), "gate", kernel_init=self.kernel_init)(x))

    def _record(
        self,
        statistics: entropy.AttentionStatistics,
        query: jax.Array,
        key: jax.Array,
        x: jax.Array,
        context: jax.Array | None,
        real: RealTokens,
        factor: jax.Array,
    ) -> None:
        """Stores the statistics of this call in the collection `attention`."""
        counted = attention_statistics.CountedQueries.of(statistics, real.queries)
        projections = attention_statistics.query_key_kernels(
            self.variables, stored_sigma=self.is_mutable_collection("spectral"), use_bias=self.use_bias
        )
        plain, biased = projections.norms()
        # The theorem's inputs: x where queries and keys are linear in it, else these themselves, with W = I.
        if self.qk_norm == "none" and self.process_heads == "none" and not (self.rotary_base and context is None):
            inputs = attention_statistics.norms_of_inputs(x, x if context is None else context, *real)
            sigma = inputs[:, None] * biased * factor
        else:
            sigma = attention_statistics.norms_of_heads(query, key, *real)
        bound = attention_statistics.bound(sigma * query.shape[-1] ** -0.5, statistics, counted)
        recorded = attention_statistics.summary(statistics, counted) | {"qk_norm": plain, "bound": bound}
        for name, value in recorded.items():
            self._store("attention", name, value)

    def _store(self, collection: str, name: str, value: jax.Array) -> None:
        self.sow(collection, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


_DECLARED = {each.name: each for each in dataclasses.fields(MultiHeadAttention) if "declared" in each.metadata}
AttentionConfig: Any = dataclasses.make_dataclass(
    "AttentionConfig",
    [
        (MODEL_NAMES.get(name, name), each.type, dataclasses.field(default=each.default, metadata=each.metadata))
        for name, each in _DECLARED.items()
    ],
    frozen=True,
    kw_only=True,
    namespace={
        "__doc__": "The declared fields of `MultiHeadAttention`, by their names in `config.model`.",
        "__module__": __name__,
    },
)


def create_attention(config: Any, num_heads: int, **others: Any) -> MultiHeadAttention:
    """The layer that an `AttentionConfig` describes, such as a `TransformerConfig`; `others` are its remaining fields."""
    declared = {name: getattr(config, MODEL_NAMES.get(name, name)) for name in _DECLARED}
    return MultiHeadAttention(num_heads, **declared, **others)
