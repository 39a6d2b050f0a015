"""Checks the arguments of an attention op and says what would be right."""

import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.masks import AnyArray

_FLOAT_TYPES = ("bfloat16", "float16", "float32", "float64")


def narrow(x: Any) -> Any:
  """32 bits for the 64 that numbers have with `jax_enable_x64`; None stays.

  For what stands beside the arrays of a kernel: chips have no such types.
  """
  narrower = {"int64": jnp.int32, "float64": jnp.float32}
  dtype = narrower.get(str(getattr(x, "dtype", "")))
  return x if dtype is None else jnp.asarray(x, dtype)


def check_arrays(
    query: AnyArray,
    key: AnyArray,
    value: AnyArray,
    *,
    is_value_alike: bool = True,
) -> None:
  """Raises ValueError unless [B, T, N, H], [B, S, K, H] x 2 fit together.

  Args:
    query: [B, T, N, H].
    key: [B, S, K, H].
    value: As key.
    is_value_alike: Whether its last axis must be that of key, too.
  """
  for name, array in (("query", query), ("key", key), ("value", value)):
    check_float_array(name, array)
    if array.ndim != 4:
      raise ValueError(
          f"{name} has shape {array.shape}; it must have 4 axes: batch,"
          " position, head, head_dim"
      )
  shared = 4 if is_value_alike else 3
  if key.shape[:shared] != value.shape[:shared]:
    but = "" if is_value_alike else ", but for the last axis"
    raise ValueError(
        f"key {key.shape} and value {value.shape} must be alike{but}"
    )
  if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
    raise ValueError(
        f"query {query.shape} and key {key.shape} must have equal first (batch)"
        " and last (head_dim) axes"
    )
  check_one_type(query, key, value)
  check_groups(query.shape[2], "query", key.shape[2], "key and value")
  if query.shape[3] == 0:
    raise ValueError(f"query {query.shape} must have a head_dim of 1 or more")
  if value.shape[3] == 0:
    raise ValueError(f"value {value.shape} must have a head_dim of 1 or more")


def check_one_type(query: AnyArray, key: AnyArray, value: AnyArray) -> None:
  """Raises ValueError unless they have one type."""
  if not query.dtype == key.dtype == value.dtype:
    raise ValueError(
        f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype};"
        " they must have one type"
    )


def check_groups(number: int, whose: str, shared: int, by: str) -> None:
  """Raises ValueError unless so many heads share so many others.

  Args:
    number: Of heads in groups.
    whose: Their name, for the error.
    shared: Of heads that a group shares; 1 or more, and it divides `number`.
    by: Their name.
  """
  if shared == 0 or number == 0 or number % shared:
    raise ValueError(
        f"the {number} {whose} heads must be a multiple of the {shared} {by}"
        " heads"
    )


def check_where(where: object, query: AnyArray, key: AnyArray) -> None:
  """Raises ValueError unless it is None, or fits this batch, T and S."""
  if where is None:
    return
  if isinstance(where, masks.Mask):
    check_mask(where, query, key)
  elif isinstance(where, selection_lib.Selection):
    check_selection(where, query, key)
  else:
    raise ValueError(
        f"where is a {type(where).__name__}; it must be a"
        " kernels_pallas.masks.Mask, such as masks.causal(T, S), a"
        " kernels_pallas.selection.Selection, such as selection.from_mask"
        " makes, or None"
    )


def check_mask(mask: masks.Mask | None, query: AnyArray, key: AnyArray) -> None:
  """Raises ValueError unless the mask is for this batch, T and S."""
  if mask is None:
    return
  if not isinstance(mask, masks.Mask):
    raise ValueError(
        f"mask is a {type(mask).__name__}; it must be a"
        " kernels_pallas.masks.Mask, such as masks.causal(T, S)"
    )
  _check_mask_fields(mask)
  batch, num_queries, num_keys = query.shape[0], query.shape[1], key.shape[1]
  for name, array, length in (
      ("starts", mask.starts, num_queries),
      ("stops", mask.stops, num_queries),
      ("query_ids", mask.query_ids, num_queries),
      ("key_ids", mask.key_ids, num_keys),
  ):
    if array is None:
      continue
    # Spans have an axis of spans before that of the queries.
    spans = 1 if name in ("starts", "stops") else 0
    lead = array.shape[: array.ndim - 1 - spans]
    if array.shape[-1] != length or lead not in ((), (1,), (batch,)):
      raise ValueError(
          f"mask.{name} has shape {array.shape}; for query {query.shape} and"
          f" key {key.shape} it must end in {length}, after a batch of"
          f" {batch}, 1 or none"
      )
  # Only what is known while tracing can be checked without a cost.
  stops = mask.stops
  if isinstance(stops, np.ndarray) and stops.max(initial=0) > num_keys:
    raise ValueError(
        f"mask was made for {stops.max()} keys, but there are {num_keys}"
    )


def _check_mask_fields(mask: masks.Mask) -> None:
  """Raises ValueError unless the arrays of a mask fit each other."""
  shape = mask.starts.shape
  if len(shape) < 2 or shape[-2] not in (1, 2) or mask.stops.shape != shape:
    raise ValueError(
        f"mask.starts has shape {shape} and mask.stops {mask.stops.shape}; both"
        " must be [spans, T] or [batch, spans, T] with 1 or 2 spans"
    )
  if (mask.query_ids is None) != (mask.key_ids is None):
    raise ValueError("mask needs both query_ids and key_ids, or neither")
  for name, array in vars(mask).items():
    if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
      raise ValueError(f"mask.{name} is {array.dtype}; it must be int32")


