"""Frozen prefix: what no draw changes is computed once for every example, and kept.

Where only some parameters are drawn, all that a loss computes from examples and the other parameters is the same at
every draw. `freeze` finds that part in the traced loss, whatever the model: an equation that no drawn parameter reaches
belongs to the prefix. What the rest needs of it, usually the activations before the first drawn layer, are the examples
of the loss that is left. Elementwise work on the examples themselves, such as the normalization of uint8 images, stays
in the rest, since keeping its result would cost more memory than it saves time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from madjax.types import Batch, LossFn, Params, num_examples

# what a program is called under, with the name of its body
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
_PRODUCTS = ("dot_general", "conv_general_dilated")
# activations that would take more are computed again at every draw
_MOST_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class FrozenLoss:
    """A loss of activations: `(params, (float32 [n, ...], ...)) -> float32 [n]`.

    Attributes:
      loss_fn: of the examples themselves.
      drawn: which leaves of the parameters draws may change, in flattening order.
      params, examples: pytrees of shapes and dtypes in flattening order, and their structures; of one example.
    """

    loss_fn: LossFn
    drawn: tuple[bool, ...]
    params: tuple[tuple[Any, ...], Any]
    examples: tuple[tuple[Any, ...], Any]

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        (losses,) = _plan(self, num_examples(batch)).rest(*jax.tree.leaves(params), *jax.tree.leaves(batch))
        return losses

    def activations(self, params: Params, examples: Batch) -> Batch:
        """What the rest needs of examples. Pure and traceable."""
        return tuple(_plan(self, num_examples(examples)).prefix(*jax.tree.leaves(params), *jax.tree.leaves(examples)))


def freeze(
    loss_fn: LossFn,
    params: Callable[[], Params],
    drawn: Sequence[bool],
    examples: Batch,
    *,
    batch_size: int = 256,
    put: Callable[[Batch], Batch] = jax.device_put,
) -> tuple[LossFn, Batch]:
    """The loss of what draws change, and its examples on the host; those given where nothing would be saved.

    Args:
      params: returns any draw of the parameters; pure and traceable.
      drawn: for every leaf of `params`, in flattening order, whether draws change it.
      examples: all of them; `batch_size` at a time go through the prefix.
      put: brings a batch to the devices.
    """
    leaves, structure = jax.tree.flatten(jax.eval_shape(params))
    rows, example_structure = jax.tree.flatten(examples)
    frozen = FrozenLoss(
        loss_fn,
        tuple(drawn),
        (tuple((leaf.shape, leaf.dtype) for leaf in leaves), structure),
        (tuple((leaf.shape[1:], leaf.dtype) for leaf in rows), example_structure),
    )
    count = num_examples(examples)
    plan = _plan(frozen, batch_size)
    if not plan.saves or plan.num_bytes * count > _MOST_BYTES * batch_size:
        return loss_fn, examples
    fixed, parts = params(), []
    for start in range(0, count, batch_size):
        # the last batch repeats its last example, so that one program serves all
        chosen = np.minimum(np.arange(start, start + batch_size), count - 1)
        batch = put(jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], examples))
        part = _activations(frozen, fixed, batch)
        parts.append(jax.tree.map(lambda leaf, left=count - start: np.asarray(leaf)[:left], part))
    return frozen, jax.tree.map(lambda *some: np.concatenate(some), *parts)


@functools.partial(jax.jit, static_argnums=0)
def _activations(frozen: FrozenLoss, params: Params, examples: Batch) -> Batch:
    return frozen.activations(params, examples)


class _Plan(NamedTuple):
    """A traced loss in two parts, on flat arguments.

    Attributes:
      prefix: parameters and examples -> activations; rest: parameters and activations -> losses.
      saves: whether the prefix does anything; num_bytes: of the activations.
    """

    prefix: Callable[..., list[jax.Array]]
    rest: Callable[..., list[jax.Array]]
    saves: bool
    num_bytes: int


@functools.lru_cache(maxsize=64)
def _plan(frozen: FrozenLoss, count: int) -> _Plan:
    def shapes(told: tuple[tuple[Any, ...], Any], *leading: int) -> Any:
        leaves, structure = told
        return structure.unflatten([jax.ShapeDtypeStruct((*leading, *shape), dtype) for shape, dtype in leaves])

    closed = jax.make_jaxpr(frozen.loss_fn)(shapes(frozen.params), shapes(frozen.examples, count))
    arguments = list(closed.jaxpr.invars)
    params, examples = arguments[: len(frozen.drawn)], arguments[len(frozen.drawn) :]
    constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    equations, renamed = [], {}
    _inline(closed.jaxpr, renamed, equations, constants)
    output = _resolve(closed.jaxpr.outvars[0], renamed)

    drawn = {leaf for leaf, is_drawn in zip(params, frozen.drawn, strict=True) if is_drawn}
    of_examples, costly, made_by = set(examples), set(), {}
    for number, equation in enumerate(equations):
        outputs = equation.outvars
        read = {atom for atom in equation.invars if not isinstance(atom, core.Literal)}
        for reached in (drawn, of_examples):
            if read & reached:
                reached.update(outputs)
        is_product = equation.primitive.name in _PRODUCTS or any(map(_is_program, equation.params.values()))
        if read & costly or (is_product and read & of_examples):
            costly.update(outputs)
        made_by.update(dict.fromkeys(outputs, number))

    # backwards from the output: what the rest computes, and where it stops because something is kept
    rest, kept, waiting, seen = set(), set(), [output], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, core.Literal) or one in seen:
            continue
        seen.add(one)
        fixed = one in of_examples and one not in drawn
        if fixed and (one in examples or (one in costly and one.aval.shape[:1] == (count,))):
            kept.add(one)
        elif one in made_by:
            rest.add(made_by[one])
            waiting.extend(equations[made_by[one]].invars)
    wanted, prefix = list(kept), set()
    while wanted:
        one = wanted.pop()
        if not isinstance(one, core.Literal) and one in made_by and made_by[one] not in prefix:
            prefix.add(made_by[one])
            wanted.extend(equations[made_by[one]].invars)
    order = {var: number for number, var in enumerate([*examples, *made_by])}
    activations = sorted(kept, key=order.__getitem__)

    def function(arguments: list[Any], numbers: set[int], results: list[Any]) -> Callable[..., list[jax.Array]]:
        chosen = [equations[number] for number in sorted(numbers)]
        told = closed.jaxpr.debug_info._replace(
            arg_names=("",) * (len(constants) + len(arguments)), result_paths=("",) * len(results)
        )
        jaxpr = core.Jaxpr(list(constants), arguments, results, chosen, debug_info=told)
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, list(constants.values())))

    return _Plan(
        function([*params, *examples], prefix, activations),
        function([*params, *activations], rest, [output]),
        bool(prefix),
        sum(var.aval.size * var.aval.dtype.itemsize for var in activations),
    )


def _inline(jaxpr: Any, renamed: dict[Any, Any], equations: list[Any], constants: dict[Any, Any]) -> None:
    """Appends the equations in order, and in place of a call those of the program that is called."""
    for equation in jaxpr.eqns:
        inputs = [_resolve(atom, renamed) for atom in equation.invars]
        body = equation.params.get(_CALLS.get(equation.primitive.name, ""))
        if body is None:
            # the same program may be called twice, and its variables stand for other values then
            outputs = [_fresh(var) for var in equation.outvars]
            renamed.update(zip(equation.outvars, outputs, strict=True))
            equations.append(equation.replace(invars=inputs, outvars=outputs))
            continue
        inner = dict(zip(body.jaxpr.invars, inputs, strict=True))
        for var, value in zip(body.jaxpr.constvars, body.consts, strict=True):
            inner[var] = _fresh(var)
            constants[inner[var]] = value
        _inline(body.jaxpr, inner, equations, constants)
        results = [_resolve(var, inner) for var in body.jaxpr.outvars]
        renamed.update(zip(equation.outvars, results, strict=True))


def _fresh(var: Any) -> Any:
    return core.Var(var.aval)


def _resolve(atom: Any, renamed: dict[Any, Any]) -> Any:
    return atom if isinstance(atom, core.Literal) else renamed.get(atom, atom)


def _is_program(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)
