import dataclasses
import functools
from typing import Any

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import interpret
from kernels_pallas import masks
from kernels_pallas import selection
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import topology
from kernels_pallas.attention import visits
from kernels_pallas.attention.tpu import backward
from kernels_pallas.attention.tpu import backward_plan as plan_lib
from kernels_pallas.attention.tpu import layout
from kernels_pallas.hardware import tpu_layout
from tests.kernels_pallas import oracle

_MIB = 1 << 20
# Ten times the error of float32 products of 400 terms, of values of size 1; and
# twice the rounding of one bfloat16 operand.
_ATOL = {jnp.float32: 4e-5, jnp.bfloat16: 2 * 2.0**-7}
_LARGE = 2 << 30
_BLOCKS = {"block_q": 128, "block_kv": 128}
_IDS = np.random.default_rng(1).integers(0, 3, (2, 300)).astype(np.int32)
_DOCUMENTS = np.repeat(np.arange(4), (140, 30, 100, 30))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Case:
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


def _arguments(case, dtype):
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


def _backward(case, dtype=jnp.float32):
  """(gradients, expected) as {"query": [B, T, N, H], ..}, cut to size."""
  arguments, expected = _arguments(case, dtype)
  scale = case.head_dim**-0.5 if case.scale is None else case.scale
  found = backward.backward(
      *arguments,
      scale=scale,
      logits_soft_cap=case.soft_cap,
      block_q=case.block_q,
      block_kv=case.block_kv,
      vmem_limit_bytes=case.limit,
  )
  lengths = (case.num_queries, case.num_keys, case.num_keys)
  found = {
      name: x[:, :, :length].swapaxes(1, 2)
      for name, x, length in zip(
          ("query", "key", "value"), found, lengths, strict=True
      )
  }
  return found, expected


def _plan(case, dtype=jnp.float32, **cut):
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
      **cut,
  )


def _cut(case, **cut):
  """The case with VMEM for so many heads and query tiles, and no more."""
  plan = _plan(case, **cut)
  limit = sum(plan.vmem().values())
  rest = {"num_spans": plan.num_spans, "has_ids": plan.has_ids}
  made = plan_lib.make(plan.sizes, plan.tiles, limit=limit, **rest)
  assert (made.heads, made.chunk) == (cut["heads"], cut["chunk"]), made
  return dataclasses.replace(case, limit=limit)


def _states_of_heads():
  """Tiles of 3 heads: lists of different lengths, a key tile without visits."""
  states = np.random.default_rng(2).integers(0, 2, (1, 3, 3, 3), np.int8)
  states[0, 1, :, 2] = 0
  return 2 * states


_GROUP = _Case(
    mask=masks.causal(384),
    num_queries=384,
    num_keys=384,
    num_heads=4,
    num_kv_heads=1,
)
_CASES = {
    "full": _Case(batch=2),
    "group_of_2_causal": _Case(
        mask=masks.causal(256), num_heads=4, batch=2, block_q=256
    ),
    "window_ragged": _Case(
        mask=masks.sliding_window(200, 333, window=90, offset=133),
        num_queries=200,
        num_keys=333,
    ),
    "streaming": _Case(
        mask=masks.streaming(384, window=100, num_sinks=20),
        num_queries=384,
        num_keys=384,
        num_kv_heads=1,
        block_kv=256,
    ),
    "document": _Case(
        mask=masks.document(_DOCUMENTS, is_causal=False),
        num_queries=300,
        num_keys=300,
    ),
    "buckets_of_each_sequence": _Case(
        mask=masks.hash_sparse(_IDS, _IDS[:, ::-1]),
        batch=2,
        num_queries=300,
        num_keys=300,
    ),
    "soft_cap": _Case(mask=masks.causal(256), soft_cap=2.0, scale=1.0),
    "heads_with_lists_of_their_own": _Case(
        mask=masks.causal(300),
        states=_states_of_heads(),
        num_heads=3,
        num_kv_heads=1,
        num_queries=300,
        num_keys=300,
    ),
    "chunks_of_2_of_3_tiles": _cut(_GROUP, heads=4, chunk=2),
    "parts_of_1_head": _cut(
        dataclasses.replace(_GROUP, num_kv_heads=2, block_q=384),
        heads=1,
        chunk=1,
    ),
}