def check_options(
    query: AnyArray,
    scale: float | None,
    logits_soft_cap: float | None,
    sink_logits: AnyArray | None,
    row_weights: AnyArray | None,
    return_col_mass: bool,
) -> None:
  """Raises ValueError for an option that has no meaning."""
  batch, num_queries, num_heads = query.shape[:3]
  check_number("scale", scale)
  check_number("logits_soft_cap", logits_soft_cap)
  if logits_soft_cap is not None and not logits_soft_cap > 0:
    raise ValueError(f"logits_soft_cap={logits_soft_cap} must be positive")
  if sink_logits is not None:
    check_float_array("sink_logits", sink_logits)
    if sink_logits.shape != (num_heads,):
      raise ValueError(
          f"sink_logits has shape {sink_logits.shape}; it must be one number"
          f" for each of the {num_heads} query heads"
      )
  if row_weights is None:
    return
  if not return_col_mass:
    raise ValueError("row_weights needs return_col_mass=True")
  shape = (batch, num_heads, num_queries)
  # As in `jnp.broadcast_to`, but no axis may be missing.
  fits = np.ndim(row_weights) == 3 and all(
      size in (1, full)
      for size, full in zip(row_weights.shape, shape, strict=True)
  )
  if not fits:
    raise ValueError(
        f"row_weights has shape {np.shape(row_weights)}; it must broadcast to"
        f" batch, query heads, queries = {shape}"
    )


def check_config(
    config: object, implementation: str, module: types.ModuleType
) -> None:
  """Raises ValueError unless `config` is one of the implementation's."""
  kind = getattr(module, "Config", None)
  if config is None or (kind is not None and isinstance(config, kind)):
    return
  wanted = f"a {kind.__module__}.{kind.__name__} or None" if kind else "None"
  raise ValueError(
      f"config={config!r} is not for implementation={implementation!r}; it"
      f" must be {wanted}"
  )


def check_selection(
    selection: selection_lib.Selection, query: AnyArray, key: AnyArray
) -> None:
  """Raises ValueError unless the table is for this B, N, T and S."""
  for name in ("block_q", "block_kv"):
    if getattr(selection, name) < 1:
      raise ValueError(
          f"selection.{name}={getattr(selection, name)} must be at least 1"
      )
  for name in ("block_table", "num_valid"):
    dtype = getattr(selection, name).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
      raise ValueError(f"selection.{name} is {dtype}; it must be int32")
  check_mask(selection.mask, query, key)
  _check_table(selection, query, key)


def _check_table(
    selection: selection_lib.Selection, query: AnyArray, key: AnyArray
) -> None:
  table, num_valid = selection.block_table, selection.num_valid
  batch, num_queries, num_heads = query.shape[:3]
  num_rows = -(-num_queries // selection.block_q)
  heads = sorted({1, key.shape[2], num_heads}, reverse=True)
  if (
      table.ndim != 4
      or table.shape[:3] != num_valid.shape
      or table.shape[0] not in (1, batch)
      or table.shape[1] not in heads
      or table.shape[2] != num_rows
  ):
    raise ValueError(
        f"selection has a block_table of shape {table.shape} and num_valid of"
        f" {num_valid.shape}; with {num_queries} queries in blocks of"
        f" {selection.block_q} they must be [{batch} or 1,"
        f" {' or '.join(map(str, heads))}, {num_rows}, width] and the same"
        " without width"
    )


def check_float_array(name: str, array: object) -> None:
  """Raises ValueError unless it is an array of floats."""
  if not isinstance(array, jax.Array | np.ndarray):
    raise ValueError(f"{name} is a {type(array).__name__}; it must be an array")
  if array.dtype.name not in _FLOAT_TYPES:
    raise ValueError(
        f"{name} is {array.dtype}; it must be a float type, one of"
        f" {', '.join(_FLOAT_TYPES)}"
    )


def check_number(name: str, number: Any) -> None:
  """Raises ValueError unless it is None or a finite number that is known."""
  if number is None:
    return
  # Scales are constants of the kernels: a traced one would fail far inside.
  if isinstance(number, jax.core.Tracer):
    raise ValueError(
        f"{name} is a traced value; it must be a number that is known while"
        " tracing"
    )
  if np.ndim(number) or not isinstance(
      number, int | float | np.number | jax.Array
  ):
    raise ValueError(f"{name}={number!r} must be a number")
  if not math.isfinite(number):
    raise ValueError(f"{name}={number} must be finite")


def check_positions(
    value: AnyArray,
    segment_starts: AnyArray | None,
    lengths: AnyArray | None,
) -> None:
  """Raises ValueError unless they are for the positions of `value`."""
  batch, length = value.shape[:2]
  if segment_starts is not None:
    if np.shape(segment_starts) != (batch, length):
      raise ValueError(
          f"segment_starts has shape {np.shape(segment_starts)}; it must be"
          f" batch, positions = {(batch, length)}"
      )
    if segment_starts.dtype != bool:
      raise ValueError(f"segment_starts is {segment_starts.dtype}, not bool")
  if lengths is None:
    return
  if np.shape(lengths) != (batch,):
    raise ValueError(
        f"lengths has shape {np.shape(lengths)}; it must be one number for"
        f" each of the {batch} sequences"
    )
  if not np.issubdtype(lengths.dtype, np.integer):
    raise ValueError(f"lengths is {lengths.dtype}; it must be of integers")
  if isinstance(lengths, jax.core.Tracer):
    return
  numbers = np.asarray(lengths)
  wrong = numbers[(numbers < 0) | (numbers > length)]
  if wrong.size:
    raise ValueError(
        f"lengths has {wrong[0]}; each must be 0 to the {length} positions"
    )
