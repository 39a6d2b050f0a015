"""Dense attention on a TPU: the tiles that a mask touches."""

from typing import Any

from jaxtyping import Array, Float

from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas.attention import differentiable
from kernels_pallas.attention.tpu import attention
from kernels_pallas.attention.tpu import plan
from kernels_pallas.hardware import tpu_layout

Config = plan.Config


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: masks.Mask | None,
    sink_logits: Float[Array, "N"] | None,
    row_weights: Float[Array, "B N T"] | None,
    spec: differentiable.AttentionSpec,
) -> output.AttentionOutput:
  """Computes the op, see `differentiable.Attention`."""
  tiles = _tiles(query, key, where, spec, spec.return_col_mass)
  return attention.forward(
      query, key, value, where, sink_logits, row_weights, spec, tiles
  )


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: masks.Mask | None,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    spec: differentiable.AttentionSpec,
) -> tuple[Array, Array, Array]:
  """Computes the cotangents of query, key and value."""
  tiles = plan.backward_tiles(
      _tiles(query, key, where, spec, False), tpu_layout.sizes_of(query, key)
  )
  return attention.backward(
      query, key, value, where, lse, delta, d_out, spec, tiles
  )


def _tiles(
    query: Any, key: Any, where: Any, spec: Any, emits_col_mass: bool
) -> tpu_layout.Tiles:
  config = spec.config or Config()
  sizes = tpu_layout.sizes_of(query, key)
  return plan.flash_tiles(config, sizes, where, emits_col_mass)
