"""Checks the entries of lists that name blocks, for debugging."""

from typing import Any

import jax
from jax.experimental import checkify
import jax.numpy as jnp
from jaxtyping import Int
import numpy as np

from kernels_pallas import array_types
from kernels_pallas import masks


def check(
    name: str,
    entries: Int[array_types.AnyArray, "*lists W"],
    num_valid: Int[array_types.AnyArray, "*lists"],
    num_blocks: int,
    what_there_is: str,
    what_is_twice: str,
) -> None:
  """Checks every entry that counts, and how many are said to.

  Under `jax.jit`, wrap the caller in `checkify.checkify`.

  Args:
    name: Of the lists, for messages.
    entries: Lists of numbers of blocks.
    num_valid: So many entries of a list count.
    num_blocks: Blocks are numbered from 0 to before it.
    what_there_is: Ends "..., but ": "there are blocks 0 to 3".
    what_is_twice: Ends "name ...", of an entry {twice} that is there twice.

  Raises:
    ValueError: If an entry is no block or is listed twice, or `num_valid` is
      negative or larger than the lists are wide, and the values are known (no
      tracers).
  """
  table = jnp.asarray(entries, jnp.int32)
  counts = jnp.asarray(num_valid, jnp.int32)
  width, most = table.shape[-1], np.iinfo(np.int32).max
  entry = masks.to_rank(jnp.arange(width), table.ndim)
  is_valid = entry < counts[..., None]
  # Entries that do not count become numbers that no block has, each its own.
  ordered = jnp.sort(jnp.where(is_valid, table, num_blocks + entry), axis=-1)
  is_twice = ordered[..., 1:] == ordered[..., :-1]
  values = {
      "low": jnp.where(is_valid, table, most).min(initial=most),
      "high": jnp.where(is_valid, table, -1).max(initial=-1),
      "least": counts.min(initial=most),
      "most": counts.max(initial=-1),
      "twice": jnp.where(is_twice, ordered[..., 1:], -1).max(initial=-1),
  }
  _refuse_unless(
      (values["low"] >= 0) & (values["high"] < num_blocks),
      f"{name} has entries from {{low}} to {{high}}, but {what_there_is}",
      values,
  )
  _refuse_unless(
      (values["least"] >= 0) & (values["most"] <= width),
      f"num_valid is from {{least}} to {{most}}, but {name} is {width} wide",
      values,
  )
  _refuse_unless(values["twice"] < 0, f"{name} {what_is_twice}", values)


def _refuse_unless(
    is_right: jax.Array, message: str, values: dict[str, Any]
) -> None:
  """Raises now where the truth is known, else when the program runs."""
  if isinstance(is_right, jax.core.Tracer):
    checkify.check(is_right, message, **values)
  elif not is_right:
    raise ValueError(message.format(**{k: int(v) for k, v in values.items()}))
