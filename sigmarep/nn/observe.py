"""Attention statistics of any function, whoever wrote its model.

    observed = jax.jit(observe(model.apply))
    y, statistics = observed(variables, x)          # statistics["encoder/attention"]["entropy"]: (heads,), in nats

Every attention by `flax.linen.MultiHeadDotProductAttention`, `flax.nnx.MultiHeadAttention` (whatever their
`attention_fn`), `sigmarep.nn.MultiHeadAttention` and `jax.nn.dot_product_attention` is seen, also within `jit`, `scan`,
`vmap`, `remat` and derivatives; not within `cond`, `while_loop` and `shard_map`. The output is that of the function.

A call of attention marks its output in the traced program with a primitive of its own, whose further operands are the
statistics. `observe` evaluates the program and takes them out; in a scan they become outputs of every iteration.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sigmarep.core import entropy
from sigmarep.nn import attention_statistics
from sigmarep.nn.attention import MultiHeadAttention
from sigmarep.nn.marks import Statistics as Statistics
from sigmarep.nn.marks import evaluate, mark

Projections = attention_statistics.QueryKeyKernels
# What queries are projected from, and what keys are.
Inputs = tuple[jax.Array, jax.Array]

# Traces of jitted functions that hold marks are kept apart from all others.
_observing = jax.make_user_context(default_value=False)


def observe(function: Callable[..., Any]) -> Callable[..., tuple[Any, Statistics]]:
    """The function with the statistics of its attention: takes its arguments, returns (output, statistics).

    Layers are named by the paths of their modules, of Linen or of an NNX module among the arguments, else `attention_0`,
    `attention_1`, … in the order of the trace. A layer that is called again gets a number. The statistics are `entropy`,
    `entropy_normalised`, `max_logit`, `logit_variance` and, without a bias on the logits, `bound`; and `qk_norm` where the
    projections are known. They carry no gradient. `bound` is that of Theorem 3.1 for the layer's inputs where queries and
    keys are linear in them, else for the queries and keys themselves. The axis of a scan comes first, then that of a vmap.
    """

    @functools.wraps(function)
    def observed(*args: Any, **kwargs: Any) -> tuple[Any, Statistics]:
        leaves, structure = jax.tree.flatten((args, kwargs))
        traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray | np.generic)]

        def flat(*arrays: jax.Array) -> Any:
            given = list(leaves)
            for i, array in zip(traced, arrays, strict=True):
                given[i] = array
            args, kwargs = jax.tree.unflatten(structure, given)
            with _Recorder(args, kwargs).intercepting():
                return function(*args, **kwargs)

        with _observing(True):
            program, shape = jax.make_jaxpr(flat, return_shape=True)(*(leaves[i] for i in traced))
        statistics: Statistics = {}
        outputs = evaluate(program.jaxpr, program.consts, [leaves[i] for i in traced], statistics)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs), statistics

    return observed


class _Recorder:
    """Marks the attention of one trace."""

    def __init__(self, args: Any, kwargs: Any):
        self._names = _names_of_nnx((args, kwargs))
        self._unnamed = 0
        # Attention within attention that is marked already is not marked again.
        self._inside = False

    @contextlib.contextmanager
    def intercepting(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(nn.intercept_methods(self._linen))
            stack.enter_context(self._replaced(jax.nn.dot_product_attention, self._of_jax))
            nnx = sys.modules.get("flax.nnx")
            if nnx is not None:
                original = nnx.MultiHeadAttention.__call__
                stack.callback(setattr, nnx.MultiHeadAttention, "__call__", original)
                nnx.MultiHeadAttention.__call__ = self._nnx(original)
            yield

    @contextlib.contextmanager
    def _replaced(
        self, original: Callable[..., Any], make: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> Iterator[None]:
        """The function is replaced wherever a module holds it, under whatever name."""
        holders = [
            (module, name)
            for module in list(sys.modules.values())
            for name, value in list(getattr(module, "__dict__", {}).items())
            if value is original and not module.__name__.startswith("jax._src")
        ]
        replacement = make(original)
        for module, name in holders:
            setattr(module, name, replacement)
        try:
            yield
        finally:
            for module, name in holders:
                setattr(module, name, original)

    def _linen(self, method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if isinstance(module, MultiHeadAttention) and context.method_name == "_attend":
            return self._ours(method, args, kwargs, module)
        if not isinstance(module, nn.MultiHeadDotProductAttention) or context.method_name != "__call__":
            return method(*args, **kwargs)
        inputs, context_inputs = _inputs(method, args, kwargs, "inputs_kv" if "inputs_kv" in kwargs else "inputs_k")
        original = module.attention_fn

        def projections() -> Projections:
            return attention_statistics.query_key_kernels(
                module.variables, stored_sigma=False, use_bias=module.use_bias
            )

        name, linear = "/".join(module.path), None if module.normalize_qk else (inputs, context_inputs)
        object.__setattr__(module, "attention_fn", self._of_flax(original, name, projections, linear))
        try:
            return method(*args, **kwargs)
        finally:
            object.__setattr__(module, "attention_fn", original)

    def _nnx(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            inputs, context_inputs = _inputs(functools.partial(original, module), args, kwargs, "inputs_k")
            attention_fn = module.attention_fn
            name, linear = self._names.get(id(module)), None if module.normalize_qk else (inputs, context_inputs)
            wrapped = self._of_flax(attention_fn, name, lambda: _projections_of_nnx(module), linear)
            # Set past NNX, which would refuse a change of a module that was made outside of the trace.
            vars(module)["attention_fn"] = wrapped
            try:
                return original(module, *args, **kwargs)
            finally:
                vars(module)["attention_fn"] = attention_fn

        return call

    def _ours(
        self, method: Callable[..., Any], args: Any, kwargs: Any, module: MultiHeadAttention
    ) -> tuple[jax.Array, Any]:
        query, key, _, visibility, *_ = args
        attended, statistics = method(*args, **kwargs)
        real = visibility.real_tokens(self_attention=query.shape[1] == key.shape[1])
        projections = attention_statistics.query_key_kernels(
            module.variables, stored_sigma=module.is_mutable_collection("spectral"), use_bias=module.use_bias
        )
        recorded = _summary(statistics(), query, key, real.queries, None, projections, None)
        return self._marked("/".join(module.path), attended, recorded), statistics

    def _of_flax(
        self,
        attention_fn: Callable[..., Any],
        name: str | None,
        projections: Callable[[], Projections],
        linear: Inputs | None,
    ) -> Callable[..., Any]:
        @functools.wraps(attention_fn)
        def attend(query: jax.Array, key: jax.Array, value: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            inside, self._inside = self._inside, True
            try:
                attended = attention_fn(query, key, value, *args, **kwargs)
            finally:
                self._inside = inside
            bias, mask = _argument("bias", 0, args, kwargs), _argument("mask", 1, args, kwargs)
            is_causal = kwargs.get("is_causal", False)
            return self._record(name, attended, query, key, bias, mask, None, is_causal, None, projections(), linear)

        return attend

    def _of_jax(self, original: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(original)

        @functools.wraps(original)
        def attend(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._inside:
                return result
            given = parameters.bind(*args, **kwargs)
            given.apply_defaults()
            arguments = given.arguments
            query, key = arguments["query"], arguments["key"]
            mask, query_mask = _mask_of_jax(arguments, query.shape[-3], key.shape[-3])
            attended = result[0] if isinstance(result, tuple) else result
            marked = self._record(
                None, attended, query, key, arguments["bias"], mask, arguments["scale"], False, query_mask, None, None
            )
            return (marked, *result[1:]) if isinstance(result, tuple) else marked

        return attend

    def _record(
        self,
        name: str | None,
        attended: jax.Array,
        query: jax.Array,
        key: jax.Array,
        bias: jax.Array | None,
        mask: jax.Array | None,
        scale: float | None,
        is_causal: bool,
        query_mask: jax.Array | None,
        projections: Projections | None,
        linear: Inputs | None,
    ) -> jax.Array:
        query, key = (jax.lax.stop_gradient(x.reshape(-1, *x.shape[-3:])) for x in (query, key))
        # Groups of query heads share a key head.
        key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
        queries, keys = query.shape[1], key.shape[1]
        if is_causal:
            mask = _both(mask, jnp.tril(jnp.ones((queries, keys), bool)))
        mask = None if mask is None else _four(mask != 0, query.shape[0])
        if bias is None:
            statistics = entropy.attention_statistics(query, key, mask=mask, scale=scale)
        else:
            factor = query.shape[-1] ** -0.5 if scale is None else scale
            products = jnp.einsum(
                "btnh,bsnh->bnts", query, key, precision="highest", preferred_element_type=jnp.float32
            )
            bias = _four(jax.lax.stop_gradient(bias), query.shape[0])
            logits = products * factor + bias
            # A bias that hides keys counts as a mask.
            mask = _both(mask, bias > 0.5 * jnp.finfo(bias.dtype).min)
            statistics = entropy.statistics_of_logits(logits.astype(jnp.float32), mask)
        scaled = query if scale is None else query * (scale * query.shape[-1] ** 0.5)
        recorded = _summary(statistics, scaled, key, query_mask, bias, projections, linear)
        return self._marked(name, attended, recorded)

    def _marked(self, name: str | None, attended: jax.Array, recorded: dict[str, jax.Array]) -> jax.Array:
        if name is None:
            name = f"attention_{self._unnamed}"
            self._unnamed += 1
        marked: jax.Array = mark.bind(attended, *recorded.values(), name=name or "attention", fields=tuple(recorded))
        return marked


def _summary(
    statistics: entropy.AttentionStatistics,
    query: jax.Array,
    key: jax.Array,
    query_mask: jax.Array | None,
    bias: jax.Array | None,
    projections: Projections | None,
    linear: Inputs | None,
) -> dict[str, jax.Array]:
    """Statistics of a call, each (N,).

    Args:
      linear: the inputs that queries and keys are linear in, None if they are not.
    """
    counted = attention_statistics.CountedQueries.of(statistics, query_mask)
    recorded = attention_statistics.summary(statistics, counted)
    biased = None
    if projections is not None:
        plain, biased = projections.norms()
        recorded["qk_norm"] = jnp.repeat(plain, query.shape[2] // plain.size)
    if bias is None:
        if linear is not None and biased is not None:
            pair = [x.reshape(-1, *x.shape[-2:]) for x in linear]
            inputs = attention_statistics.norms_of_inputs(
                pair[0], pair[0] if linear[0] is linear[1] else pair[1], None, None
            )
            sigma = inputs[:, None] * biased
        else:
            sigma = attention_statistics.norms_of_heads(query, key, None, None)
        recorded["bound"] = attention_statistics.bound(sigma * query.shape[-1] ** -0.5, statistics, counted)
    return jax.lax.stop_gradient(recorded)


def _both(mask: jax.Array | None, other: jax.Array) -> jax.Array:
    return other if mask is None else mask & other


def _four(x: jax.Array, batch: int) -> jax.Array:
    """A mask or bias of any leading axes as one that broadcasts to (B, N, T, S)."""
    if x.ndim <= 4:
        return x.reshape((1,) * (4 - x.ndim) + x.shape)
    return x.reshape(-1, *x.shape[-3:]) if x.size // int(np.prod(x.shape[-3:])) in (1, batch) else x


def _inputs(method: Callable[..., Any], args: Any, kwargs: Any, key_name: str) -> Inputs:
    """The inputs of the projections of queries and keys."""
    names = [name for name in inspect.signature(method).parameters if name.startswith("inputs_")]
    given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    queries = given["inputs_q"]
    keys = given.get(key_name)
    return queries, queries if keys is None else keys


def _argument(name: str, position: int, args: Any, kwargs: Any) -> Any:
    """An argument of Flax's `attention_fn` after query, key and value."""
    return args[position] if len(args) > position else kwargs.get(name)


