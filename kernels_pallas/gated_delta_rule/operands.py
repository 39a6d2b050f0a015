"""Arrays of the op, and what an implementation of it is."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas import implementations

# What no state survives, and no float32: exp(-128) is 0 there, and so is
# exp(-1024) of float64.
_LEAST = {4: -128.0, 8: -1024.0}


class Operands(NamedTuple):
  """Arrays of one call, and their cotangents.

  Attributes:
    query: K heads.
    key: The same.
    value: N heads.
    log_decay: Finite and at most 0, in the type of the sums.
    beta: In the type of the sums.
    state: Where the sequence begins, in the type of the sums.
  """

  query: Float[Array, "B T _ H"]
  key: Float[Array, "B T _ H"]
  value: Float[Array, "B T N J"]
  log_decay: Float[Array, "B T N D"]
  beta: Float[Array, "B T N"]
  state: Float[Array, "B N H J"]


Results = tuple[Float[Array, "B T N J"], Float[Array, "B N H J"]]


@runtime_checkable
class Implementation(Protocol):
  """A module with both passes."""

  def forward(
      self, operands: Operands, scale: float, config: implementations.Config
  ) -> Results:
    """Returns out and the state at the end."""
    ...

  def backward(
      self,
      operands: Operands,
      cotangents: Results,
      scale: float,
      config: implementations.Config,
  ) -> Operands:
    """Returns cotangents; those of query and key of each of N heads."""
    ...


def sum_type(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """What is summed in: float32, or float64 for float64."""
  return jnp.promote_types(dtype, jnp.float32)


def reset(operands: Operands, segment_starts: Bool[Array, "B T"]) -> Operands:
  """Nothing of a state survives the start of a segment."""
  log_decay = operands.log_decay
  starts = segment_starts[..., None, None]
  return operands._replace(log_decay=jnp.where(starts, -jnp.inf, log_decay))


def blank(operands: Operands, lengths: Int[Array, "B"]) -> Operands:
  """Positions after a sequence's own read, forget and add nothing."""
  position = jnp.arange(operands.query.shape[1])
  counts = position[None] < lengths[:, None]
  axes = lambda x: counts.reshape(*counts.shape, *[1] * (x.ndim - 2))
  found = (jnp.where(axes(x), x, jnp.zeros_like(x)) for x in operands[:-1])
  query, key, value, log_decay, beta = found
  return Operands(query, key, value, log_decay, beta, operands.state)


def bounded(operands: Operands) -> Operands:
  """With a finite number for what leaves nothing of a state, such as -inf."""
  log_decay = operands.log_decay
  least = _LEAST[log_decay.dtype.itemsize]
  return operands._replace(log_decay=jnp.maximum(log_decay, least))
