"""Sums over the head size of products of two arrays, on a TPU.

rowsum(d_out * out), which the backward pass reads, a number a query. XLA sums
along the lanes one register at a time, and on some chips it writes the products
first, in float32. Here a block is turned in VMEM, so that it is the sublanes
that are summed.
"""

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import interpret
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import exported
from kernels_pallas.transformations import manual_axes

# Queries of a step. Fewer are XLA's: there is nothing to gain.
_BLOCK = 1024


def row_products(
    x: Float[Array, "B T N H"], y: Float[Array, "B T N H"]
) -> Float[Array, "B N T"]:
  """Float32 sums over H of x * y."""
  length = x.shape[1]
  if length < _BLOCK:
    wide = x.astype(jnp.float32) * y.astype(jnp.float32)
    return wide.sum(axis=-1).swapaxes(1, 2)
  x, y = (tpu_layout.pad(tpu_layout.to_heads(z), 2, _BLOCK) for z in (x, y))
  batch, num_heads, padded, head_dim = x.shape
  rows = pl.BlockSpec((1, 1, _BLOCK, head_dim), lambda b, n, r: (b, n, r, 0))
  sums = pl.BlockSpec((1, 1, 1, _BLOCK), lambda b, n, r: (b, n, 0, r))
  itemsize = x.dtype.itemsize + y.dtype.itemsize
  found = pl.pallas_call(
      _kernel,
      grid=(batch, num_heads, padded // _BLOCK),
      in_specs=[rows, rows],
      out_specs=sums,
      out_shape=manual_axes.struct((batch, num_heads, 1, padded), jnp.float32),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel",) * 3
      ),
      cost_estimate=exported.estimate(
          flops=2 * batch * num_heads * padded * head_dim,
          bytes_accessed=batch * num_heads * padded * (head_dim * itemsize + 4),
          transcendentals=0,
      ),
      interpret=interpret.mode(),
      name="attention_row_products",
  )(x, y)
  return found[:, :, 0, :length]


def _kernel(x: hw_types.Ref, y: hw_types.Ref, sums: hw_types.Ref) -> None:
  products = x[0, 0].astype(jnp.float32) * y[0, 0].astype(jnp.float32)
  sums[0, 0] = products.T.sum(axis=0, keepdims=True)
