"""Attention by XLA, without a T x S array; what CPUs run.

Whole rows of the softmax, for some queries and one key head at a time; tiles of
keys that no list names are not read, see `loops`.
"""

from kernels_pallas import output
from kernels_pallas.attention import differentiable
from kernels_pallas.attention.xla import loops
from kernels_pallas.attention.xla import plan

Config = plan.AttentionXlaConfig


def forward(
    inputs: differentiable.Inputs, spec: differentiable.AttentionSpec
) -> output.AttentionOutput:
  """Computes the op, see `differentiable.Attention`."""
  lists, layout = plan.lists_of(inputs, spec)
  return loops.forward(inputs, spec, lists, layout)


def backward(
    saved: differentiable.Saved, spec: differentiable.AttentionSpec
) -> differentiable.Cotangents:
  """Computes the cotangents of query, key and value."""
  lists, layout = plan.lists_of(saved, spec)
  return loops.backward(saved, spec, lists, layout)