class BackwardTest(parameterized.TestCase):

  def _check(self, case, dtype=jnp.float32):
    with interpret.interpreted():
      found, expected = _backward(case, dtype)
    for name, value in found.items():
      chex.assert_type(value, dtype)
      size = np.abs(expected[name]).max()
      np.testing.assert_allclose(
          np.asarray(value, np.float64),
          expected[name],
          rtol=0,
          atol=_ATOL[dtype] * size,
          err_msg=name,
      )
    return found

  @parameterized.named_parameters(_CASES.items())
  def test_gradients_are_those_of_attention(self, case):
    self._check(case)

  def test_bfloat16_gradients_are_those_of_rounded_inputs(self):
    self._check(_GROUP, jnp.bfloat16)

  def test_parts_of_bfloat16_are_added_in_float32(self):
    case = dataclasses.replace(_GROUP, block_kv=384)
    plan = _plan(case, jnp.bfloat16, heads=4, chunk=1)
    cut = dataclasses.replace(case, limit=sum(plan.vmem().values()))
    with interpret.interpreted():
      whole, _ = _backward(case, jnp.bfloat16)
      parts, _ = _backward(cut, jnp.bfloat16)
    # The same sums in another order, in float32: few roundings may differ.
    for name in whole:
      differs = np.asarray(whole[name] != parts[name])
      self.assertLess(differs.mean(), 1e-3, name)

  def test_what_meets_nothing_has_gradient_0(self):
    # Queries 128.. see no key; keys 60.. are seen by none.
    stops = np.where(np.arange(256) < 128, 60, 0)[None].astype(np.int32)
    case = _Case(mask=masks.Mask(np.zeros_like(stops), stops))
    found = self._check(case)
    np.testing.assert_array_equal(found["query"][:, 128:], 0.0)
    np.testing.assert_array_equal(found["key"][:, 60:], 0.0)
    np.testing.assert_array_equal(found["value"][:, 60:], 0.0)
    for value in found.values():
      self.assertGreater(np.abs(value).max(), 0.1)

  def test_logits_of_ten_thousand_leave_no_nan(self):
    # Later keys have larger logits: exp of the forbidden ones overflows.
    case = _Case(mask=masks.causal(256), scale=1.0)
    arguments, _ = _arguments(case, jnp.float32)
    query, key, *rest = arguments
    ramp = jnp.linspace(-1e4, 1e4, 256).reshape(1, 1, 256, 1)
    query = jnp.zeros_like(query).at[..., :1].set(1.0)
    key = jnp.zeros_like(key).at[..., :1].set(ramp)
    # Causal, and 78 more a key: every query attends to its own key alone.
    rest[-3] = jnp.broadcast_to(ramp[..., 0], rest[-3].shape)
    rest[-2] = jnp.einsum("BNTH,BNTH->BNT", rest[-1], rest[0])
    with interpret.interpreted():
      d_query, d_key, d_value = backward.backward(
          query, key, *rest, scale=1.0, logits_soft_cap=None, **_BLOCKS
      )
    chex.assert_trees_all_close(d_value, rest[-1], atol=1e-5)
    for gradient in (d_query, d_key):
      # dP - delta = 0 but for the rounding of its 32 products.
      chex.assert_trees_all_close(
          gradient / 1e4, jnp.zeros_like(gradient), atol=1e-5
      )

  def test_lists_made_by_jax_are_lists_made_by_numpy(self):
    arguments, _ = _arguments(_CASES["chunks_of_2_of_3_tiles"], jnp.float32)
    call = functools.partial(
        backward.backward,
        scale=0.2,
        logits_soft_cap=None,
        vmem_limit_bytes=_CASES["chunks_of_2_of_3_tiles"].limit,
        **_BLOCKS,
    )
    traced = jax.tree.map(jnp.asarray, arguments)
    with interpret.interpreted():
      chex.assert_trees_all_equal(call(*arguments), jax.jit(call)(*traced))

  def test_only_listed_tiles_are_visited(self):
    # A FULL tile that is not listed counts as forbidden.
    arguments, _ = _arguments(_Case(), jnp.float32)
    none = visits.by_key(np.zeros((1, 1, 2, 2), np.int8))
    arguments = (*arguments[:3], none, *arguments[4:])
    with interpret.interpreted():
      found = backward.backward(
          *arguments, scale=0.2, logits_soft_cap=None, **_BLOCKS
      )
    chex.assert_trees_all_equal(found, jax.tree.map(jnp.zeros_like, found))

  def test_memory_of_a_tpu_is_used_without_races(self):
    # 9 steps on 2 cores: one of them would begin within a chunk.
    case = dataclasses.replace(
        _GROUP,
        mask=masks.streaming(384, window=100, num_sinks=20),
        num_heads=1,
    )
    case = _cut(case, heads=1, chunk=1)
    mode = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    try:
      with interpret.interpreted(mode):
        found, expected = _backward(case)
        self.assertFalse(interpret_pallas_call.races.races_found)
    finally:
      pltpu.reset_tpu_interpret_mode_state()
    for name, value in found.items():
      np.testing.assert_allclose(value, expected[name], rtol=0, atol=4e-5)


