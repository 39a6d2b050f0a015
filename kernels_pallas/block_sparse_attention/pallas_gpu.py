"""Block-sparse attention on Hopper GPUs: the kernels of flash attention.

They visit lists of tiles, and do not care whether a mask or data made these.
The selection's blocks must be multiples of 64, and are best of 128.
"""

from jaxtyping import Array, Float

from kernels_pallas import output
from kernels_pallas import selection
from kernels_pallas.attention import differentiable
from kernels_pallas.attention.gpu import attention

Config = attention.Config
why_not = attention.why_not


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: selection.Selection,
    sink_logits: Float[Array, "N"] | None,
    row_weights: Float[Array, "B N T"] | None,
    spec: differentiable.AttentionSpec,
) -> output.AttentionOutput:
  """Computes the op.

  Raises:
    ValueError: If the kernels do not have the type, head or block size.
  """
  config = spec.config or Config()
  out, lse = attention.forward(
      query, key, value, where, sink_logits, spec, config
  )
  col_mass = None
  if spec.return_col_mass:
    col_mass = attention.col_mass(
        query, key, lse, where, row_weights, spec, config
    )
  return output.AttentionOutput(out, lse, col_mass)


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: selection.Selection,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    spec: differentiable.AttentionSpec,
) -> tuple[
    Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]
]:
  """Computes the cotangents of query, key and value."""
  return attention.backward(
      query,
      key,
      value,
      where,
      lse,
      delta,
      d_out,
      spec,
      spec.config or Config(),
  )
