"""Multi-head attention whose entropy can be read, whether or not it forms the attention matrix.

Shapes: B batch, T queries, S keys, N heads, H head_dim, D width.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep.core import entropy, spectral
from sigmarep.nn.constraints import constrained
from sigmarep.nn.fold import fold
from sigmarep.nn.fused_attention import cudnn_attention, cudnn_serves
from sigmarep.nn.linear import SigmaDenseGeneral
from sigmarep.nn.positions import rotated

QKV = ("separate", "fused", "qk_v")
IMPLEMENTATIONS = ("auto", "xla", "cudnn")
QK_NORMS = ("none", "layer", "rms")
WEIGHTS = ("softmax", "sigmoid")
DEFAULT_KERNEL_INIT = nn.initializers.lecun_normal()


def _sequence_norms(x: jax.Array, real: jax.Array | None, *, ones: bool = False) -> jax.Array:
    """‖X‖₂ of every sequence (…, B, T, D) without its padding, the tokens where `real` (B, T) is False; X has a column of
    ones, which biases are the weights of, if `ones`."""
    x = jax.lax.stop_gradient(x)
    column = jnp.ones(x.shape[:-1], x.dtype) if ones else None
    if real is not None:
        x = jnp.where(real[..., None], x, 0)
        column = real.astype(x.dtype) if ones else None
    return spectral.sequence_norm(x, column)


def _causal(query, key) -> jax.Array:
    """Bool (T, S): query i sees keys up to i + S − T."""
    t, s = query.shape[1], key.shape[1]
    return jnp.tril(jnp.ones((t, s), bool), s - t)


def slot_scaled(init: Callable, factors: tuple[float, ...]) -> Callable:
    """An initializer of fused projections (D, slots · N · H) whose slots are multiplied by `factors`."""

    def initializer(key, shape, dtype=jnp.float32):
        slots = init(key, shape, dtype).reshape(shape[0], len(factors), -1)
        return (slots * jnp.asarray(factors, dtype)[:, None]).reshape(shape)

    return initializer


class MultiHeadAttention(nn.Module):
    """softmax(s·Q Kᵀ)·V over heads, with reparametrised projections.

    Apply with `mutable=["attention"]` to receive, in that collection: `entropy` (N,), the mean over real queries in
    nats; `entropy_normalised` (N,), the same divided by ln(visible keys); `max_logit` (N,); `logit_variance` (N,), the
    mean over queries of the variance over the keys each sees; `qk_norm` (N,), the spectral norm of each head's W_q W_kᵀ;
    `bound` (N,), the mean over queries of the least entropy that Theorem 3.1 allows these inputs. They are taken before
    dropout, and cost nothing when not asked for.

    Attributes:
      num_heads: N.
      head_dim: H; D / N if None.
      qkv: "separate" projections with a γ each; "fused", one projection and one γ; "qk_v", one of queries and keys and
        one of values.
      implementation: "xla" forms the attention matrix, and the statistics are of its logits; "cudnn" is the fused kernel of
        `jax.nn.dot_product_attention`, beside which the statistics are taken by blocks of keys; "auto" is cuDNN's in half
        precision on a GPU without mask, attention dropout, soft-cap and sigmoid weights, else "xla".
      weights: "softmax", or "sigmoid" (`sigmarep.core.entropy.sigmoid_weights`), whose entropy is that of the weights
        divided by their sum.
      qk_norm: normalises queries and keys over H before their product ("layer" without bias, or "rms").
      logit_cap: soft-cap of the logits, off at 0.
      temperature: τ; the logits are divided by it, before the soft-cap.
      entropy_target: not 0, the share of the largest possible entropy, from 0 to 1, to which a learned factor on the logits
        drives the mean over queries and heads: the parameter `log_scale` () is that factor's logarithm, and receives no
        gradient but that of (entropy/ln(visible keys) − entropy_target)², sown in the collection `losses`. The
        temperature of maximum-entropy reinforcement learning (Haarnoja et al., 2018), one for each layer.
      rotary_base: base of rotary positions (10000 usually), which self-attention then has; off at 0.
      dropout: rate on the attention weights.
      value_scale: factor on the initial value and output kernels (DeepNorm's β).
    """

    num_heads: int
    head_dim: int | None = None
    qkv: str = "separate"
    use_bias: bool = True
    dropout: float = 0.0
    implementation: str = "auto"
    weights: str = "softmax"
    qk_norm: str = "none"
    logit_cap: float = 0.0
    temperature: float = 1.0
    entropy_target: float = 0.0
    rotary_base: float = 0.0
    value_scale: float = 1.0
    reparam: str = "sigma"
    gamma_init: str | float = "one"
    gamma_trainable: bool = True
    power_vectors: int = 1
    kernel_init: Callable = DEFAULT_KERNEL_INIT
    bias_init: Callable = nn.initializers.zeros_init()
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        key_padding: jax.Array | None = None,
        query_padding: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        is_causal: bool = False,
        cache_length: int = 0,
        deterministic: bool = True,
    ) -> jax.Array:
        """Attends from x to `context`, or to itself.

        Args:
          x: (B, T, D).
          context: (B, S, D), x if None.
          mask: bool, broadcastable to (B, N, T, S), True where a key is visible.
          key_padding: bool (B, S), True for real keys.
          query_padding: bool (B, T), True for real queries: the others are left out of the statistics. Taken to be
            `key_padding` in self-attention.
          segments: int (B, T), self-attention only: a token sees its own segment; 0 stands for padding.
          positions: int (B, T) for rotary positions; 0, 1, … if None.
          is_causal: a query sees no later key: query i, keys up to i + S − T.
          cache_length: decoding, if not 0; apply with `mutable=["cache"]`. x holds the next T tokens, which see the
            earlier ones through the collection `cache` (made by the first call, for so many tokens) and each other
            causally. With a context, its keys and values are kept from the first call. Masks and segments are not for
            it; `key_padding` is that of the context.
          deterministic: no dropout.

        Returns:
          (B, T, D).
        """
        self._check(x.shape[-1], deterministic)
        real_keys = key_padding if segments is None else segments > 0
        if context is None and query_padding is None:
            query_padding = real_keys
        if cache_length and context is not None:
            query, key, value = self._project_cached(x, context)
        else:
            query, key, value = self._project(x, x if context is None else context, fusable=context is None)
        query, key, value = (constrained(x, "batch", "length", "heads", "head_dim") for x in (query, key, value))
        if self.qk_norm != "none":
            norm = nn.LayerNorm if self.qk_norm == "layer" else nn.RMSNorm
            options: dict[str, Any] = {"use_bias": False} if self.qk_norm == "layer" else {}
            query = norm(name="query_norm", dtype=self.dtype, **options)(query)
            key = norm(name="key_norm", dtype=self.dtype, **options)(key)
        if self.rotary_base and context is None:
            if positions is None:
                positions = jnp.arange(x.shape[1])[None]
            query, key = (rotated(each, positions, self.rotary_base) for each in (query, key))
        if self.temperature != 1.0:
            query = query / jnp.asarray(self.temperature, query.dtype)
        visibility = (mask, key_padding, segments, is_causal)
        factor = jnp.float32(1.0 / self.temperature)
        if self.entropy_target:
            learned = self._learned_factor(query, key, visibility, query_padding)
            query, factor = query * learned.astype(query.dtype), factor * learned
        cached = cache_length and context is None
        if cached:
            key, value, mask = self._cached(key, value, cache_length)
            is_causal = False
        recording = self.is_mutable_collection("attention") and not self.is_initializing() and not cached
        if segments is not None:
            same = segments[:, None, :, None] == segments[:, None, None, :]
            mask = same if mask is None else mask & same
        if key_padding is not None:
            real = key_padding[:, None, None, :]
            mask = real if mask is None else mask & real
        if is_causal and query.shape[1] != key.shape[1]:
            # Kernels count from the first query and key, this layer from the last.
            causal = _causal(query, key)
            mask, is_causal = causal if mask is None else mask & causal, False
        if self._fused(query, mask, deterministic):
            attended = cudnn_attention(query, key, value, mask=mask, is_causal=is_causal)
            found = self._statistics(*jax.lax.stop_gradient((query, key)), visibility) if recording else None
        else:
            logits, mask = self._logits(query, key, mask, is_causal)
            attended = self._attend(logits, mask, value, deterministic)
            found = self._statistics_of(logits, mask) if recording else None
        if found is not None:
            # The theorem's inputs: x where queries and keys are linear in it, else these themselves, with W = I.
            linear = self.qk_norm == "none" and not (self.rotary_base and context is None)
            inputs = (x, x if context is None else context) if linear else None
            paddings = (query_padding, real_keys)
            self._record(found, query, key, inputs, paddings, factor)

        attended = constrained(attended, "batch", "length", "heads", "head_dim")
        return self._dense(x.shape[-1], "out", axis=(-2, -1), kernel_init=self._scaled_init())(attended)

    def _cached(self, key, value, length: int):
        """All keys and values so far with the new ones among them, (B, length, N, H), and who sees whom."""
        batch, new, *rest = key.shape
        keys = self.variable("cache", "cached_key", jnp.zeros, (batch, length, *rest), key.dtype)
        values = self.variable("cache", "cached_value", jnp.zeros, (batch, length, *rest), value.dtype)
        index = self.variable("cache", "cached_index", lambda: jnp.zeros((), jnp.int32))
        start = index.value
        keys.value = jax.lax.dynamic_update_slice_in_dim(keys.value, key, start, axis=1)
        values.value = jax.lax.dynamic_update_slice_in_dim(values.value, value, start, axis=1)
        index.value = start + new
        visible = jnp.arange(length)[None, :] <= start + jnp.arange(new)[:, None]
        return keys.value, values.value, visible[None, None]

    def _project_cached(self, x, context):
        """Queries of x; keys and values of the context as the first call projected them."""
        heads = (self.num_heads, self.head_dim or x.shape[-1] // self.num_heads)
        if self.has_variable("cache", "cached_key"):
            query = self._dense(heads, "query", makes=("query",), kernel_init=self.kernel_init)(x)
            return query, self.get_variable("cache", "cached_key"), self.get_variable("cache", "cached_value")
        query, key, value = self._project(x, context, fusable=False)
        self.put_variable("cache", "cached_key", key)
        self.put_variable("cache", "cached_value", value)
        return query, key, value

    def _check(self, width: int, deterministic: bool) -> None:
        if self.head_dim is None and width % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads}: does not divide the width {width}")
        named = {"qkv": QKV, "implementation": IMPLEMENTATIONS, "qk_norm": QK_NORMS, "weights": WEIGHTS}
        for name, words in named.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(words)}")
        if self.implementation == "cudnn" and self._needs_matrix(deterministic):
            raise ValueError(
                "implementation = 'cudnn': attention dropout, logit_cap and sigmoid weights need 'xla' or 'auto'"
            )

    def _needs_matrix(self, deterministic: bool) -> bool:
        return bool(self.logit_cap or self.weights == "sigmoid" or (self.dropout and not deterministic))

    def _fused(self, query, mask, deterministic: bool) -> bool:
        """Whether cuDNN's kernel attends."""
        if self.implementation != "auto":
            return self.implementation == "cudnn"
        # It would be given a mask as an array (B, N or 1, T, S).
        return mask is None and not self._needs_matrix(deterministic) and cudnn_serves(query)

    def _dense(self, features, name: str, **options):
        return SigmaDenseGeneral(
            features,
            use_bias=self.use_bias,
            reparam=self.reparam,
            gamma_init=self.gamma_init,
            gamma_trainable=self.gamma_trainable,
            power_vectors=self.power_vectors,
            bias_init=self.bias_init,
            dtype=self.dtype,
            name=name,
            **options,
        )

    def _scaled_init(self):
        if self.value_scale == 1.0:
            return self.kernel_init
        return slot_scaled(self.kernel_init, (self.value_scale,))

    def _project(self, x, context, *, fusable: bool):
        heads = (self.num_heads, self.head_dim or x.shape[-1] // self.num_heads)
        if self.qkv == "separate" or not fusable:
            query = self._dense(heads, "query", makes=("query",), kernel_init=self.kernel_init)(x)
            key = self._dense(heads, "key", makes=("key",), kernel_init=self.kernel_init)(context)
            value = self._dense(heads, "value", makes=("value",), kernel_init=self._scaled_init())(context)
        elif self.qkv == "qk_v":
            both = self._dense((2, *heads), "qk", makes=("query", "key"), kernel_init=self.kernel_init)(x)
            query, key = both[..., 0, :, :], both[..., 1, :, :]
            value = self._dense(heads, "value", makes=("value",), kernel_init=self._scaled_init())(x)
        else:
            init = slot_scaled(self.kernel_init, (1.0, 1.0, self.value_scale))
            fused = self._dense((3, *heads), "qkv", makes=("query", "key", "value"), kernel_init=init)(x)
            query, key, value = (fused[..., i, :, :] for i in range(3))
        return query, key, value

    def _logits(self, query, key, mask, is_causal):
        """The logits (B, N, T, S) in float32, soft-capped, and a mask that is causal too."""
        # The cotangent of the logits is float32; this rounds it, so that products are of bfloat16 backwards too.
        precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if query.dtype == jnp.bfloat16 else None
        logits = jnp.einsum("btnh,bsnh->bnts", query, key, precision=precision, preferred_element_type=jnp.float32)
        logits = entropy.soft_capped(logits * query.shape[-1] ** -0.5, self.logit_cap)
        if is_causal:
            causal = _causal(query, key)
            mask = causal if mask is None else mask & causal
        return logits, mask

    def _attend(self, logits, mask, value, deterministic):
        if self.weights == "sigmoid":
            visible = jnp.ones((1, 1, *logits.shape[-2:]), bool) if mask is None else mask
            weights = entropy.sigmoid_weights(logits, visible)
        else:
            if mask is not None:
                logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
            weights = jax.nn.softmax(logits, axis=-1)
        weights = nn.Dropout(self.dropout)(weights, deterministic=deterministic)
        return jnp.einsum("bnts,bsnh->btnh", weights.astype(value.dtype), value)

    def _statistics_of(self, logits, mask):
        """The statistics of all queries where attention formed the logits."""
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        return entropy.statistics_of_logits(jax.lax.stop_gradient(logits), mask, sigmoid=self.weights == "sigmoid")

    def _statistics(self, query, key, visibility):
        """The statistics of all queries by blocks of keys."""
        mask, key_padding, segments, is_causal = visibility
        return entropy.attention_statistics(
            query,
            key,
            mask=mask,
            key_padding=key_padding,
            segments=segments,
            is_causal=is_causal,
            logit_cap=self.logit_cap or None,
            sigmoid=self.weights == "sigmoid",
        )

    def _over_queries(self, found, query_padding):
        """Of which queries the statistics count, and what takes the mean of one over these."""
        real = found.visible > 0
        if query_padding is not None:
            real = real & query_padding[:, None, :]
        real = jnp.broadcast_to(real, found.entropy.shape)
        count = jnp.maximum(jnp.sum(real, axis=(0, 2)), 1)
        return real, lambda values: jnp.sum(jnp.where(real, values, 0.0), axis=(0, 2)) / count

    def _learned_factor(self, query, key, visibility, query_padding):
        """The factor on the logits, (); sows its loss. No gradient flows through either to anything but `log_scale`."""
        log_scale = self.param("log_scale", nn.initializers.zeros_init(), (), jnp.float32)
        if self.is_mutable_collection("losses"):
            query = jax.lax.stop_gradient(query) * jnp.exp(log_scale).astype(query.dtype)
            found = self._statistics(query, jax.lax.stop_gradient(key), visibility)
            _, mean = self._over_queries(found, query_padding)
            share = jnp.mean(mean(entropy.normalised_entropy(found.entropy, found.visible)))
            self._store("entropy_target", (share - self.entropy_target) ** 2, collection="losses")
        return jax.lax.stop_gradient(jnp.exp(log_scale))

    def _record(self, found, query, key, inputs, paddings, factor):
        real, mean = self._over_queries(found, paddings[0])
        self._store("entropy", mean(found.entropy))
        self._store("entropy_normalised", mean(entropy.normalised_entropy(found.entropy, found.visible)))
        self._store("max_logit", entropy.largest(jnp.where(real, found.max_logit, -jnp.inf), (0, 2)))
        self._store("logit_variance", mean(found.logit_variance))
        kernels, biases = self._query_key_kernels()
        products = spectral.product_norm(*kernels, biases)
        plain, biased = (products, products) if biases is None else products
        self._store("qk_norm", plain)
        if inputs is None:
            norms = [_sequence_norms(jnp.moveaxis(x, 2, 0), p) for x, p in zip((query, key), paddings, strict=True)]
            sigma = (norms[0] * norms[1]).T
        else:
            norms = [_sequence_norms(inputs[0], paddings[0], ones=True)] * 2
            # In self-attention both are one; two loops would be compiled as two.
            if inputs[1] is not inputs[0] or paddings[1] is not paddings[0]:
                norms[1] = _sequence_norms(inputs[1], paddings[1], ones=True)
            sigma = (norms[0] * norms[1])[:, None] * biased * factor
        scaled = sigma[:, :, None] * query.shape[-1] ** -0.5
        self._store("bound", mean(entropy.entropy_lower_bound(scaled, found.visible)))

    def _query_key_kernels(self):
        """Of queries and of keys the effective kernels (N, D, H), and the biases as a row (N, 1, H) or None."""
        names = [name for name in ("query", "key", "qk", "qkv") if name in self.variables["params"]]
        state = self.variables.get("spectral", {})
        kernels = fold(
            {
                "params": {name: self.variables["params"][name] for name in names},
                "spectral": {name: state[name] for name in names if name in state},
            },
            # The projections have stored theirs by now, where they may.
            stored_sigma=self.is_mutable_collection("spectral"),
        )
        if "query" in kernels:
            pair = [kernels[name] for name in ("query", "key")]
        else:
            fused = kernels[names[0]]
            pair = [{name: x[:, slot] if name == "kernel" else x[slot] for name, x in fused.items()} for slot in (0, 1)]
        plain = [jnp.moveaxis(jax.lax.stop_gradient(each["kernel"]), 1, 0) for each in pair]
        if not self.use_bias:
            return plain, None
        return plain, tuple(jax.lax.stop_gradient(each["bias"])[:, None] for each in pair)

    def _store(self, name: str, value: jax.Array, collection: str = "attention") -> None:
        self.sow(collection, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
