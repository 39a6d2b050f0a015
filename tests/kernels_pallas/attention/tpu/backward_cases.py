"""Calls of the TPU backward, and the gradients that they should give."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection
from kernels_pallas.attention import visits
from kernels_pallas.attention.tpu import backward
from kernels_pallas.attention.tpu import backward_plan as plan_lib
from kernels_pallas.attention.tpu import layout
from kernels_pallas.hardware import tpu_layout
from tests.kernels_pallas import oracle

_LARGE = 2 << 30
_IDS = np.random.default_rng(1).integers(0, 3, (2, 300)).astype(np.int32)
_DOCUMENTS = np.repeat(np.arange(4), (140, 30, 100, 30))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One call; arrays are float64, padded by the test."""

  mask: masks.Mask | None = None
  batch: int = 1
  num_heads: int = 2
  num_kv_heads: int = 2
  num_queries: int = 256
  num_keys: int = 256
  head_dim: int = 32
  block_q: int = 128
  block_kv: int = 128
  soft_cap: float | None = None
  scale: float | None = None
  states: Any = None
  limit: int = _LARGE
  num_cores: int = 1

  def arrays(self, dtype):
    """The oracle's case, with values that the dtype has, and d_out."""
    rng = np.random.default_rng(0)
    draw = lambda length, heads: np.asarray(
        jnp.asarray(
            rng.normal(size=(self.batch, length, heads, self.head_dim)), dtype
        ),
        np.float64,
    )
    query = draw(self.num_queries, self.num_heads)
    key, value = (draw(self.num_keys, self.num_kv_heads) for _ in range(2))
    shape = (self.batch, self.num_heads, self.num_queries, self.num_keys)
    allowed = np.ones(shape, bool)
    if self.mask is not None:
      dense = np.asarray(masks.allowed(self.mask, self.num_keys))
      allowed = allowed & (dense[:, None] if dense.ndim == 3 else dense)
    if self.states is not None:
      tiles = self.states > selection.EMPTY
      tiles = tiles.repeat(self.block_q, axis=2).repeat(self.block_kv, axis=3)
      allowed = allowed & tiles[:, :, : self.num_queries, : self.num_keys]
    scale = self.head_dim**-0.5 if self.scale is None else self.scale
    case = oracle.Case(query, key, value, allowed, scale, self.soft_cap)
    return case, draw(self.num_queries, self.num_heads)


def _pad(x, axis, block, fill=0):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, -x.shape[axis] % block)
  return np.pad(x, padding, constant_values=fill)


def arguments_of(case, dtype):
  """Arguments of `backward` without keywords, and the expected gradients."""
  arrays, d_out = case.arrays(dtype)
  found = oracle.attention(arrays)
  d_lse = np.zeros_like(found.lse)
  expected = oracle.gradients(arrays, d_out, d_lse)
  delta = np.einsum("btnh,btnh->bnt", d_out, found.out)
  lse = np.where(np.isneginf(found.lse), np.inf, found.lse)
  mask = case.mask or masks.full(case.num_queries, case.num_keys)
  sizes = (case.num_queries, case.num_keys, case.block_q, case.block_kv)
  states = visits.states_of(mask, *sizes)
  if case.states is not None:
    states = np.where(case.states > selection.EMPTY, states, selection.EMPTY)
  spans = tuple(
      _pad(x if x.ndim == 3 else x[None], -1, case.block_q)
      for x in (mask.starts, mask.stops)
  )
  ids = [None, None]
  if mask.query_ids is not None:
    ids = [
        _pad(x if x.ndim == 2 else x[None], -1, block)
        for x, block in (
            (mask.query_ids, case.block_q),
            (mask.key_ids, case.block_kv),
        )
    ]
  query, d_out = (
      jnp.asarray(_pad(x.swapaxes(1, 2), 2, case.block_q), dtype)
      for x in (arrays.query, d_out)
  )
  key, value = (
      jnp.asarray(_pad(x.swapaxes(1, 2), 2, case.block_kv), dtype)
      for x in (arrays.key, arrays.value)
  )
  statistics = (
      jnp.asarray(_pad(x, -1, case.block_q, fill), jnp.float32)
      for x, fill in ((lse, np.inf), (delta, 0))
  )
  columns = visits.by_key(states)
  arguments = (query, key, value, columns, spans, *ids, *statistics, d_out)
  return arguments, expected


