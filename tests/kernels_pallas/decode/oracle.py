"""Decode steps in plain Python, slot by slot, and runs of the others.

Written apart from the library's reference: no code is shared with it. A cache
is a list for each sequence and key head, of [key, value, score, pos, votes] or
None.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import interpret
from kernels_pallas.decode import api
from kernels_pallas.decode import shapes
from kernels_pallas.decode import slots as slots_lib
from tests.kernels_pallas import modes

# Scaled by the largest value: a hundred roundings of float32; of bfloat16 two
# roundings of its 8 bits.
ATOL = {"float32": 2e-5, "bfloat16": 2.0**-7}


@dataclasses.dataclass(frozen=True)
class Case:
  """New tokens of T steps: [T, B, N, H], [T, B, K, H] x 2, [T, B]."""

  shape: shapes.Shape
  query: Any
  key: Any
  value: Any
  positions: Any


def draw(shape, num_steps, dtype="float32", seed=0, is_ragged=True) -> Case:
  """Normal tokens; ragged sequences start late and pause."""
  rng = np.random.default_rng(seed)
  normal = lambda n: jnp.asarray(
      rng.standard_normal((num_steps, shape.batch, n, shape.head_dim)),
      jnp.float32,
  ).astype(dtype)
  is_active = rng.random((num_steps, shape.batch)) < 0.9
  is_active &= np.arange(num_steps)[:, None] >= 3 * np.arange(shape.batch)
  is_active |= not is_ragged
  positions = np.where(is_active, np.cumsum(is_active, axis=0) - 1, -1)
  query = normal(shape.num_heads) * 2  # So that some tokens are heavy.
  arrays = (query, normal(shape.num_kv_heads), normal(shape.num_kv_heads))
  return Case(shape, *arrays, positions.astype(np.int32))


def decode(case: Case, **options: Any) -> tuple[Any, Any, Any]:
  """out [T, B, N, H], slots [T, B, K], and the caches after the last step."""
  shape = case.shape
  wide = [np.asarray(x, np.float64) for x in (case.query, case.key, case.value)]
  caches = [
      [[None] * shape.capacity for _ in range(shape.num_kv_heads)]
      for _ in range(shape.batch)
  ]
  out = np.zeros(wide[0].shape)
  slots = np.full((*wide[1].shape[:3],), -1)
  group = shape.num_heads // shape.num_kv_heads
  options = {"scale": shape.head_dim**-0.5} | options
  for t, b in np.ndindex(case.positions.shape):
    if case.positions[t, b] < 0:
      continue
    visits = []
    for k in range(shape.num_kv_heads):
      heads = slice(k * group, (k + 1) * group)
      out[t, b, heads], slots[t, b, k], *visit = _attend(
          caches[b][k],
          wide[0][t, b, heads],
          wide[1][t, b, k],
          wide[2][t, b, k],
          int(case.positions[t, b]),
          **options,
      )
      visits.append(visit)
    of_layer = np.mean(
        [_by_slot(*visit, shape.capacity) for visit in visits], 0
    )
    for cache, visit in zip(caches[b], visits, strict=True):
      _receive(cache, *visit, of_layer=of_layer.mean(axis=0), **options)
  return out, slots, caches


def step(cache, queries, key, value, position, scale=None, **options):
  """One head of one sequence; changes the cache."""
  scale = len(key) ** -0.5 if scale is None else scale
  out, slot, *visit = _attend(
      cache, queries, key, value, position, scale=scale, **options
  )
  _receive(cache, *visit, **options)
  return out, slot


def _attend(
    cache,
    queries,
    key,
    value,
    position,
    *,
    scale,
    num_sinks=0,
    num_recent=0,
    score="sum",
    logits_soft_cap=None,
    window=None,
    **_,
):
  """Writes the token; returns out, slot, weights [G, seen] and the seen."""
  slot = _choose(cache, position, num_sinks, num_recent, score)
  norm = sum(float(x) ** 2 for x in key) ** 0.5
  cache[slot] = [
      key,
      value,
      -norm if score == "key_norm" else 0.0,
      position,
      [],
  ]
  seen = [
      i
      for i, kept in enumerate(cache)
      if kept is not None and (window is None or kept[3] > position - window)
  ]
  keys, values = (np.stack([cache[i][j] for i in seen]) for j in (0, 1))
  logits = scale * queries @ keys.T
  if logits_soft_cap is not None:
    logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
  weights = np.exp(logits - logits.max(axis=1, keepdims=True))
  weights /= weights.sum(axis=1, keepdims=True)
  return weights @ values, slot, weights, seen


def _receive(
    cache,
    weights,
    seen,
    *,
    score="sum",
    decay=1.0,
    gain=1.0,
    reduce="sum",
    history=32,
    of_layer=None,
    **_,
):
  """Scores of what is kept, by the weights that it received."""
  mass = of_layer
  if reduce != "layer":
    mass = getattr(_by_slot(weights, seen, len(cache)), reduce)(axis=0)
  for received, kept in zip(mass, cache, strict=True):
    if kept is None or score in ("position", "key_norm"):
      continue
    if score == "votes":
      kept[4] = [*kept[4], received > 1 / len(seen)][-history:]
      kept[2] = float(sum(kept[4]))
    else:
      kept[2] = decay * kept[2] + gain * received


def _by_slot(weights, seen, capacity):
  """Weights of all slots, 0 where nothing is seen."""
  everywhere = np.zeros((len(weights), capacity))
  everywhere[:, seen] = weights
  return everywhere


def _choose(cache, position, num_sinks, num_recent, score):
  best, least = None, None
  for i, kept in enumerate(cache):
    if kept is None:
      return i
    if kept[3] < num_sinks or kept[3] >= position - num_recent:
      continue
    priority = kept[3] if score == "position" else kept[2]
    if score == "mean":
      priority /= position - kept[3]
    if best is None or priority < least:
      best, least = i, priority
  return best


@functools.partial(jax.jit, static_argnames=("implementation", "options"))
def _run(cache, arrays, implementation, options):
  def visit(cache, x):
    out, cache, slot = api.decode_step(
        *x[:3], cache, x[3], implementation=implementation, **dict(options)
    )
    return cache, (out, slot)

  return jax.lax.scan(visit, cache, arrays)


def run(case, implementation, cache=None, cache_dtype=None, **options):
  """The library on the same: out, slots, and the cache at the end."""
  shape, arrays = case.shape, (case.query, case.key, case.value)
  if cache is None:
    cache = slots_lib.empty(
        shape.batch,
        shape.num_kv_heads,
        shape.capacity,
        shape.head_dim,
        cache_dtype or case.key.dtype,
        options.get("score") == "votes",
    )
  mode = interpret.mode() or modes.is_interpreted(implementation)
  with interpret.interpreted(mode):
    cache, (out, slot) = _run(
        cache, (*arrays, case.positions), implementation, (*options.items(),)
    )
  return out, slot, cache


def check(case, found, expected) -> None:
  """Slots, out, scores and positions."""
  out, slots, cache = found
  wanted_out, wanted_slots, caches = expected
  np.testing.assert_array_equal(slots, wanted_slots)
  dtype = case.query.dtype.name
  assert out.dtype == dtype
  largest = np.abs(np.asarray(case.value, np.float64)).max()
  np.testing.assert_allclose(
      np.asarray(out, np.float64),
      wanted_out,
      atol=ATOL[dtype] * largest,
      rtol=0,
  )
  field = lambda i, empty: np.array([
      [[empty if kept is None else kept[i] for kept in row] for row in rows]
      for rows in caches
  ])
  np.testing.assert_array_equal(cache.pos, field(3, -1))
  score = field(2, 0.0)
  # Sums of float32 weights, also of bfloat16 tokens.
  largest = max(1.0, score.max())
  np.testing.assert_allclose(
      cache.score, score, atol=ATOL["float32"] * largest, rtol=0
  )
