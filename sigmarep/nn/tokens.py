"""Token embeddings and next-token losses, plain or adaptive.

The adaptive table (Grave et al., 2017; Baevski and Auli, 2019) gives rare words shorter vectors: words from
`cutoffs[i - 1]` to `cutoffs[i]` have D/4^i features. A projection maps them to D features at the input; its transpose
maps back at the output, where each band of rare words is one class among the frequent words.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sigmarep.core.entropy import soft_capped
from sigmarep.nn.linear import ReparametrizedLayer, Role, SigmaEmbed


class TokenLosses(NamedTuple):
    """Losses per token, float32, in nats.

    Attributes:
      nll: −ln p of the target.
      uniform: the mean of −ln p over the vocabulary; 0 for an adaptive table.
      log_normalizer: ln Σ exp(logits); over the frequent words and the classes only for an adaptive table.
    """

    nll: jax.Array
    uniform: jax.Array
    log_normalizer: jax.Array


# Tables (V_i, d_i), projections (d_i, D), and classes (D, bands − 1) or None.
OutputKernels = tuple[list[jax.Array], list[jax.Array], jax.Array | None]


class Projection(ReparametrizedLayer):
    """A kernel (inputs, features) used in both directions, reparametrized as in `SigmaDense`."""

    inputs: int = 0
    features: int = 0
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()

    def setup(self) -> None:
        self.kernel = self.param("kernel", self.kernel_init, (self.inputs, self.features), jnp.float32)


class TokenEmbedding(nn.Module):
    """Embeds tokens, and computes the logits and losses of the next token.

    Attributes:
      size: V, the number of tokens.
      features: D.
      tied: True takes the logits from the embeddings, False from a separate kernel `head`. An adaptive table must be tied.
      cutoffs: cutoffs of the adaptive table, increasing and below V; empty for a plain table.
      reparam_embedding: reparametrizes the embeddings as well.
      reparametrization: arguments of the reparametrized layers.
      kernel_init: initializer of the head and the projections. Embeddings are initialized normal with standard deviation
        D^−½ and multiplied by √D at the input.
      logit_cap: soft cap of the logits; 0 for none.
    """

    size: int
    features: int
    tied: bool = True
    cutoffs: Sequence[int] = ()
    reparam_embedding: bool = False
    reparametrization: Any = None
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    logit_cap: float = 0.0

    def setup(self) -> None:
        options = dict(self.reparametrization or {})
        self.dtype = options.get("dtype") or jnp.float32
        inner = options | {"reparam": options.get("reparam", "sigma") if self.reparam_embedding else "none"}
        edges = [0, *self.cutoffs, self.size]
        if any(low >= high for low, high in itertools.pairwise(edges)):
            raise ValueError(f"adaptive_cutoffs = {tuple(self.cutoffs)}: expected rising numbers below {self.size}")
        if len(edges) == 2:
            self.tables = [self._embed(self.size, self.features, inner)]
            self.projections = []
            self.classes = None
        else:
            if not self.tied:
                raise ValueError("tie_embeddings = False: adaptive embeddings are tied")
            widths = [self.features // 4**i for i in range(len(edges) - 1)]
            if widths[-1] < 1:
                raise ValueError(f"adaptive_cutoffs = {tuple(self.cutoffs)}: too many for width = {self.features}")
            self.tables = [
                self._embed(high - low, width, inner)
                for (low, high), width in zip(itertools.pairwise(edges), widths, strict=True)
            ]
            self.projections = [self._projection(width, self.features, "input", options) for width in widths]
            self.classes = self._projection(self.features, len(edges) - 2, "output", options)
        self.head = None if self.tied else self._projection(self.features, self.size, "output", options)

    def _embed(self, size: int, width: int, options: dict[str, Any]) -> SigmaEmbed:
        return SigmaEmbed(size, width, embedding_init=nn.initializers.normal(width**-0.5), **options)

    def _projection(self, inputs: int, features: int, role: Role, options: dict[str, Any]) -> Projection:
        options = {name: value for name, value in options.items() if name != "dtype"}
        return Projection(inputs=inputs, features=features, kernel_init=self.kernel_init, role=role, **options)

    def encode(self, tokens: jax.Array) -> jax.Array:
        """Embeds tokens (…,) as (…, D), multiplied by √D."""
        if not self.projections:
            embedded = self.tables[0](tokens)
        else:
            embedded, low = 0.0, 0
            for table, projection in zip(self.tables, self.projections, strict=True):
                index = tokens - low
                inside = (index >= 0) & (index < table.num_embeddings)
                vectors = table(jnp.where(inside, index, 0)) @ projection.kernel.astype(self.dtype)
                embedded = jnp.where(inside[..., None], vectors, embedded)
                low += table.num_embeddings
        return embedded * jnp.asarray(math.sqrt(self.features), self.dtype)

    def losses(self, hidden: jax.Array, targets: jax.Array, *, chunk: int = 0) -> TokenLosses:
        """Losses of `targets` (B, T) given `hidden` (B, T, D).

        Args:
          chunk: number of positions whose logits are computed at a time, and recomputed in the backward pass, so that no
            array of size B × T × V is kept; 0 computes all at once.

        Raises:
          ValueError: `chunk` does not divide T.
        """
        function = functools.partial(_losses, kernels=self._output_kernels(), logit_cap=self.logit_cap)
        batch, length = targets.shape
        if not chunk or length <= chunk:
            return function(hidden, targets)
        if length % chunk:
            raise ValueError(f"logit_chunk = {chunk}: does not divide the {length} positions")

        def split(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x.reshape(batch, length // chunk, chunk, *x.shape[2:]), 1, 0)

        losses = jax.lax.map(jax.checkpoint(lambda part: function(*part)), (split(hidden), split(targets)))
        return TokenLosses(*(jnp.moveaxis(x, 0, 1).reshape(batch, length) for x in losses))

    def log_probabilities(self, hidden: jax.Array) -> jax.Array:
        """ln p of every token, (…, D) to (…, V), float32."""
        head, *tails = self._logits(hidden)
        head = jax.nn.log_softmax(head)
        if not tails:
            return head
        frequent = head.shape[-1] - len(tails)
        bands = [head[..., frequent + i, None] + jax.nn.log_softmax(tail) for i, tail in enumerate(tails)]
        return jnp.concatenate([head[..., :frequent], *bands], axis=-1)

    def _logits(self, hidden: jax.Array) -> list[jax.Array]:
        return _logits(hidden, self._output_kernels(), self.logit_cap)

    def _output_kernels(self) -> OutputKernels:
        """Kernels of the logits: tables (V_i, d_i), projections (d_i, D), and classes (D, bands − 1) or None."""
        if self.head is not None:
            return [self.head.kernel.T.astype(self.dtype)], [], None
        cast = functools.partial(jax.tree.map, lambda x: x.astype(self.dtype))
        tables = [table.embedding for table in self.tables]
        classes = None if self.classes is None else self.classes.kernel
        return cast(tables), cast([each.kernel for each in self.projections]), cast(classes)


def _logits(hidden: jax.Array, kernels: OutputKernels, logit_cap: float) -> list[jax.Array]:
    """Float32 logits as a list: the frequent words followed by the classes of rare bands, then each band's words."""
    tables, projections, classes = kernels
    logits_of_bands = []
    for i, table in enumerate(tables):
        narrow = hidden @ projections[i].T if projections else hidden
        logits = jnp.einsum("...d,vd->...v", narrow, table, preferred_element_type=jnp.float32)
        if i == 0 and classes is not None:
            class_logits = jnp.einsum("...d,dc->...c", hidden, classes, preferred_element_type=jnp.float32)
            logits = jnp.concatenate([logits, class_logits], axis=-1)
        logits_of_bands.append(soft_capped(logits, logit_cap))
    return logits_of_bands


def _losses(hidden: jax.Array, targets: jax.Array, *, kernels: OutputKernels, logit_cap: float) -> TokenLosses:
    head, *tails = _logits(hidden, kernels, logit_cap)
    normalizer = jax.nn.logsumexp(head, axis=-1)
    frequent = head.shape[-1] - len(tails)
    nll = normalizer - _taken(head, jnp.minimum(targets, frequent - 1))
    low = frequent
    for i, tail in enumerate(tails):
        index = targets - low
        inside = (index >= 0) & (index < tail.shape[-1])
        rare = normalizer - head[..., frequent + i] + jax.nn.logsumexp(tail, axis=-1)
        rare = rare - _taken(tail, jnp.where(inside, index, 0))
        nll = jnp.where(inside, rare, nll)
        low += tail.shape[-1]
    uniform = jnp.zeros_like(nll) if tails else normalizer - jnp.mean(head, axis=-1)
    return TokenLosses(nll, uniform, normalizer)


def _taken(logits: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
