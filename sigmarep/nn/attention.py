"""Multi-head attention whose entropy can be read, by any of three ways of computing it.

Shapes: B batch, T queries, S keys, N heads, H head_dim, D width.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep.core import entropy, spectral
from sigmarep.nn.fold import fold
from sigmarep.nn.linear import SigmaDenseGeneral
from sigmarep.nn.positions import rotated

QKV = ("separate", "fused", "qk_v")
IMPLEMENTATIONS = ("auto", "reference", "xla", "cudnn")
QK_NORMS = ("none", "layer", "rms")
DEFAULT_KERNEL_INIT = nn.initializers.lecun_normal()


def slot_scaled(init: Callable, factors: tuple[float, ...]) -> Callable:
    """An initializer of fused projections (D, slots · N · H) whose slots are multiplied by `factors`."""

    def initializer(key, shape, dtype=jnp.float32):
        slots = init(key, shape, dtype).reshape(shape[0], len(factors), -1)
        return (slots * jnp.asarray(factors, dtype)[:, None]).reshape(shape)

    return initializer


class MultiHeadAttention(nn.Module):
    """softmax(s·Q Kᵀ)·V over heads, with reparametrised projections.

    Apply with `mutable=["attention"]` to receive, in that collection: `entropy` (N,), the mean over real queries in
    nats; `entropy_normalised` (N,), the same divided by ln(visible keys); `max_logit` (N,); `qk_norm` (N,), the
    spectral norm of each head's W_q W_kᵀ. They are taken before dropout, and cost nothing when not asked for.

    Attributes:
      num_heads: N.
      head_dim: H; D / N if None.
      qkv: "separate" projections with a γ each; "fused", one projection and one γ; "qk_v", one of queries and keys and
        one of values.
      implementation: "reference" keeps the attention matrix; "xla" and "cudnn" are `jax.nn.dot_product_attention`'s;
        "auto" is the reference where attention dropout or a soft-cap needs it, else "xla".
      qk_norm: normalises queries and keys over H before their product ("layer" without bias, or "rms").
      logit_cap: soft-cap of the logits, off at 0.
      temperature: τ; the logits are divided by it, before the soft-cap.
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
    qk_norm: str = "none"
    logit_cap: float = 0.0
    temperature: float = 1.0
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
          is_causal: a query sees no later key.
          cache_length: decoding, if not 0; apply with `mutable=["cache"]`. x holds the next T tokens, which see the
            earlier ones through the collection `cache` (made by the first call, for so many tokens) and each other
            causally. With a context, its keys and values are kept from the first call. Masks and segments are not for
            it; `key_padding` is that of the context.
          deterministic: no dropout.

        Returns:
          (B, T, D).
        """
        self._check(x.shape[-1], deterministic)
        if context is None and query_padding is None:
            query_padding = key_padding if segments is None else segments > 0
        if cache_length and context is not None:
            query, key, value = self._project_cached(x, context)
        else:
            query, key, value = self._project(x, x if context is None else context, fusable=context is None)
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
        if cache_length and context is None:
            key, value, mask = self._cached(key, value, cache_length)
            is_causal = False
        elif self.is_mutable_collection("attention") and not self.is_initializing():
            self._record(query, key, mask, key_padding, query_padding, segments, is_causal)
        if segments is not None:
            same = segments[:, None, :, None] == segments[:, None, None, :]
            mask = same if mask is None else mask & same

        attended = self._attend(query, key, value, mask, key_padding, is_causal, deterministic)
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
            query = self._dense(heads, "query", kernel_init=self.kernel_init)(x)
            return query, self.get_variable("cache", "cached_key"), self.get_variable("cache", "cached_value")
        query, key, value = self._project(x, context, fusable=False)
        self.put_variable("cache", "cached_key", key)
        self.put_variable("cache", "cached_value", value)
        return query, key, value

    def _check(self, width: int, deterministic: bool) -> None:
        if self.head_dim is None and width % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads}: does not divide the width {width}")
        for name, words in (("qkv", QKV), ("implementation", IMPLEMENTATIONS), ("qk_norm", QK_NORMS)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(words)}")
        if self.implementation in ("xla", "cudnn") and (self.logit_cap or (self.dropout and not deterministic)):
            raise ValueError(
                f"implementation = {self.implementation!r}: attention dropout and logit_cap need 'reference' or 'auto'"
            )

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
            query = self._dense(heads, "query", kernel_init=self.kernel_init)(x)
            key = self._dense(heads, "key", kernel_init=self.kernel_init)(context)
            value = self._dense(heads, "value", kernel_init=self._scaled_init())(context)
        elif self.qkv == "qk_v":
            both = self._dense((2, *heads), "qk", kernel_init=self.kernel_init)(x)
            query, key = both[..., 0, :, :], both[..., 1, :, :]
            value = self._dense(heads, "value", kernel_init=self._scaled_init())(x)
        else:
            init = slot_scaled(self.kernel_init, (1.0, 1.0, self.value_scale))
            fused = self._dense((3, *heads), "qkv", kernel_init=init)(x)
            query, key, value = (fused[..., i, :, :] for i in range(3))
        return query, key, value

    def _attend(self, query, key, value, mask, key_padding, is_causal, deterministic):
        if key_padding is not None:
            visible = key_padding[:, None, None, :]
            mask = visible if mask is None else mask & visible
        dropping = self.dropout > 0 and not deterministic
        if self.implementation != "reference" and not (dropping or self.logit_cap):
            implementation: Any = "xla" if self.implementation == "auto" else self.implementation
            return jax.nn.dot_product_attention(
                query, key, value, mask=mask, is_causal=is_causal, implementation=implementation
            )
        logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
        logits = entropy.soft_capped(logits * query.shape[-1] ** -0.5, self.logit_cap)
        if is_causal:
            t, s = logits.shape[-2:]
            causal = jnp.tril(jnp.ones((t, s), bool), s - t)
            mask = causal if mask is None else mask & causal
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
        weights = jax.nn.softmax(logits, axis=-1)
        weights = nn.Dropout(self.dropout)(weights, deterministic=deterministic)
        return jnp.einsum("bnts,bsnh->btnh", weights.astype(value.dtype), value)

    def _record(self, query, key, mask, key_padding, query_padding, segments, is_causal):
        query, key = jax.lax.stop_gradient((query, key))
        found = entropy.attention_statistics(
            query,
            key,
            mask=mask,
            key_padding=key_padding,
            segments=segments,
            is_causal=is_causal,
            logit_cap=self.logit_cap or None,
        )
        real = found.visible > 0
        if query_padding is not None:
            real = real & query_padding[:, None, :]
        real = jnp.broadcast_to(real, found.entropy.shape)
        count = jnp.maximum(jnp.sum(real, axis=(0, 2)), 1)

        def mean(values):
            return jnp.sum(jnp.where(real, values, 0.0), axis=(0, 2)) / count

        self._store("entropy", mean(found.entropy))
        self._store("entropy_normalised", mean(entropy.normalised_entropy(found.entropy, found.visible)))
        self._store("max_logit", jnp.max(jnp.where(real, found.max_logit, -jnp.inf), axis=(0, 2)))
        self._store("qk_norm", self._qk_norm())

    def _qk_norm(self):
        names = [name for name in ("query", "key", "qk", "qkv") if name in self.variables["params"]]
        state = self.variables.get("spectral", {})
        kernels = fold(
            {
                "params": {name: self.variables["params"][name] for name in names},
                "spectral": {name: state[name] for name in names if name in state},
            }
        )
        if "query" in kernels:
            query, key = kernels["query"]["kernel"], kernels["key"]["kernel"]
        else:
            fused = kernels[names[0]]["kernel"]
            query, key = fused[:, 0], fused[:, 1]
        query, key = jax.lax.stop_gradient((query, key))
        return spectral.product_norm(jnp.moveaxis(query, 1, 0), jnp.moveaxis(key, 1, 0))

    def _store(self, name: str, value: jax.Array) -> None:
        self.sow("attention", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
