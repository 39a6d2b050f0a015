"""Checks the arguments of gathered ops and says what would be right."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import activations
from kernels_pallas import arguments
from kernels_pallas import lists
from kernels_pallas import masks
from kernels_pallas.gather_mlp import parts


def check_weights(
    x: masks.AnyArray, weights: parts.Weights, down_bias: masks.AnyArray | None
) -> None:
  """Raises ValueError unless [B, D], [F, D] and biases fit together."""
  named = {"x": x} | {
      name: array
      for name, array in (weights._asdict() | {"down_bias": down_bias}).items()
      if array is not None
  }
  for name, array in named.items():
    arguments.check_float_array(name, array)
    wanted = "1 axis" if name.endswith("bias") else "2 axes"
    if array.ndim != int(wanted[0]):
      raise ValueError(
          f"{name} has shape {array.shape}; it must have {wanted}: x [B, D],"
          " weights [F, D], biases [F], down_bias [D]"
      )
  width, num_neurons = x.shape[1], weights.up.shape[0]
  for name in ("up", "down", "gate"):
    if name in named and named[name].shape != (num_neurons, width):
      raise ValueError(
          f"{name} has shape {named[name].shape}; with x {x.shape} and up"
          f" {weights.up.shape} it must be a row for each neuron and a column"
          f" for each of x, {(num_neurons, width)}"
      )
    if name in named and named[name].dtype != x.dtype:
      raise ValueError(
          f"{name} is {named[name].dtype} and x is {x.dtype}; they must have"
          " one type"
      )
  for name, size in (
      ("up_bias", num_neurons),
      ("gate_bias", num_neurons),
      ("down_bias", width),
  ):
    if name in named and named[name].shape != (size,):
      raise ValueError(
          f"{name} has shape {named[name].shape}; it must be {(size,)}"
      )
  if weights.gate_bias is not None and weights.gate is None:
    raise ValueError("gate_bias needs a gate")


def check_options(activation: str, block_size: int, num_neurons: int) -> None:
  """Raises ValueError for an option that has no meaning."""
  if activation not in activations.ACTIVATIONS:
    raise ValueError(
        f"activation={activation!r} is unknown; it must be one of"
        f" {', '.join(activations.ACTIVATIONS)}"
    )
  is_whole = isinstance(block_size, int | np.integer) and block_size > 0
  if not is_whole or num_neurons % block_size:
    raise ValueError(
        f"block_size={block_size} must be a positive divisor of the"
        f" {num_neurons} neurons"
    )


def check_ids(
    name: str,
    ids: masks.AnyArray,
    num_valid: masks.AnyArray | int | None,
    batch: int,
    max_ndim: int = 2,
) -> None:
  """Raises ValueError unless they are int [S] or [B, S], and int [] or [B]."""
  for label, array in ((name, ids), ("num_valid", num_valid)):
    if label == "num_valid" and array is None:
      continue
    if not isinstance(array, jax.Array | np.ndarray | np.integer | int):
      raise ValueError(
          f"{label} is a {type(array).__name__}; it must be an array"
      )
    if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
      raise ValueError(f"{label} is {jnp.result_type(array)}; it must be int32")
  shape = np.shape(ids)
  if len(shape) not in (1, max_ndim) or shape[:-1] not in ((), (batch,)):
    raise ValueError(
        f"{name} has shape {shape}; it must be [S] for all sequences, or"
        f" [B, S] with B = {batch}"
    )
  # A list for all sequences has one number; lists may share one as well.
  shapes = ((),) if len(shape) == 1 else ((), (batch,))
  if num_valid is not None and np.shape(num_valid) not in shapes:
    raise ValueError(
        f"num_valid has shape {np.shape(num_valid)}; with {name} {shape} it"
        f" must be {' or '.join(map(str, shapes))}"
    )


def check_values(
    name: str,
    ids: masks.AnyArray,
    num_valid: masks.AnyArray | int | None,
    num_blocks: int,
    what: str,
) -> None:
  """Checks every entry that counts, see `lists.check`; for debugging.

  Raises:
    ValueError: If one is out of range or there twice, or `num_valid` is, and
      the values are known (no tracers).
  """
  num_valid = ids.shape[-1] if num_valid is None else num_valid
  lists.check(
      name,
      ids,
      jnp.broadcast_to(jnp.asarray(num_valid), ids.shape[:-1]),
      num_blocks,
      f"there are {what} 0 to {num_blocks - 1}",
      "has {twice} twice in one list",
  )
