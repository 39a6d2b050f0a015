"""Attention on Hopper GPUs.

Out and lse come from our kernel or from cuDNN, the column sums from ours in
both cases, and the gradients from ours. The kernels visit lists of tiles, and
do not care whether a mask or data made these. A selection's blocks must be
multiples of 64, and are best of 128. No figure of speed is known yet: our
kernels are compiled for the H100 and checked by interpretation.
"""

import jax
from jaxtyping import Array, Float

from kernels_pallas import output
from kernels_pallas.attention import differentiable
from kernels_pallas.attention import visits as visits_lib
from kernels_pallas.attention.gpu import backward_kv
from kernels_pallas.attention.gpu import backward_q
from kernels_pallas.attention.gpu import col_mass as col_mass_lib
from kernels_pallas.attention.gpu import cudnn
from kernels_pallas.attention.gpu import forward as forward_lib
from kernels_pallas.attention.gpu import plan
from kernels_pallas.attention.gpu import task as task_lib

Config = plan.AttentionGpuConfig
why_not = plan.why_not


def forward(
    inputs: differentiable.Inputs, spec: differentiable.AttentionSpec
) -> output.AttentionOutput:
  """Computes the op, see `differentiable.Attention`.

  Raises:
    ValueError: If the kernels do not have the type, head or block size, or
      cuDNN was asked for and cannot compute this.
  """
  config = spec.config or Config()
  if config.forward_by == "cudnn":
    out, lse = cudnn.attend(inputs, spec)
  else:
    out, lse = softmax_of(inputs, spec)
  sums = col_mass(inputs, lse, spec) if spec.return_col_mass else None
  return output.AttentionOutput(out, lse, sums)


def softmax_of(
    inputs: differentiable.Inputs, spec: differentiable.AttentionSpec
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
  """Computes out and lse by our kernel; errors as `forward`."""
  call, where = plan.prepare(inputs, spec), inputs.where
  task = plan.task_of(
      _tiles(spec).forward,
      forward_lib.choose,
      visits_lib.by_query,
      call,
      where,
  )
  out, lse = forward_lib.forward(
      call.query, call.key, call.value, inputs.sink_logits, task
  )
  return out[..., : inputs.query.shape[-1]], lse


def col_mass(
    inputs: differentiable.Inputs,
    lse: Float[Array, "B N T"],
    spec: differentiable.AttentionSpec,
) -> Float[Array, "B N S"]:
  """Sums what each key gets; errors as `forward`."""
  # The values are not read.
  call = plan.prepare(inputs._replace(value=inputs.key), spec)
  task = plan.task_of(
      _tiles(spec).col_mass,
      col_mass_lib.choose,
      visits_lib.by_key,
      call,
      inputs.where,
  )
  # Column sums are measurements: no gradient flows through them.
  lse = jax.lax.stop_gradient(lse)
  return col_mass_lib.col_mass(
      call.query, call.key, lse, inputs.row_weights, task
  )


def backward(
    saved: differentiable.Saved, spec: differentiable.AttentionSpec
) -> differentiable.Cotangents:
  """Computes the cotangents of query, key and value; errors as `forward`."""
  call, where = plan.prepare(saved, spec), saved.where
  d_out = plan.pad_head(saved.d_out.astype(saved.query.dtype))
  arrays = task_lib.Gradient(
      call.query, call.key, call.value, d_out, saved.lse, saved.delta
  )
  asked = _tiles(spec)
  # Queries stay for one kernel and keys for the other: no sum is shared between
  # blocks of threads, so that results do not depend on their order.
  by_query = plan.task_of(
      asked.backward_q, backward_q.choose, visits_lib.by_query, call, where
  )
  by_key = plan.task_of(
      asked.backward_kv, backward_kv.choose, visits_lib.by_key, call, where
  )
  d_query = backward_q.backward_q(arrays, by_query)
  d_key, d_value = backward_kv.backward_kv(arrays, by_key)
  head_dim = saved.query.shape[-1]
  # The sign of the scale went into the queries, which is undone here.
  d_query = d_query * call.sign if call.sign != 1 else d_query
  return (
      d_query[..., :head_dim],
      d_key[..., :head_dim],
      d_value[..., :head_dim],
  )


def _tiles(spec: differentiable.AttentionSpec) -> plan.Tiles:
  return (spec.config or Config()).tiles
