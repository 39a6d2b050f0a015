"""Checks the arguments of gathered ops and says what would be right."""

from typing import Any

import jax
from jax.experimental import checkify
import jax.numpy as jnp
import numpy as np

from kernels_pallas import activations
from kernels_pallas import arguments
from kernels_pallas.gather_mlp import parts


def check_weights(x: Any, weights: parts.Weights, down_bias: Any) -> None:
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
    name: str, ids: Any, num_valid: Any, batch: int, max_ndim: int = 2
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
  shapes = ((),) if len(shape) == 1 else ((), (batch,))
  if num_valid is not None and np.shape(num_valid) not in shapes:
    raise ValueError(
        f"num_valid has shape {np.shape(num_valid)}; with {name} {shape} it"
        f" must be {' or '.join(map(str, shapes))}"
    )


def check_values(
    name: str, ids: Any, num_valid: Any, num_blocks: int, what: str
) -> None:
  """Checks every entry that counts; for debugging.

  Under `jax.jit`, wrap the caller in `jax.experimental.checkify.checkify`.

  Raises:
    ValueError: If one is out of range or there twice, or `num_valid` is, and
      the values are known (no tracers).
  """
  ids, width = jnp.asarray(ids, jnp.int32), ids.shape[-1]
  num_valid = width if num_valid is None else num_valid
  num_valid = jnp.broadcast_to(jnp.asarray(num_valid), ids.shape[:-1])
  entry = jnp.broadcast_to(jnp.arange(width), ids.shape)
  counts = entry < num_valid[..., None]
  # Entries that do not count become numbers that no block has.
  ordered = jnp.sort(jnp.where(counts, ids, num_blocks + entry), axis=-1)
  is_twice = ordered[..., 1:] == ordered[..., :-1]
  most = np.iinfo(np.int32).max
  values = {
      "low": jnp.where(counts, ids, most).min(initial=most),
      "high": jnp.where(counts, ids, -1).max(initial=-1),
      "least": num_valid.min(),
      "most": num_valid.max(),
      "twice": jnp.where(is_twice, ordered[..., 1:], -1).max(initial=-1),
  }
  cases = (
      (
          (values["low"] >= 0) & (values["high"] < num_blocks),
          (
              f"{name} has entries from {{low}} to {{high}}, but there are"
              f" {what} 0 to {num_blocks - 1}"
          ),
      ),
      (
          (values["least"] >= 0) & (values["most"] <= width),
          (
              f"num_valid is from {{least}} to {{most}}, but {name} is {width}"
              " wide"
          ),
      ),
      (values["twice"] < 0, f"{name} has {{twice}} twice in one list"),
  )
  for is_right, message in cases:
    if isinstance(is_right, jax.core.Tracer):
      checkify.check(is_right, message, **values)
    elif not is_right:
      known = {key: int(value) for key, value in values.items()}
      raise ValueError(message.format(**known))