def _mask_of_jax(arguments: Mapping[str, Any], queries: int, keys: int) -> tuple[Any, Any]:
    """All masks of `jax.nn.dot_product_attention` as one, and the mask of the real queries."""
    mask = arguments["mask"]
    if arguments["is_causal"]:
        mask = _both(mask, jnp.tril(jnp.ones((queries, keys), bool)))
    if (lengths := arguments["key_value_seq_lengths"]) is not None:
        mask = _both(mask, (jnp.arange(keys) < lengths[:, None])[:, None, None])
    if (window := arguments["local_window_size"]) is not None:
        before, after = (window, window) if isinstance(window, int) else window
        offset = jnp.arange(keys) - jnp.arange(queries)[:, None]
        mask = _both(mask, (offset >= -before) & (offset <= after))
    lengths = arguments["query_seq_lengths"]
    return mask, None if lengths is None else jnp.arange(queries) < lengths[:, None]


def _names_of_nnx(tree: Any) -> dict[int, str]:
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return {}
    modules = [
        x for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Module)) if isinstance(x, nnx.Module)
    ]
    return {id(inner): "/".join(map(str, path)) for module in modules for path, inner in nnx.iter_modules(module)}


def _projections_of_nnx(module: Any) -> Projections:
    def of(layer: Any) -> dict[str, jax.Array]:
        kernel = layer.effective_kernel() if hasattr(layer, "effective_kernel") else layer.kernel[...]
        return {"kernel": kernel} | ({} if layer.bias is None else {"bias": layer.bias[...]})

    pair = {"query": of(module.query), "key": of(module.key)}
    groups = module.num_heads // module.num_kv_heads if hasattr(module, "num_kv_heads") else 1
    pair["key"] = {name: jnp.repeat(x, groups, axis=x.ndim - 2) for name, x in pair["key"].items()}
    return attention_statistics.query_key_kernels(
        {"params": pair}, stored_sigma=False, use_bias="bias" in pair["query"]
    )
