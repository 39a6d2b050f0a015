import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.experimental import checkify
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from kernels_pallas.decode import shapes
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.decode.paged import api
from tests.kernels_pallas import modes
from tests.kernels_pallas.decode import oracle

_PAGE = 16
_SHAPE = shapes.Shape(
    batch=2, num_heads=4, num_kv_heads=2, capacity=3 * _PAGE, head_dim=8
)
# Budgets differ between the heads of a sequence.
_NUM_PAGES = np.array([3, 2, 1, 3], np.int32)
_OPTIONS = {"num_sinks": 2, "num_recent": 6}
# Granularity and score.
_VARIANTS = (("token", "sum"), ("page", "sum"), ("page", "mean"))


def _pool(num_pages=11, dtype=jnp.float32):
  pool = slots_lib.empty(1, num_pages, _PAGE, _SHAPE.head_dim, dtype)
  return jax.tree.map(lambda x: x[0], pool)


def _table():
  order = np.random.default_rng(0).permutation(11)[:9]
  table = np.full((4, 3), 10**6, np.int32)
  table[np.arange(3) < _NUM_PAGES[:, None]] = order
  return table


@functools.partial(
    jax.jit, static_argnames=("implementation", "granularity", "score")
)
def _run(arrays, pool, implementation, granularity, score):
  def visit(pool, x):
    out, pool, slot = api.decode_step(
        *x[:3],
        pool,
        jnp.asarray(_table()),
        jnp.asarray(_NUM_PAGES),
        x[3],
        granularity=granularity,
        implementation=implementation,
        score=score,
        **_OPTIONS,
    )
    return pool, (out, slot)

  return jax.lax.scan(visit, pool, arrays)


def _free_a_page(cache, position, score):
  """What `granularity="page"` adds to the oracle; the slot, or None."""
  if None in cache:
    return None
  best, least = None, None
  for first in range(0, len(cache), _PAGE):
    page = cache[first : first + _PAGE]
    if any(
        x[3] < _OPTIONS["num_sinks"]
        or x[3] >= position - _OPTIONS["num_recent"]
        for x in page
    ):
      continue
    total = sum(
        x[2] / (position - x[3] if score == "mean" else 1) for x in page
    )
    if best is None or total < least:
      best, least = first, total
  if best is not None:
    cache[best : best + _PAGE] = [None] * _PAGE
  return best


def _expected(case, granularity, score):
  """Out [T, B, N, H], slots, and caches as lists, row by row."""
  caches = [[None] * (_PAGE * n) for n in _NUM_PAGES]
  out = np.zeros(case.query.shape)
  slots = np.full(case.key.shape[:3], -1)
  for t, b, k in np.ndindex(slots.shape):
    position, cache = int(case.positions[t, b]), caches[2 * b + k]
    if position < 0:
      continue
    if granularity == "page":
      freed = _free_a_page(cache, position, score)
      # The first slot of the page is the first empty one.
      assert freed is None or cache.index(None) == freed
    heads = slice(2 * k, 2 * k + 2)
    out[t, b, heads], slots[t, b, k] = oracle.step(
        cache,
        np.float64(case.query[t, b, heads]),
        np.float64(case.key[t, b, k]),
        np.float64(case.value[t, b, k]),
        position,
        score=score,
        **_OPTIONS,
    )
  return out, slots, caches


