"""Bytes that compiled programs need, without running them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from kernels_pallas.attention import shapes

_MIB = 2**20


def temp_bytes(call: Callable[..., Any], shape: shapes.Shape) -> int:
  """Of intermediate arrays of `call(query, key, value)`, float32."""
  return _analyze(call, shape).temp_size_in_bytes


def total_bytes(call: Callable[..., Any], shape: shapes.Shape) -> int:
  """Of arguments, results and intermediate arrays."""
  found = _analyze(call, shape)
  return (
      found.temp_size_in_bytes
      + found.argument_size_in_bytes
      + found.output_size_in_bytes
  )


def assert_linear(sizes: Sequence[int]) -> None:
  """Of lengths that double, bytes at most double, but for a few of them."""
  for one, two in zip(sizes[:-1], sizes[1:], strict=True):
    assert 0 < two <= 2 * one + _MIB, [size / _MIB for size in sizes]


def _analyze(call: Any, shape: shapes.Shape) -> Any:
  arrays = shape.arrays("float32")
  return jax.jit(call).lower(*arrays).compile().memory_analysis()
