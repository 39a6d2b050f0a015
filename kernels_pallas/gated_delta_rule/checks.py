"""Checks the arguments of the op and says what would be right."""

from collections.abc import Mapping

import jax
import numpy as np

from kernels_pallas import arguments
from kernels_pallas.masks import AnyArray

_AXES = {"query": 4, "key": 4, "value": 4, "beta": 3}


def check_arrays(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    log_decay: AnyArray,
    beta: AnyArray,
) -> None:
  """Raises ValueError unless the arrays of a sequence fit together."""
  named = {"query": query, "key": key, "value": value, "beta": beta}
  for name, array in (*named.items(), ("log_decay", log_decay)):
    arguments.check_float_array(name, array)
  for name, array in named.items():
    if array.ndim != _AXES[name]:
      raise ValueError(
          f"{name} has shape {array.shape}; it must have {_AXES[name]} axes:"
          f" batch, position, head{', size' * (_AXES[name] == 4)}"
      )
  if query.shape != key.shape:
    raise ValueError(f"query {query.shape} and key {key.shape} must be alike")
  if key.shape[:2] != value.shape[:2]:
    raise ValueError(
        f"key {key.shape} and value {value.shape} must have equal first axes:"
        " batch and positions"
    )
  arguments.check_one_type(query, key, value)
  arguments.check_groups(value.shape[2], "value", key.shape[2], "query and key")
  for name, array in (("key", key), ("value", value)):
    if array.shape[3] == 0:
      raise ValueError(f"{name} {array.shape} must have a size of 1 or more")
  _check_gates(value, key, log_decay, beta)


def _check_gates(
    value: AnyArray, key: AnyArray, log_decay: AnyArray, beta: AnyArray
) -> None:
  by_head = value.shape[:3]
  by_channel = (*by_head, key.shape[3])
  if beta.shape != by_head:
    raise ValueError(
        f"beta has shape {beta.shape}; for value {value.shape} it must be"
        f" {by_head}"
    )
  if log_decay.shape not in (by_head, by_channel):
    raise ValueError(
        f"log_decay has shape {log_decay.shape}; it must be {by_head}, one"
        f" number a value head, or {by_channel}, one a key channel"
    )
  for name, array, is_right, what in (
      ("log_decay", log_decay, lambda x: x <= 0, "at most 0"),
      ("beta", beta, lambda x: x >= 0, "0 or more"),
  ):
    if isinstance(array, jax.core.Tracer):
      continue
    numbers = np.asarray(array, np.float64)
    wrong = numbers[~is_right(numbers)]
    if wrong.size:
      raise ValueError(
          f"{name} has a value of {wrong[0]:g}; each must be {what}"
      )


def check_state(
    name: str, state: AnyArray | None, shape: tuple[int, int, int, int]
) -> None:
  """Raises ValueError unless it is a state of the op."""
  if state is None:
    return
  arguments.check_float_array(name, state)
  if state.shape != shape:
    raise ValueError(
        f"{name} has shape {state.shape}; it must be batch, value heads, key"
        f" size, value size = {shape}"
    )


def check_position(
    vectors: Mapping[str, AnyArray], gates: Mapping[str, AnyArray]
) -> None:
  """Raises ValueError unless the arrays of a step have their axes.

  Args:
    vectors: Query, key and value by name.
    gates: log_decay and beta.
  """
  for name, array in vectors.items():
    if np.ndim(array) != 3:
      raise ValueError(
          f"{name} has shape {np.shape(array)}; in a step it must have 3 axes:"
          " batch, head, size"
      )
  for name, array in gates.items():
    if np.ndim(array) < 2:
      raise ValueError(
          f"{name} has shape {np.shape(array)}; in a step it must begin with 2"
          " axes: batch, head"
      )


def by_channel(log_decay: jax.Array, value: AnyArray) -> jax.Array:
  """The decays of each position and head: one, or one a key channel."""
  return log_decay[..., None] if log_decay.ndim < value.ndim else log_decay


def scale_of(scale: float | None, query: AnyArray) -> float:
  """The factor of the outputs, None that of the key size."""
  arguments.check_number("scale", scale)
  return query.shape[3] ** -0.5 if scale is None else float(scale)
