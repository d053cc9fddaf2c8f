"""Marks of statistics in a traced program, and the evaluation that collects them.

A mark is a primitive that passes its first argument on and holds statistics of it. It goes through jit, vmap, derivatives,
remat and scans; `evaluate` runs a program that has marks inside, and returns what they hold beside its outputs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

# Name of an attention layer to its statistics, each (*stacked, heads); see `sigmarep.nn.MultiHeadAttention`.
Statistics = dict[str, dict[str, jax.Array]]

mark = core.Primitive("sigmarep_mark")
mark.def_impl(lambda x, *_, **__: x)
mark.def_abstract_eval(lambda x, *_, **__: x)
mlir.register_lowering(mark, lambda _, x, *__, **___: [x])
ad.primitive_jvps[mark] = lambda primals, tangents, **params: (mark.bind(*primals, **params), tangents[0])


def _batched(args: tuple[Any, ...], axes: tuple[int | None, ...], **params: Any) -> tuple[Any, int | None]:
    """Statistics get the new axis in front. An axis is None for what is not batched."""
    x, *statistics = args
    (size,) = {arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None}
    if any(axis is not None for axis in axes[1:]):
        statistics = [
            jnp.broadcast_to(each, (size, *each.shape)) if axis is None else jnp.moveaxis(each, axis, 0)
            for each, axis in zip(statistics, axes[1:], strict=True)
        ]
    return mark.bind(x, *statistics, **params), axes[0]


batching.primitive_batchers[mark] = _batched


def evaluate(jaxpr: Any, consts: Any, args: Any, statistics: Statistics) -> list[Any]:
    """Evaluates a program and moves what is marked in it to `statistics`."""
    values: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for equation in jaxpr.eqns:
        if _is_marked(equation):
            outputs = _evaluate_marked(equation, [read(atom) for atom in equation.invars], statistics)
            values.update(zip(equation.outvars, outputs, strict=True))
        else:
            operands = list(dict.fromkeys(atom for atom in equation.invars if not isinstance(atom, core.Literal)))
            outputs = _alone(jaxpr, equation, operands)(*map(read, operands))
            values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _alone(jaxpr: Any, equation: Any, operands: list[Any]) -> Callable[..., list[Any]]:
    """A program of one equation: how a primitive is applied differs between versions of JAX."""
    single = jaxpr.replace(
        constvars=[], invars=operands, outvars=list(equation.outvars), eqns=[equation], effects=equation.effects
    )
    function: Callable[..., list[Any]] = core.jaxpr_as_fun(core.ClosedJaxpr(single, ()))
    return function


def _evaluate_marked(equation: Any, inputs: list[Any], statistics: Statistics) -> list[Any]:
    primitive, params = equation.primitive, equation.params
    if primitive is mark:
        _add(statistics, params["name"], dict(zip(params["fields"], inputs[1:], strict=True)))
        return inputs[:1]
    if primitive.name == "scan":
        return _scan(params, inputs, statistics)
    (program,) = _programs(equation)
    return evaluate(_open(program), getattr(program, "consts", ()), inputs, statistics)


def _scan(params: Mapping[str, Any], inputs: list[Any], statistics: Statistics) -> list[Any]:
    program = params["jaxpr"]
    if "num_consts" in params:
        constants, carried = params["num_consts"], params["num_carry"]
    else:
        # JAX 0.12 describes constants, carry and sequences by a tree.
        constants, carried, _ = map(len, params["ft_in"].unpack())
    fixed, start, sequences = inputs[:constants], inputs[constants : constants + carried], inputs[constants + carried :]

    def body(carry: list[Any], parts: list[Any]) -> tuple[list[Any], tuple[list[Any], Statistics]]:
        inside: Statistics = {}
        outputs = evaluate(_open(program), program.consts, [*fixed, *carry, *parts], inside)
        return outputs[:carried], (outputs[carried:], inside)

    carry, (outputs, inside) = jax.lax.scan(
        body, start, sequences, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    for name, recorded in inside.items():
        _add(statistics, name, recorded)
    return [*carry, *outputs]


def _add(statistics: Statistics, name: str, recorded: dict[str, jax.Array]) -> None:
    number, distinct = 2, name
    while distinct in statistics:
        distinct, number = f"{name}_{number}", number + 1
    statistics[distinct] = recorded


def _open(program: Any) -> Any:
    """The program of a closed one."""
    return getattr(program, "jaxpr", program)


def _programs(equation: Any) -> list[Any]:
    """The programs that stand for the equation, on the same inputs; none for control flow other than a scan."""
    if equation.primitive.name in ("while", "cond", "shard_map"):
        return []
    inner = [each for each in equation.params.values() if hasattr(_open(each), "eqns")]
    return inner if len(inner) == 1 and len(_open(inner[0]).invars) == len(equation.invars) else []


def _is_marked(equation: Any) -> bool:
    if equation.primitive is mark:
        return True
    return any(_is_marked(each) for program in _programs(equation) for each in _open(program).eqns)