class PagedTest(parameterized.TestCase):

  @parameterized.product(implementation=("reference", "xla"), variant=_VARIANTS)
  @pytest.mark.by_default(1)
  def test_equals_plain_python(self, implementation, variant):
    self._check(implementation, variant)

  @pytest.mark.slow
  def test_pallas_tpu_equals_plain_python(self):
    self._check("pallas_tpu", ("page", "mean"))

  @parameterized.parameters(*_VARIANTS[:-1])
  @pytest.mark.slow
  def test_other_variants_of_pallas_tpu_equal_plain_python(self, *variant):
    self._check("pallas_tpu", variant)

  def _check(self, implementation, variant):
    case = oracle.draw(_SHAPE, 150)
    arrays = (case.query, case.key, case.value, case.positions)
    with modes.mode_of(implementation):
      pool, (out, slot) = _run(arrays, _pool(), implementation, *variant)
    expected_out, expected_slot, caches = _expected(case, *variant)
    np.testing.assert_array_equal(slot, expected_slot)
    largest = np.abs(case.value).max()
    np.testing.assert_allclose(out, expected_out, atol=2e-5 * largest)
    table = _table()
    for r, cache in enumerate(caches):
      pages = table[r, : _NUM_PAGES[r]]
      pos = [-1 if kept is None else kept[3] for kept in cache]
      np.testing.assert_array_equal(pool.pos[pages].ravel(), pos)
      score = np.array([0 if kept is None else kept[2] for kept in cache])
      np.testing.assert_allclose(
          pool.score[pages].ravel(), score, atol=2e-5 * score.max()
      )
    unused = np.setdiff1d(np.arange(11), table)
    np.testing.assert_array_equal(pool.pos[unused], -1)
    np.testing.assert_array_equal(pool.key[unused], 0)

  @pytest.mark.slow
  def test_int8_equals_the_reference(self):
    case = oracle.draw(_SHAPE, 60)
    arrays = (case.query, case.key, case.value, case.positions)
    one, two = (
        _run(arrays, _pool(dtype=jnp.int8), name, "token", "sum")
        for name in ("reference", "xla")
    )
    np.testing.assert_array_equal(one[1][1], two[1][1])
    np.testing.assert_array_equal(one[0].key, two[0].key)
    np.testing.assert_allclose(one[1][0], two[1][0], atol=1e-4)

  def test_keys_and_values_of_a_donated_pool_stay_in_place(self):
    pool = jax.tree.map(
        lambda x: jnp.zeros((2048, *x.shape[1:]), x.dtype), _pool()
    )
    vectors = [jnp.ones((2, n, 8)) for n in (4, 2, 2)]
    step = jax.jit(api.decode_step, donate_argnums=3)
    memory = (
        step.lower(
            *vectors,
            pool,
            jnp.asarray(_table()),
            jnp.asarray(_NUM_PAGES),
            jnp.zeros(2, jnp.int32),
        )
        .compile()
        .memory_analysis()
    )
    total = sum(x.nbytes for x in jax.tree.leaves(pool))
    self.assertEqual(memory.alias_size_in_bytes, total)
    # Rows are a 300th of the pool; scores and positions may be copied.
    self.assertLess(memory.temp_size_in_bytes, pool.key.nbytes // 2)


class WrongCallTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    jaxtyping.config.update("jaxtyping_disable", True)
    self.addCleanup(jaxtyping.config.update, "jaxtyping_disable", False)
    self.arguments = {
        "query": jnp.ones((2, 4, 8)),
        "key": jnp.ones((2, 2, 8)),
        "value": jnp.ones((2, 2, 8)),
        "pool": _pool(),
        "page_table": jnp.asarray(_table()),
        "num_pages": jnp.asarray(_NUM_PAGES),
        "positions": jnp.zeros(2, jnp.int32),
    }

  @parameterized.named_parameters(
      ("pool", {"pool": slots_lib.empty(2, 2, 16, 8)}, "pos .pages, page_size"),
      (
          "size",
          {"pool": jax.tree.map(lambda x: x[:, :8], _pool())},
          "pages of 8 slots; page_size must be at least 16",
      ),
      ("rows", {"page_table": jnp.zeros((3, 3), jnp.int32)}, r"\(4, 3\)"),
      ("num", {"num_pages": jnp.ones(4)}, "num_pages is float32"),
      ("granularity", {"granularity": "block"}, "one of token, page"),
      ("protected", {"num_recent": 48}, "of 48 slots of a row at most 47"),
      ("gpu", {"implementation": "pallas_gpu"}, "not there for pages"),
      ("tpu", {"implementation": "pallas_tpu"}, "needs a TPU"),
  )
  def test_says_what_would_be_right(self, changed, message):
    with self.assertRaisesRegex(ValueError, message):
      api.decode_step(**self.arguments | changed)

  @parameterized.parameters(
      ({}, None),
      ({"page_table": 11}, "pages from 0 to 11; the pool has 0 to 10"),
      ({"num_pages": 0}, "from 1 to 3, .* found 0 to 0"),
      ({"num_recent": 20}, "protects 20 tokens, .* at most 15 may"),
  )
  @pytest.mark.by_default(0)
  def test_debug_mode_finds_what_is_out_of_range(self, changed, message):
    options = {}
    for name, number in changed.items():
      if name in self.arguments:
        array = self.arguments[name]
        self.arguments[name] = jnp.full(array.shape, number, jnp.int32)
      else:
        options[name] = number
    step = functools.partial(api.decode_step, **options)
    error, _ = jax.jit(checkify.checkify(step))(**self.arguments)
    if message is None:
      self.assertIsNone(error.get())
    else:
      self.assertRegex(error.get(), message)


if __name__ == "__main__":
  absltest.main()
