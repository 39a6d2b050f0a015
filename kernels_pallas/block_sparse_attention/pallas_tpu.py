"""Block-sparse attention on a TPU: the tiles that a selection lists."""

from jaxtyping import Array, Float

from kernels_pallas import output
from kernels_pallas import selection
from kernels_pallas.attention import differentiable
from kernels_pallas.attention.tpu import attention
from kernels_pallas.attention.tpu import plan
from kernels_pallas.hardware import tpu_layout

Config = plan.Config


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: selection.Selection,
    sink_logits: Float[Array, "N"] | None,
    row_weights: Float[Array, "B N T"] | None,
    spec: differentiable.AttentionSpec,
) -> output.AttentionOutput:
  """Computes the op, see `differentiable.Attention`."""
  return attention.forward(
      query,
      key,
      value,
      where,
      sink_logits,
      row_weights,
      spec,
      _tiles(query, key, where, spec),
  )


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: selection.Selection,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    spec: differentiable.AttentionSpec,
) -> tuple[Array, Array, Array]:
  """Computes the cotangents of query, key and value."""
  tiles = _tiles(query, key, where, spec)
  return attention.backward(
      query, key, value, where, lse, delta, d_out, spec, tiles
  )


def _tiles(query, key, where, spec) -> tpu_layout.Tiles:
  sizes = tpu_layout.sizes_of(query, key)
  return plan.selection_tiles(spec.config or Config(), sizes, where)