class PlanTest(parameterized.TestCase):

  def test_parts_are_as_few_as_fit_and_chunks_are_even(self):
    # 9 tiles of which 4 would fit: 3 chunks, of 3 rather than 4, 4 and 1.
    case = dataclasses.replace(_GROUP, num_queries=9 * 128, num_kv_heads=4)
    limit = sum(_plan(case, heads=1, chunk=5).vmem().values()) - 1
    plan = _plan(case, heads=1, chunk=9)
    rest = {"num_spans": 1, "has_ids": False, "limit": limit}
    plan = plan_lib.make(plan.sizes, plan.tiles, **rest)
    self.assertEqual((plan.heads, plan.chunk, plan.num_parts), (1, 3, 3))

  def test_tiles_that_do_not_fit_are_refused_with_the_arithmetic(self):
    case = dataclasses.replace(_Case(), limit=_MIB)
    with self.assertRaisesRegex(
        ValueError,
        r"128 queries and 128 keys with head_dim=32 take 1\.\d\d MiB of VMEM .*"
        r" for a tile of logits.* of which 1\.00 MiB may be taken",
    ):
      _backward(case)

  def test_tiles_that_are_no_multiple_of_lanes_are_refused(self):
    with self.assertRaisesRegex(ValueError, "block_q=64 must be a multiple"):
      _backward(_Case(block_q=64))

  def test_cost_is_that_of_visited_tiles(self):
    case = _GROUP
    plan = _plan(case, jnp.bfloat16, heads=4, chunk=3)
    columns = visits.by_key(visits.states_of(case.mask, 384, 384, 128, 128))
    cost = plan_lib.cost(plan, columns)
    # By hand: 6 of the 9 tiles of 4 heads; 5 products of 2 * 32 FLOPs.
    self.assertEqual(cost.transcendentals, 4 * 6 * 128 * 128)
    self.assertEqual(cost.flops, 5 * 2 * 32 * 4 * 6 * 128 * 128)
    # Q, dO, dQ of 4 heads; K, V, dK, dV of one; lse and delta in float32.
    queries, keys = 4 * 384 * 32 * 2, 384 * 32 * 2
    self.assertEqual(
        cost.bytes_accessed, 3 * queries + 4 * keys + 2 * 4 * 384 * 4
    )
    traced = jax.tree.map(jnp.asarray, columns)
    self.assertEqual(
        plan_lib.cost(plan, traced).transcendentals, 4 * 9 * 128 * 128
    )


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileTest(parameterized.TestCase):

  @parameterized.parameters("v4", "v5e", "v5p", "v6e", "v7x")
  @pytest.mark.by_default(1)
  def test_every_chip_takes_what_the_plan_calls_fitting(self, chip):
    # As many queries as the plan puts into 15/16 of the smaller memories.
    self._compile(chip, _Case(mask=masks.causal(32_768), head_dim=128))

  @parameterized.named_parameters(
      ("float32", _Case(num_heads=1, num_kv_heads=1), jnp.float32),
      ("head_dim_64", _Case(head_dim=64, num_heads=8), jnp.bfloat16),
      ("head_dim_256", _Case(head_dim=256), jnp.bfloat16),
      (
          "ids_and_2_spans",
          _Case(
              mask=dataclasses.replace(
                  masks.streaming(4096, window=700, num_sinks=9),
                  query_ids=np.zeros(4096, np.int32),
                  key_ids=np.zeros(4096, np.int32),
              ),
              soft_cap=30.0,
          ),
          jnp.bfloat16,
      ),
  )
  def test_the_smallest_memory_takes(self, case, dtype):
    case = dataclasses.replace(case, head_dim=max(case.head_dim, 64))
    self._compile("v4", case, dtype)

  def _compile(self, chip, case, dtype=jnp.bfloat16):
    length = 4096 if case.mask is None else case.mask.starts.shape[-1]
    mask = case.mask or masks.full(length, length)
    blocks = {"block_q": 512, "block_kv": 512}
    columns = visits.by_key(visits.states_of(mask, length, length, 512, 512))
    heads = (case.num_heads, case.num_kv_heads)
    query, key = (
        jax.ShapeDtypeStruct((2, n, length, case.head_dim), dtype)
        for n in heads
    )
    lse = jax.ShapeDtypeStruct((2, heads[0], length), jnp.float32)

    def call(query, key, value, lse, delta, d_out):
      ids = (
          x if x is None else x[None] for x in (mask.query_ids, mask.key_ids)
      )
      return backward.backward(
          query,
          key,
          value,
          columns,
          (mask.starts[None], mask.stops[None]),
          *ids,
          lse,
          delta,
          d_out,
          scale=0.1,
          logits_soft_cap=case.soft_cap,
          **blocks,
      )

    compiled = compile_lib.compile_for(
        chip, call, query, key, key, lse, lse, query
    )
    self.assertEqual(compiled.num_custom_calls, 1)
    (name,) = compiled.scoped_vmem_bytes
    self.assertIn("attention_backward", name)


if __name__ == "__main__":
  absltest.main()
