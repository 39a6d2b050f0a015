"""Attention by NVIDIA's cuDNN: what it can compute, and the call."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import differentiable


def options_of(
    inputs: differentiable.Inputs, spec: differentiable.AttentionSpec
) -> dict[str, Any] | str:
  """What cuDNN needs to be told for this attention, or why it cannot do it."""
  query, key, _, where, sink_logits, _ = inputs
  if sink_logits is not None or spec.logits_soft_cap is not None:
    return "cuDNN has no sink logits and no soft cap"
  if query.dtype not in (jnp.bfloat16, jnp.float16) or query.shape[-1] % 8:
    return "cuDNN needs bfloat16 or float16, and head_dim a multiple of 8"
  if where is None:
    return {"is_causal": False, "window": None}
  if isinstance(where, selection_lib.Selection):
    return "cuDNN has masks, no selections of blocks"
  num_queries, num_keys = query.shape[1], key.shape[1]
  if masks.numpy_of_mask(where) is not np or where.query_ids is not None:
    return "the mask must be known while tracing, and have no ids"
  if where.starts.ndim != 2 or where.starts.shape[0] != 1:
    return "the mask must have one span, and no batch"
  # cuDNN is told causal and a window's length, and nothing else: the spans must
  # be exactly those.
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


def attend(
    inputs: differentiable.Inputs, spec: differentiable.AttentionSpec
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
  """Computes out and lse.

  Not by jax.nn.dot_product_attention, which rounds lse to the query's type: 8
  bits of it would make every weight in the column sums wrong by per cents.

  Raises:
    ValueError: If cuDNN cannot compute this.
  """
  options = options_of(inputs, spec)
  if isinstance(options, str):
    raise ValueError(f"forward_by='cudnn': {options}")
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  kind = (
      cudnn.MaskType.CAUSAL if options["is_causal"] else cudnn.MaskType.NO_MASK
  )
  result: Any = cudnn.dot_product_attention(
      inputs.query,
      inputs.key,
      inputs.value,
      scale=spec.scale,
      mask_type=kind,
      sliding_window_length=options["window"],
      return_residual=True,
  )
  return result
