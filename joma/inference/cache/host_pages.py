"""A KV cache that keeps everything in pages in the host's memory.

A step brings the pages of a layer to the device one after the other, and adds
up what their keys say by the running softmax of flash attention
(https://arxiv.org/abs/2205.14135): the device holds the page that is being
filled, of each layer, and a page or two that come by, however long the text is
(the cache's part of FlexGen, https://arxiv.org/abs/2303.06865). Tokens take
slots in the order of time, the same one in all sequences, so that a step writes
one page; `pos` says which are whose. A first prompt is read at once on the
device, what comes later token by token.

In the host a page of a sequence is rows of 128 numbers, as a TPU moves them,
whatever the head size is.

Letters: B batch, T new tokens, S pages, P slots of a page, N query heads, K key
and value heads, G = N / K, H head size, R rows of W numbers.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import layer_hooks
from joma.transformer import one_by_one
from joma.transformer import sharding
from kernels_pallas import logits
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

HOST = "pinned_host"
# Of queries that see nothing yet: its exponential is 0, and it is no NaN.
_NOTHING = -1e30
_LANES = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostCache:
  """Pages of one layer; a `hooks.KVCache`.

  Attributes:
    key: [S, B, R, W] in the host's memory, rotated.
    value: As key.
    newest: Key and value [B, K, P, H] of the page that is being filled, on the
      device.
    pos: Int32 [B, S P] on the device, the token's position; -1 is none.
    count: Int32, slots taken.
    is_new: Whether nothing has been written; static.
  """

  key: PyTree
  value: PyTree
  newest: tuple[PyTree, PyTree]
  pos: PyTree
  count: PyTree
  is_new: bool = dataclasses.field(metadata={"static": True})

  def num_positions(self) -> int:
    """Its slots: what comes behind them makes outputs NaN."""
    return self.pos.shape[1]

  def kept_positions(self) -> None:
    """None: nothing leaves."""

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "HostCache"]:
    """One token: a step. More: a first prompt at once, others one by one."""
    if sharding.current_mesh() is not None:
      raise errors.UserError(
          "A cache in the host's memory is one device's: leave --mesh out."
      )
    arguments = (query, key, value, positions, rotate, options)
    if query.shape[1] > 1 and not self.is_new:
      return one_by_one.attend(HostCache.attend, self, *arguments)
    query, key = rotate(query, positions), rotate(key, positions)
    if query.shape[1] == 1:
      return _step(self, query, key, value, positions, options)
    swapped = key.swapaxes(1, 2), value.swapaxes(1, 2)
    made = full_cache.attend_many(query, *swapped, positions, options)
    return made.out, _read(self, *swapped, positions)


def init(
    config: configs.TransformerConfig,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    page_size: int = 64,
) -> tuple[Any, ...]:
  """Returns empty caches, one a layer, for the default device and its host.

  Args:
    config: The model's.
    batch_size: B.
    capacity: Positions of the longest text; pages are filled up.
    dtype: Of keys and values.
    page_size: P.

  Raises:
    UserError: The device has no memory of its own, a size is not positive, or
      the model's rotary frequencies change with the text.
  """
  check_device(jax.default_backend())
  return make(config, batch_size, capacity, dtype, page_size)


def check_device(backend: str) -> None:
  """Raises UserError where a device's memory is the host's."""
  if backend == "cpu":
    raise errors.UserError(
        "A CPU has no memory but the host's, so that there is nothing to"
        " offload to: keep the cache where it is."
    )


def make(
    config: configs.TransformerConfig,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
    page_size: int,
) -> tuple[Any, ...]:
  """As `init`, whatever the device is."""
  for name, size in (("batch_size", batch_size), ("capacity", capacity)):
    require.at_least(name, size, 1)
  require.at_least("page_size", page_size, 1)
  for layer in range(config.num_layers):
    full_cache.check_rotations_stay(
        "A cache in the host's memory", config, layer
    )
  pages = -(-capacity // page_size)
  shape = (pages, batch_size, config.num_kv_heads, page_size, config.head_dim)
  empty = functools.partial(_empty, shape, dtype)
  return tuple(
      layer_hooks.init_cache(config, layer, batch_size, capacity, dtype, empty)
      for layer in range(config.num_layers)
  )


def _empty(
    shape: tuple[int, int, int, int, int], dtype: jax.typing.DTypeLike
) -> HostCache:
  pages, batch, _, page, _ = shape
  device = jax.local_devices()[0]
  host = jax.sharding.SingleDeviceSharding(device, memory_kind=HOST)
  in_rows = (pages, *_rows_of(shape[1:]))
  zeros = lambda: jax.device_put(jnp.zeros(in_rows, dtype), host)
  pos = jnp.full((batch, pages * page), -1, jnp.int32)
  newest = jnp.zeros(shape[1:], dtype), jnp.zeros(shape[1:], dtype)
  return HostCache(zeros(), zeros(), newest, pos, jnp.int32(0), is_new=True)


def _to_host(x: Array) -> Array:
  return jax.device_put(x, jax.memory.Space.Host)


def _rows_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
  """The shape [B, R, W] of a page [B, K, P, H]."""
  size = math.prod(shape[1:])
  width = _LANES if size % _LANES == 0 else size
  return shape[0], size // width, width


def _page(cache: HostCache, index: Array) -> tuple[Array, Array]:
  """Key and value of a page, on the device."""

  def bring(pages: Float[Array, "S B R W"]) -> Float[Array, "B K P H"]:
    page = jax.lax.dynamic_index_in_dim(pages, index, 0, keepdims=False)
    page = jax.device_put(page, jax.memory.Space.Device)
    return page.reshape(cache.newest[0].shape)

  return bring(cache.key), bring(cache.value)


def _read(
    cache: HostCache,
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    positions: Int[Array, "B T"],
) -> HostCache:
  """Writes a first prompt, whose padding is at the end."""
  page, capacity = cache.newest[0].shape[2], cache.pos.shape[1]
  lengths = (positions >= 0).sum(axis=1)
  length = min(positions.shape[1], capacity)
  missing = -length % page

  pos = cache.pos.at[:, :length].set(positions[:, :length])
  # Behind the longest prompt there is padding alone: its slots are free.
  count = lengths.max().astype(jnp.int32)

  def write(pages: Array, new: Float[Array, "B K T H"]) -> tuple[Array, Array]:
    new = new[:, :, :length].astype(pages.dtype)
    new = jnp.pad(new, ((0, 0), (0, 0), (0, missing), (0, 0)))
    new = new.reshape(*new.shape[:2], -1, page, new.shape[3])
    new = new.transpose(2, 0, 1, 3, 4)
    # Where the next page is a fresh one, what is taken for it is not seen.
    newest = jax.lax.dynamic_index_in_dim(new, count // page, 0, keepdims=False)
    new = _to_host(new.reshape(-1, *pages.shape[1:]))
    pages = jax.lax.dynamic_update_slice_in_dim(pages, new, 0, axis=0)
    return pages, newest

  keys, newest_key = write(cache.key, key)
  values, newest_value = write(cache.value, value)
  newest = newest_key, newest_value
  return HostCache(keys, values, newest, pos, count, is_new=False)


# Greatest logit, sum of exponentials, and sum of values so far, float32.
_Sums = tuple[
    Float[Array, "B K G"], Float[Array, "B K G"], Float[Array, "B K G H"]
]


def _step(
    cache: HostCache,
    query: Float[Array, "B 1 N H"],
    key: Float[Array, "B 1 K H"],
    value: Float[Array, "B 1 K H"],
    positions: Int[Array, "B 1"],
    options: hooks.AttentionOptions,
) -> tuple[Float[Array, "B 1 N H"], HostCache]:
  """Writes a token into its page, and attends to that and all full ones."""
  batch, head_dim = len(query), query.shape[-1]
  page, kind = cache.newest[0].shape[2], cache.key.dtype
  grouped = query.reshape(batch, key.shape[2], -1, head_dim).astype(kind)
  as_kept = lambda x: x.astype(kind).swapaxes(1, 2)
  cache = _written(cache, as_kept(key), as_kept(value), positions)
  index = (cache.count - 1) // page
  nothing = (
      jnp.full(grouped.shape[:3], _NOTHING, jnp.float32),
      jnp.zeros(grouped.shape[:3], jnp.float32),
      jnp.zeros(grouped.shape, jnp.float32),
  )

  def add(
      index: Int[Array, ""], pair: tuple[Array, Array], sums: _Sums
  ) -> _Sums:
    pos = jax.lax.dynamic_slice_in_dim(cache.pos, index * page, page, axis=1)
    return _add(sums, grouped, *pair, pos, positions, options)

  add_page = lambda index, sums: add(index, _page(cache, index), sums)
  sums = add(index, cache.newest, nothing)
  _, total, out = jax.lax.fori_loop(0, index, add_page, sums)
  out = (out / jnp.maximum(total, 1e-30)[..., None]).astype(query.dtype)
  overflows = cache.count > cache.pos.shape[1]
  out = jnp.where(overflows, jnp.nan, out.reshape(query.shape))
  return out, cache


def _add(
    sums: _Sums,
    query: Float[Array, "B K G H"],
    key: Float[Array, "B K P H"],
    value: Float[Array, "B K P H"],
    pos: Int[Array, "B P"],
    positions: Int[Array, "B 1"],
    options: hooks.AttentionOptions,
) -> _Sums:
  """Adds keys to a running softmax."""
  products = jnp.einsum(
      "BKGH,BKPH->BKGP", query, key, preferred_element_type=jnp.float32
  )
  attn_logits = logits.soft_cap(
      options.scale * products, options.logits_soft_cap
  )
  is_seen = (pos >= 0) & (pos <= positions)
  if options.window is not None:
    is_seen &= pos > positions - options.window
  attn_logits = jnp.where(is_seen[:, None, None], attn_logits, -jnp.inf)
  highest, total, out = sums
  new_highest = jnp.maximum(highest, attn_logits.max(axis=-1))
  shrink = jnp.exp(highest - new_highest)
  weights = jnp.exp(attn_logits - new_highest[..., None])
  of_values = jnp.einsum(
      "BKGP,BKPH->BKGH",
      weights.astype(value.dtype),
      value,
      preferred_element_type=jnp.float32,
  )
  return (
      new_highest,
      total * shrink + weights.sum(axis=-1),
      out * shrink[..., None] + of_values,
  )


def _written(
    cache: HostCache,
    key: Float[Array, "B K 1 H"],
    value: Float[Array, "B K 1 H"],
    positions: Int[Array, "B 1"],
) -> HostCache:
  """Puts a token into the next slot, and its page into the host as well."""
  page = cache.newest[0].shape[2]
  index, slot = cache.count // page, cache.count % page
  add = lambda page, new: jax.lax.dynamic_update_slice_in_dim(
      page, new, slot, axis=2
  )
  newest = add(cache.newest[0], key), add(cache.newest[1], value)
  put = lambda pages, new: jax.lax.dynamic_update_index_in_dim(
      pages, _to_host(new.reshape(pages.shape[1:])), index, axis=0
  )
  pos = jax.lax.dynamic_update_slice_in_dim(
      cache.pos, positions.astype(jnp.int32), cache.count, axis=1
  )
  return HostCache(
      put(cache.key, newest[0]),
      put(cache.value, newest[1]),
      newest,
      pos,
      cache.count + 1,
      is_new=False,
  )
