"""One pass over a sequence, and how the backward is made of three of them.

A sweep visits positions in order, with a state [H, H] for each head:

  forward   state = decay state + in_scale key_t value_t^T
            out_t = out_scale query_t state
  reversed  state = state + in_scale key_t value_t^T
            out_t = out_scale query_t state,    state = decay state

from the last position to the first if reversed. With D_t the cotangent of the
state after position t, D_t = scale query_t d_out_t^T + decay D_{t+1}, and

  d_query_t = scale state_t d_out_t    a forward sweep over (d_out, value, key)
  d_value_t = D_t^T key_t              a reversed one over (key, query, d_out)
  d_key_t   = D_t value_t              a reversed one over (value, d_out, query)

so that an implementation is one function, `run`, and states are never stored.
"""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import implementations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """What is known of a sweep while it is traced.

  Attributes:
    is_reversed: From the last position to the first.
    in_scale: Factor of what is added to the state.
    out_scale: Factor of what is read from it.
    is_out_wide: Whether `out` stays in the type of the sums.
    config: Chunks of the implementation, None for its own choice.
  """

  is_reversed: bool = False
  in_scale: float = 1.0
  out_scale: float = 1.0
  is_out_wide: bool = False
  config: implementations.Config = None


class Operands(NamedTuple):
  """Arrays of a sweep, of which each plays every part in some sweep.

  Attributes:
    query: N heads, or a divisor of N.
    key: The same.
    value: As key.
    log_decay: At most 0.
    state: Where the sweep begins, in the type of the sums.
  """

  query: Float[Array, "B T _ H"]
  key: Float[Array, "B T _ H"]
  value: Float[Array, "B T _ H"]
  log_decay: Float[Array, "N"]
  state: Float[Array, "B N H H"]


Swept = tuple[Float[Array, "B T N H"], Float[Array, "B N H H"]]


@runtime_checkable
class Implementation(Protocol):
  """A module with `run`."""

  def run(self, operands: Operands, sweep: Sweep) -> Swept:
    """Returns out and the state at the end."""
    ...


def sum_type(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """What is summed in: float32, or float64 for float64."""
  return jnp.promote_types(dtype, jnp.float32)


def log_of(decay: Float[Array, "N"]) -> Float[Array, "N"]:
  """The logarithm; of what a CPU would flush to 0, of the least number."""
  return jnp.log(jnp.maximum(decay, jnp.finfo(decay.dtype).tiny))
