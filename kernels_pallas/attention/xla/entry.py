"""Attention by XLA, without a T x S array; what CPUs run.

Whole rows of the softmax, for some queries and one key head at a time; tiles of
keys that no list names are not read, see `loops`.
"""

from collections.abc import Callable
from typing import TypeVar

from jaxtyping import Array, Float

from kernels_pallas import output
from kernels_pallas.attention import differentiable
from kernels_pallas.attention.xla import loops
from kernels_pallas.attention.xla import plan
from kernels_pallas.transformations import exported

Config = plan.AttentionXlaConfig
_ResultT = TypeVar("_ResultT")


def forward(
    inputs: differentiable.Inputs, spec: differentiable.AttentionSpec
) -> output.AttentionOutput:
  """Computes the op, see `differentiable.Attention`."""
  return _run(loops.forward, inputs, spec)


def backward(
    saved: differentiable.Saved, spec: differentiable.AttentionSpec
) -> differentiable.Cotangents:
  """Computes the cotangents of query, key and value."""
  return _run(loops.backward, saved, spec)


def col_mass(
    inputs: differentiable.Inputs,
    lse: Float[Array, "B N T"],
    spec: differentiable.AttentionSpec,
) -> Float[Array, "B N S"]:
  """Sums what each key gets, from an lse that more keys may have part in."""
  lists, layout = plan.lists_of(inputs, spec)
  return loops.col_mass(inputs, lse, spec, lists, layout)


def _run(
    loop: Callable[..., _ResultT],
    arrays: differentiable.Inputs | differentiable.Saved,
    spec: differentiable.AttentionSpec,
) -> _ResultT:
  """Loops over all sequences at once, where their number is known."""
  if not exported.is_known(arrays.query.shape[0]):
    # Loops over strips run through heads and sequences alike.
    return exported.by_sequence(lambda one: _run(loop, one, spec), arrays)
  return loop(arrays, spec, *plan.lists_of(arrays, spec))
