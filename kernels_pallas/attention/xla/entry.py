"""Attention by XLA, without a T x S array; what CPUs run.

Whole rows of the softmax, for some queries and one key head at a time; tiles of
keys that no list names are not read, see `loops`.
"""

from kernels_pallas import output
from kernels_pallas.attention import differentiable
from kernels_pallas.attention.xla import loops
from kernels_pallas.attention.xla import plan
from kernels_pallas.transformations import exported

Config = plan.AttentionXlaConfig


def forward(
    inputs: differentiable.Inputs, spec: differentiable.AttentionSpec
) -> output.AttentionOutput:
  """Computes the op, see `differentiable.Attention`."""
  if not exported.is_known(inputs.query.shape[0]):
    # Loops over strips run through heads and sequences alike.
    return exported.by_sequence(lambda one: forward(one, spec), inputs)
  lists, layout = plan.lists_of(inputs, spec)
  return loops.forward(inputs, spec, lists, layout)


def backward(
    saved: differentiable.Saved, spec: differentiable.AttentionSpec
) -> differentiable.Cotangents:
  """Computes the cotangents of query, key and value."""
  if not exported.is_known(saved.query.shape[0]):
    return exported.by_sequence(lambda one: backward(one, spec), saved)
  lists, layout = plan.lists_of(saved, spec)
  return loops.backward(saved, spec, lists, layout)