def both_gradients(case, dtype=jnp.float32):
  """(gradients, expected) as {"query": [B, T, N, H], ..}, cut to size."""
  arguments, expected = arguments_of(case, dtype)
  scale = case.head_dim**-0.5 if case.scale is None else case.scale
  # Lists and spans stay known; arrays are traced.
  query, key, value, columns, spans, *ids, lse, delta, d_out = arguments
  call = jax.jit(
      lambda query, key, value, lse, delta, d_out: backward.backward(
          query,
          key,
          value,
          columns,
          spans,
          *ids,
          lse,
          delta,
          d_out,
          scale=scale,
          logits_soft_cap=case.soft_cap,
          block_q=case.block_q,
          block_kv=case.block_kv,
          vmem_limit_bytes=case.limit,
          num_cores=case.num_cores,
      )
  )
  found = call(query, key, value, lse, delta, d_out)
  lengths = (case.num_queries, case.num_keys, case.num_keys)
  found = {
      name: x[:, :, :length].swapaxes(1, 2)
      for name, x, length in zip(
          ("query", "key", "value"), found, lengths, strict=True
      )
  }
  return found, expected


def plan_of(case, dtype=jnp.float32, **cut):
  """The plan of a case; `cut` sets heads and chunk."""
  mask = case.mask or masks.full(case.num_queries, case.num_keys)
  sizes = layout.Sizes(
      case.batch,
      case.num_heads,
      case.num_kv_heads,
      tpu_layout.round_up(case.num_queries, case.block_q),
      tpu_layout.round_up(case.num_keys, case.block_kv),
      case.head_dim,
      jnp.dtype(dtype).itemsize,
  )
  return plan_lib.Plan(
      sizes=sizes,
      tiles=layout.Tiles(case.block_q, case.block_kv),
      num_spans=mask.starts.shape[-2],
      has_ids=mask.query_ids is not None,
      limit=case.limit,
      num_cores=case.num_cores,
      **cut,
  )


def cut_of(case, **cut):
  """The case with VMEM for so many heads and query tiles, and no more."""
  plan = plan_of(case, **cut)
  limit = sum(plan.vmem().values())
  rest = {"num_spans": plan.num_spans, "has_ids": plan.has_ids}
  rest["num_cores"] = case.num_cores
  made = plan_lib.make(plan.sizes, plan.tiles, limit=limit, **rest)
  assert (made.heads, made.chunk) == (cut["heads"], cut["chunk"]), made
  return dataclasses.replace(case, limit=limit)


def _states_of_heads():
  """Tiles of 3 heads: lists of different lengths, a key tile without visits."""
  states = np.random.default_rng(2).integers(0, 2, (1, 3, 3, 3), np.int8)
  states[0, 1, :, 2] = 0
  return 2 * states


GROUP = Case(
    mask=masks.causal(384),
    num_queries=384,
    num_keys=384,
    num_heads=4,
    num_kv_heads=1,
)
CASES = {
    "full": Case(batch=2),
    "group_of_2_causal": Case(
        mask=masks.causal(256), num_heads=4, batch=2, block_q=256
    ),
    "window_ragged": Case(
        mask=masks.sliding_window(200, 333, window=90, offset=133),
        num_queries=200,
        num_keys=333,
    ),
    "streaming": Case(
        mask=masks.streaming(384, window=100, num_sinks=20),
        num_queries=384,
        num_keys=384,
        num_kv_heads=1,
        block_kv=256,
    ),
    "document": Case(
        mask=masks.document(_DOCUMENTS, is_causal=False),
        num_queries=300,
        num_keys=300,
    ),
    "buckets_of_each_sequence": Case(
        mask=masks.hash_sparse(_IDS, _IDS[:, ::-1]),
        batch=2,
        num_queries=300,
        num_keys=300,
    ),
    "soft_cap": Case(mask=masks.causal(256), soft_cap=2.0, scale=1.0),
    "heads_with_lists_of_their_own": Case(
        mask=masks.causal(300),
        states=_states_of_heads(),
        num_heads=3,
        num_kv_heads=1,
        num_queries=300,
        num_keys=300,
    ),
    "chunks_of_2_of_3_tiles": cut_of(GROUP, heads=4, chunk=2),
    "cores_with_sums_of_their_own": cut_of(
        dataclasses.replace(GROUP, num_heads=4, num_cores=2), heads=2, chunk=2
    ),
    "parts_of_1_head": cut_of(
        dataclasses.replace(GROUP, num_kv_heads=2, block_q=384),
        heads=1,
        chunk=1,
    ),
}
# What runs by default: ends, ids, a cap, lists of heads, and cuts in chunks.
LEAD = (
    "window_ragged",
    "buckets_of_each_sequence",
    "soft_cap",
    "heads_with_lists_of_their_own",
    "chunks_of_2_of_3_tiles",
    "cores_with_sums_of_their_own",
)
