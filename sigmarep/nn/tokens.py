"""Tokens in and out of a Transformer: embeddings, and the losses of the next token, plain or adaptive.

The adaptive table (Grave et al., 2017; Baevski and Auli, 2019) gives rare words shorter vectors: the words from
`cutoffs[i - 1]` to `cutoffs[i]` have d/4^i features, projected to d on the way in, and by the transposed projection on the
way out, where each rare band is one class among the frequent words.
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
from sigmarep.nn.linear import Reparametrised, SigmaEmbed


class TokenLosses(NamedTuple):
    """Of every token, float32: `nll`, −ln p of the target; `uniform`, the mean of −ln p over the vocabulary (0 for an
    adaptive table); `log_normaliser`, ln Σ exp(logits), of the frequent words under an adaptive table."""

    nll: jax.Array
    uniform: jax.Array
    log_normaliser: jax.Array


class Projection(Reparametrised):
    """A kernel (inputs, features) that is used in both directions, reparametrised like a `SigmaDense`'s."""

    inputs: int = 0
    features: int = 0
    kernel_init: Callable = nn.initializers.lecun_normal()

    def setup(self):
        self.kernel = self.param("kernel", self.kernel_init, (self.inputs, self.features), jnp.float32)


class TokenTable(nn.Module):
    """Embeddings of tokens, and the logits of the next one.

    Attributes:
      size: V, tokens. features: D.
      tied: the logits come from the embeddings; else from a kernel of their own, `head`. An adaptive table is tied.
      cutoffs: of the adaptive table, rising and below V; none for a plain one.
      reparam_embedding: reparametrises plain embeddings too.
      reparametrisation: arguments of the reparametrised layers.
      kernel_init: of the head and of projections. Embeddings start normal with standard deviation D^−½ and are
        multiplied by √D on the way in.
      logit_cap: soft-cap of the logits, off at 0.
    """

    size: int
    features: int
    tied: bool = True
    cutoffs: Sequence[int] = ()
    reparam_embedding: bool = False
    reparametrisation: Any = None
    kernel_init: Callable = nn.initializers.lecun_normal()
    logit_cap: float = 0.0

    def setup(self):
        options = dict(self.reparametrisation or {})
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
            self.projections = [self._projection(width, self.features, options) for width in widths]
            self.classes = self._projection(self.features, len(edges) - 2, options)
        self.head = None if self.tied else self._projection(self.features, self.size, options)

    def _embed(self, size, width, options):
        return SigmaEmbed(size, width, embedding_init=nn.initializers.normal(width**-0.5), **options)

    def _projection(self, inputs, features, options):
        options = {name: value for name, value in options.items() if name != "dtype"}
        return Projection(inputs=inputs, features=features, kernel_init=self.kernel_init, **options)

    def encode(self, tokens: jax.Array) -> jax.Array:
        """(…,) to (…, D), multiplied by √D."""
        if not self.projections:
            found = self.tables[0](tokens)
        else:
            found, low = 0.0, 0
            for table, projection in zip(self.tables, self.projections, strict=True):
                index = tokens - low
                inside = (index >= 0) & (index < table.num_embeddings)
                vectors = table(jnp.where(inside, index, 0)) @ projection.kernel.astype(self.dtype)
                found = jnp.where(inside[..., None], vectors, found)
                low += table.num_embeddings
        return found * jnp.asarray(math.sqrt(self.features), self.dtype)

    def losses(self, hidden: jax.Array, targets: jax.Array, *, chunk: int = 0) -> TokenLosses:
        """Losses of `targets` (B, T) given `hidden` (B, T, D).

        Args:
          chunk: computes logits for so many positions at a time, again in the backward pass, so that no array of
            B × T × V is kept; 0 for all at once.
        """
        function = functools.partial(_losses, kernels=self._output_kernels(), logit_cap=self.logit_cap)
        batch, length = targets.shape
        if not chunk or length <= chunk:
            return function(hidden, targets)
        if length % chunk:
            raise ValueError(f"logit_chunk = {chunk}: does not divide the {length} positions")

        def split(x):
            return jnp.moveaxis(x.reshape(batch, length // chunk, chunk, *x.shape[2:]), 1, 0)

        found = jax.lax.map(jax.checkpoint(lambda part: function(*part)), (split(hidden), split(targets)))
        return TokenLosses(*(jnp.moveaxis(x, 0, 1).reshape(batch, length) for x in found))

    def log_probabilities(self, hidden: jax.Array) -> jax.Array:
        """ln p of every token, (…, D) to (…, V), float32."""
        head, *tails = self._logits(hidden)
        head = jax.nn.log_softmax(head)
        if not tails:
            return head
        frequent = head.shape[-1] - len(tails)
        bands = [head[..., frequent + i, None] + jax.nn.log_softmax(tail) for i, tail in enumerate(tails)]
        return jnp.concatenate([head[..., :frequent], *bands], axis=-1)

    def _logits(self, hidden):
        return _logits(hidden, self._output_kernels(), self.logit_cap)

    def _output_kernels(self):
        """What the logits are made of: tables (V_i, d_i), projections (d_i, D), classes (D, bands − 1) or None."""
        if self.head is not None:
            return [self.head.kernel.T.astype(self.dtype)], [], None
        cast = functools.partial(jax.tree.map, lambda x: x.astype(self.dtype))
        tables = [table.embedding for table in self.tables]
        classes = None if self.classes is None else self.classes.kernel
        return cast(tables), cast([each.kernel for each in self.projections]), cast(classes)


def _logits(hidden, kernels, logit_cap):
    """Logits of the frequent words with the classes behind them, then of each rare band; float32."""
    tables, projections, classes = kernels
    found = []
    for i, table in enumerate(tables):
        narrow = hidden @ projections[i].T if projections else hidden
        logits = jnp.einsum("...d,vd->...v", narrow, table, preferred_element_type=jnp.float32)
        if i == 0 and classes is not None:
            behind = jnp.einsum("...d,dc->...c", hidden, classes, preferred_element_type=jnp.float32)
            logits = jnp.concatenate([logits, behind], axis=-1)
        found.append(soft_capped(logits, logit_cap))
    return found


def _losses(hidden, targets, *, kernels, logit_cap) -> TokenLosses:
    head, *tails = _logits(hidden, kernels, logit_cap)
    normaliser = jax.nn.logsumexp(head, axis=-1)
    frequent = head.shape[-1] - len(tails)
    nll = normaliser - _taken(head, jnp.minimum(targets, frequent - 1))
    low = frequent
    for i, tail in enumerate(tails):
        index = targets - low
        inside = (index >= 0) & (index < tail.shape[-1])
        rare = normaliser - head[..., frequent + i] + jax.nn.logsumexp(tail, axis=-1)
        rare = rare - _taken(tail, jnp.where(inside, index, 0))
        nll = jnp.where(inside, rare, nll)
        low += tail.shape[-1]
    uniform = jnp.zeros_like(nll) if tails else normaliser - jnp.mean(head, axis=-1)
    return TokenLosses(nll, uniform, normaliser)


def _taken(logits, index):
    return jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
