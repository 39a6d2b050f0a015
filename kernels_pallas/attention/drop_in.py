"""This attention where a program calls jax's or Flax's by its signature.

  jax.nn.dot_product_attention(...)      drop_in.dot_product_attention(...)
  flax.linen.MultiHeadDotProductAttention(attention_fn=drop_in.flax_attention)
  flax.nnx.MultiHeadAttention(attention_fn=drop_in.flax_attention)

Values are theirs, but for one thing: a query without any key gives 0, where
they give the mean of all values. What a mask or a bias costs as an array is in
`array_masks`; `where`, a `masks.Mask`, costs O(T + S).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from kernels_pallas import array_types
from kernels_pallas import implementations
from kernels_pallas import masks
from kernels_pallas.attention import array_masks

AnyArray = array_types.AnyArray


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: implementations.Implementation | None = None,
    return_residual: bool = False,
    return_col_mass: bool = False,
) -> Any:
  """As `jax.nn.dot_product_attention`, whose arguments it takes.

  Args:
    query: [B, T, N, H] or [T, N, H].
    key: [B, S, K, H] or [S, K, H]; K divides N.
    value: As key.
    bias: Added to the logits, broadcastable to [B, N, T, S].
    mask: True where a query may read a key, likewise.
    scale: Factor of the logits; None is H ** -0.5.
    is_causal: Whether query t reads the keys 0 to t alone.
    query_seq_lengths: Of queries, int [B]; those behind give 0.
    key_value_seq_lengths: Of keys, int [B].
    local_window_size: Keys to the left and to the right of a query's position.
    implementation: Of `api.attention`; there is no cudnn here.
    return_residual: Whether to return lse [B, T, N] or [T, N], too, float32.
    return_col_mass: Whether to return what each key got from all queries,
      float32 [B, N, S] or [N, S], last. Not in jax's signature.

  Returns:
    The output, as query; with more asked for, a tuple that begins with it.

  Raises:
    ValueError: If shapes or types do not fit together, or the implementation
      is unknown or not for this platform.
  """
  arrays = [jnp.asarray(x) for x in (query, key, value)]
  is_single = arrays[0].ndim == 3
  arrays = [x[None] if is_single else x for x in arrays]
  num_queries, num_keys = arrays[0].shape[1], arrays[1].shape[1]
  parts = []
  if is_causal:
    parts.append(masks.causal(num_queries, num_keys))
  if local_window_size is not None:
    sides = local_window_size
    left, right = (sides, sides) if isinstance(sides, int) else sides
    # The keys from t - left to t + right are a causal window of t + right.
    parts.append(
        masks.sliding_window(
            num_queries, num_keys, window=left + right + 1, offset=right
        )
    )
  if key_value_seq_lengths is not None:
    parts.append(masks.key_lengths(num_queries, key_value_seq_lengths))
  if query_seq_lengths is not None:
    parts.append(_query_lengths(num_queries, num_keys, query_seq_lengths))
  call = array_masks.Call(
      *arrays,
      where=_all_of(parts),
      scale=arrays[0].shape[-1] ** -0.5 if scale is None else scale,
      implementation=implementation,
      return_col_mass=return_col_mass,
  )
  lead = lambda x: None if x is None else _to_four(x)
  result = array_masks.attend(call, _known(lead(mask), bool), lead(bias))
  found = [result.out]
  if return_residual and result.lse is not None:
    found.append(jax.lax.stop_gradient(result.lse.swapaxes(1, 2)))
  if result.col_mass is not None:
    found.append(result.col_mass)
  found = [x[0] if is_single else x for x in found]
  return found[0] if len(found) == 1 else tuple(found)


def flax_attention(
    query: Float[AnyArray, "*B T N H"],
    key: Float[AnyArray, "*B S K H"],
    value: Float[AnyArray, "*B S K H"],
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    *,
    where: masks.Mask | None = None,
    implementation: implementations.Implementation | None = None,
) -> Float[Array, "*B T N H"]:
  """An `attention_fn` of Linen's and of NNX's multi-head attention.

  With `sow_weights=True` the module sows, in place of the weights [T, S], what
  needs no such array: `lse` [*B, N, T] and `col_mass` [*B, N, S], the sum of a
  key's weights over all queries, both float32.

  Args:
    query: Any number of batch axes, none too.
    key: As query.
    value: As key.
    bias: Added to the logits, broadcastable to [*B, N, T, S].
    mask: True or 1 where a query may read a key, likewise.
    broadcast_dropout: Of no use, for nothing is dropped.
    dropout_rng: Likewise.
    dropout_rate: Must be 0 unless `deterministic`.
    deterministic: Whether nothing is dropped.
    dtype: What the arrays are cast to; None is the widest of their types.
    precision: Not used: products add up in float32.
    module: What sows; None sows nothing.
    is_causal: Whether query t reads the keys 0 to t alone.
    where: Which keys a query reads, besides; by `functools.partial`.
    implementation: Of `api.attention`, likewise.

  Raises:
    ValueError: If attention weights are to be dropped.
  """
  del broadcast_dropout, dropout_rng, precision
  if dropout_rate and not deterministic:
    raise ValueError(
        f"dropout_rate={dropout_rate} would drop attention weights, which this"
        " attention never holds; it must be 0, or deterministic=True"
    )
  dtype = jnp.result_type(query, key, value) if dtype is None else dtype
  batch = query.shape[:-3]
  size = math.prod(batch)
  merge = lambda x: jnp.asarray(x, dtype).reshape(size, *x.shape[-3:])
  arrays = [merge(x) for x in (query, key, value)]
  if is_causal:
    causal = masks.causal(query.shape[-3], key.shape[-3])
    where = causal if where is None else where & causal
  call = array_masks.Call(
      *arrays,
      where=where,
      scale=query.shape[-1] ** -0.5,
      implementation=implementation,
      return_col_mass=module is not None,
  )
  allowed = _known(_merged(mask, batch), bool)
  result = array_masks.attend(call, allowed, _merged(bias, batch))
  if module is not None:
    for name in ("lse", "col_mass"):
      found = getattr(result, name)
      found = found.reshape(*batch, *found.shape[1:])
      module.sow("intermediates", name, found)
  return result.out.reshape(*batch, *result.out.shape[1:])


def _query_lengths(
    num_queries: int, num_keys: int, lengths: AnyArray
) -> masks.Mask:
  """All keys for the first queries of each sequence, none for the others."""
  xp = np if isinstance(lengths, np.ndarray) else jnp
  is_query = xp.arange(num_queries)[None] < xp.asarray(lengths)[:, None]
  stops = xp.where(is_query, num_keys, 0).astype(xp.int32)[:, None]
  return masks.Mask(xp.zeros_like(stops), stops)


def _all_of(parts: list[masks.Mask]) -> masks.Mask | None:
  where = None
  for part in parts:
    where = part if where is None else where & part
  return where


def _to_four(x: AnyArray) -> AnyArray:
  return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _merged(x: AnyArray | None, batch: tuple[int, ...]) -> AnyArray | None:
  """[*#B, #N, #T, #S] with one batch axis."""
  if x is None:
    return None
  x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
  if math.prod(x.shape[:-3]) == 1:
    return x.reshape(1, *x.shape[-3:])
  xp = np if isinstance(x, np.ndarray) else jnp
  x = xp.broadcast_to(x, (*batch, *x.shape[-3:]))
  return x.reshape(-1, *x.shape[-3:])


def _known(x: AnyArray | None, dtype: Any) -> AnyArray | None:
  """As NumPy's array where its numbers are known while tracing."""
  if x is None or isinstance(x, jax.core.Tracer):
    return x if x is None else x.astype(dtype)
  return np.asarray(x).astype(dtype)
