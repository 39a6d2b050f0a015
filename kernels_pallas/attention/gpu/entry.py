"""Flash attention on Hopper GPUs.

Out and lse come from our kernel or from cuDNN, the column sums from ours in
both cases, and the gradients from ours. No figure of speed is known yet: our
kernels are compiled for the H100 and checked by interpretation.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas.attention import differentiable
from kernels_pallas.attention.gpu import attention

why_not = attention.why_not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How an attention is computed.

  Attributes:
    forward_by: "mosaic" is our kernel; "cudnn" is NVIDIA's, which has no sinks,
      no soft cap, and of masks causal and causal windows over T = S.
    tiles: Of our kernels.
  """

  forward_by: Literal["mosaic", "cudnn"] = "mosaic"
  tiles: attention.Config = attention.Config()


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: masks.Mask | None,
    sink_logits: Float[Array, "N"] | None,
    row_weights: Float[Array, "B N T"] | None,
    spec: differentiable.AttentionSpec,
) -> output.AttentionOutput:
  """Computes the op.

  Raises:
    ValueError: If the kernels do not have the type or head size, or cuDNN was
      asked for and cannot compute this.
  """
  config = spec.config or Config()
  if config.forward_by == "cudnn":
    options = cudnn_options(query, key, where, sink_logits, spec)
    if isinstance(options, str):
      raise ValueError(f"forward_by='cudnn': {options}")
    out, lse = _cudnn(query, key, value, scale=spec.scale, **options)
  else:
    out, lse = attention.forward(
        query, key, value, where, sink_logits, spec, config.tiles
    )
  col_mass = None
  if spec.return_col_mass:
    col_mass = attention.col_mass(
        query, key, lse, where, row_weights, spec, config.tiles
    )
  return output.AttentionOutput(out, lse, col_mass)


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: masks.Mask | None,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    spec: differentiable.AttentionSpec,
) -> tuple[
    Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]
]:
  """Computes the cotangents of query, key and value."""
  config = spec.config or Config()
  return attention.backward(
      query, key, value, where, lse, delta, d_out, spec, config.tiles
  )


def cudnn_options(
    query: Any,
    key: Any,
    where: masks.Mask | None,
    sink_logits: Any,
    spec: differentiable.AttentionSpec,
) -> dict[str, Any] | str:
  """What cuDNN needs to be told for this attention, or why it cannot do it."""
  if sink_logits is not None or spec.logits_soft_cap is not None:
    return "cuDNN has no sink logits and no soft cap"
  if query.dtype not in (jnp.bfloat16, jnp.float16) or query.shape[-1] % 8:
    return "cuDNN needs bfloat16 or float16, and head_dim a multiple of 8"
  if where is None:
    return {"is_causal": False, "window": None}
  num_queries, num_keys = query.shape[1], key.shape[1]
  if masks.numpy_of_mask(where) is not np or where.query_ids is not None:
    return "the mask must be known while tracing, and have no ids"
  if where.starts.ndim != 2 or where.starts.shape[0] != 1:
    return "the mask must have one span, and no batch"
  own = np.arange(num_queries)
  starts, stops = where.starts[0], where.stops[0]
  if (starts == 0).all() and (stops == num_keys).all():
    return {"is_causal": False, "window": None}
  if num_queries != num_keys or (stops != own + 1).any():
    return "the mask must be full, causal, or a causal window, with T = S"
  window = int((stops - starts).max())
  if (starts != np.maximum(own + 1 - window, 0)).any():
    return "the mask must be full, causal, or a causal window"
  return {"is_causal": True, "window": None if window == num_keys else window}


def _cudnn(
    query: Any,
    key: Any,
    value: Any,
    *,
    scale: float,
    is_causal: bool,
    window: int | None,
) -> tuple[Any, Any]:
  """Out and lse by cuDNN.

  Not by jax.nn.dot_product_attention, which rounds lse to the query's type: 8
  bits of it would make every weight in the column sums wrong by per cents.
  """
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  kind = cudnn.MaskType.CAUSAL if is_causal else cudnn.MaskType.NO_MASK
  result: Any = cudnn.dot_product_attention(
      query,
      key,
      value,
      scale=scale,
      mask_type=kind,
      sliding_window_length=window,
      return_residual=True,
  )
  return result
