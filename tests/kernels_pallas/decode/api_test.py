import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.experimental import checkify
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas.attention import api as attention_api
from kernels_pallas.decode import api
from kernels_pallas.decode import shapes
from kernels_pallas.decode import slots as slots_lib
from tests.kernels_pallas.decode import oracle

_IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")
_PROTECTED = {"num_sinks": 2, "num_recent": 5}
_OPTIONS = {
    "plain": {},
    "h2o": _PROTECTED,
    "mean": _PROTECTED | {"score": "mean", "reduce": "max", "scale": -0.4},
    "ema": {
        "score": "ema",
        "decay": 0.9,
        "num_recent": 3,
        "logits_soft_cap": 2.0,
        "window": 20,
    },
}
# As policies of a cache use them: StreamingLLM, Knorm, TOVA, SnapKV after its
# prompt, and Scissorhands with a short memory and a window.
_POLICIES = {
    "streaming": {"score": "position", "num_sinks": 2},
    "knorm": _PROTECTED | {"score": "key_norm"},
    "tova": {"score": "ema", "decay": 0.0, "reduce": "layer"},
    "snapkv": (
        _PROTECTED
        | {"score": "ema", "decay": 0.75, "gain": 0.25, "reduce": "mean"}
    ),
    "scissorhands": (
        _PROTECTED
        | {"score": "votes", "history": 7, "reduce": "mean", "window": 40}
    ),
}
_CASES = (
    ("gqa", "float32", "h2o"),
    ("mha", "float32", "mean"),
    ("gqa", "bfloat16", "ema"),
)
_SLOW_CASES = tuple(
    (shape, dtype, options)
    for shape in shapes.TESTS
    for dtype in ("float32", "bfloat16")
    for options in _OPTIONS
    if (shape, dtype, options) not in _CASES[1:]
)


@functools.cache
def _expected(shape, dtype, options):
  shape = shapes.TESTS[shape]
  case = oracle.draw(shape, 2 * shape.capacity, dtype)
  return case, oracle.decode(case, **(_OPTIONS | _POLICIES)[options])


def _run_case(implementation, shape, dtype, options):
  case, expected = _expected(shape, dtype, options)
  found = oracle.run(case, implementation, **(_OPTIONS | _POLICIES)[options])
  oracle.check(case, found, expected)
  again = oracle.run(case, implementation, **(_OPTIONS | _POLICIES)[options])
  jax.tree.map(np.testing.assert_array_equal, found, again)


class OracleTest(absltest.TestCase):
  """The oracle itself, on what can be computed by hand."""

  def test_three_tokens_in_two_slots(self):
    cache, one = [None, None], np.ones(1)
    half = lambda key: np.array([[key]])
    out, slot = oracle.step(cache, one[None], 0 * one, 4 * one, 0)
    self.assertEqual((out.item(), slot, cache[0][2]), (4, 0, 1))
    # Equal logits: a half each.
    out, slot = oracle.step(cache, one[None], 0 * one, 8 * one, 1)
    self.assertEqual((out.item(), slot), (6, 1))
    self.assertEqual([kept[2] for kept in cache], [1.5, 0.5])
    # The second has received less, and goes; logits 0 and log 3.
    out, slot = oracle.step(cache, half(np.log(3)), one, 0 * one, 2)
    self.assertEqual(slot, 1)
    self.assertAlmostEqual(out.item(), 1)  # A quarter of 4.
    np.testing.assert_allclose([kept[2] for kept in cache], [1.75, 0.75])
    # By steps since: 1.75 / 3 and 0.75 / 1. The first goes, if it may.
    _, slot = oracle.step(list(cache), one[None], one, one, 3, score="mean")
    self.assertEqual(slot, 0)
    _, slot = oracle.step(
        list(cache), one[None], one, one, 3, score="mean", num_sinks=1
    )
    self.assertEqual(slot, 1)


class HeavyHitterDecodeTest(parameterized.TestCase):

  # Interpreted, the TPU's kernel takes seconds to compile: a case more is slow.
  @parameterized.parameters(
      *((name, *case) for name in ("reference", "xla") for case in _CASES),
      *(("pallas_tpu", *case) for case in _CASES[1:]),
  )
  @pytest.mark.by_default(1)
  def test_equals_the_oracle(self, implementation, *case):
    _run_case(implementation, *case)

  # The rules of tova and scissorhands are the widest for the TPU's kernel.
  @parameterized.product(
      implementation=("reference", "xla", "pallas_tpu"), policy=[*_POLICIES]
  )
  @pytest.mark.by_default(0, 1)
  def test_rules_of_policies_equal_the_oracle(self, implementation, policy):
    _run_case(implementation, "gqa", "float32", policy)

  @parameterized.parameters("xla", "pallas_tpu")
  @pytest.mark.slow
  def test_int8_equals_the_reference(self, implementation):
    shape = shapes.TESTS["gqa"]
    case = oracle.draw(shape, 80)
    options = {"cache_dtype": jnp.int8} | _OPTIONS["h2o"]
    out, slot, cache = oracle.run(case, "reference", **options)
    found = oracle.run(case, implementation, **options)
    np.testing.assert_array_equal(found[1], slot)
    np.testing.assert_allclose(found[0], out, atol=1e-4)
    np.testing.assert_array_equal(found[2].key, cache.key)
    np.testing.assert_array_equal(found[2].value, cache.value)
    np.testing.assert_allclose(found[2].key_scale, cache.key_scale, rtol=1e-6)
    np.testing.assert_allclose(found[2].score, cache.score, atol=1e-3)

  @parameterized.parameters("reference", "xla")
  @pytest.mark.by_default(1)
  def test_a_cache_may_be_narrower_than_the_query(self, implementation):
    case = oracle.draw(shapes.TESTS["mha"], 40)
    rounded = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    narrow = oracle.Case(
        case.shape,
        case.query,
        rounded(case.key),
        rounded(case.value),
        case.positions,
    )
    expected = oracle.decode(narrow, **_OPTIONS["h2o"])
    found = oracle.run(
        case, implementation, cache_dtype=jnp.bfloat16, **_OPTIONS["h2o"]
    )
    oracle.check(case, found, expected)

  @parameterized.parameters("reference", "xla")
  @pytest.mark.by_default(1)
  def test_room_for_all_is_causal_attention(self, implementation):
    shape = shapes.TESTS["gqa"]
    case = oracle.draw(shape, shape.capacity, is_ragged=False)
    out, _, _ = oracle.run(case, implementation)
    turn = lambda x: jnp.moveaxis(x, 0, 1)
    whole = attention_api.attention(
        turn(case.query),
        turn(case.key),
        turn(case.value),
        where=masks.causal(shape.capacity),
        implementation="reference",
    ).out
    np.testing.assert_allclose(turn(out), whole, atol=1e-4)

  @parameterized.parameters("reference", "xla")
  @pytest.mark.by_default(1)
  def test_inactive_sequences_stay_as_they_are(self, implementation):
    shape = shapes.TESTS["gqa"]
    case = oracle.draw(shape, 70)
    _, _, cache = oracle.run(case, implementation, **_OPTIONS["ema"])
    one = oracle.draw(shape, 1)
    one.positions[:] = [[-1, 100]]
    kept = jax.tree.map(np.array, cache)
    out, slot, after = oracle.run(one, implementation, cache, **_OPTIONS["ema"])
    self.assertTrue((slot[0, 0] == -1).all() and (slot[0, 1] >= 0).all())
    np.testing.assert_array_equal(out[0, 0], 0)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x[0], y[0]), kept, after
    )
    self.assertTrue((kept.score[1] != after.score[1]).any())

  @pytest.mark.slow
  def test_2000_steps_choose_as_plain_python(self):
    shape = shapes.Shape(
        batch=2, num_heads=4, num_kv_heads=1, capacity=24, head_dim=8
    )
    case = oracle.draw(shape, 2000)
    expected = oracle.decode(case, **_PROTECTED)
    found = oracle.run(case, "xla", **_PROTECTED)
    oracle.check(case, found, expected)

  def test_protected_tokens_stay(self):
    shape = shapes.TESTS["mha"]
    case = oracle.draw(shape, 90, is_ragged=False)
    _, _, cache = oracle.run(case, "xla", num_sinks=4, num_recent=10)
    for row in np.asarray(cache.pos).reshape(-1, shape.capacity):
      self.assertContainsSubset([*range(4), *range(79, 90)], row.tolist())


@pytest.mark.slow
class EveryCombinationTest(parameterized.TestCase):

  @parameterized.product(implementation=_IMPLEMENTATIONS, case=_SLOW_CASES)
  def test_equals_the_oracle(self, implementation, case):
    _run_case(implementation, *case)

  @parameterized.product(
      implementation=_IMPLEMENTATIONS, options=tuple(_OPTIONS), num_heads=(2, 8)
  )
  def test_2000_steps_choose_as_plain_python(
      self, implementation, options, num_heads
  ):
    shape = shapes.Shape(
        batch=3, num_heads=num_heads, num_kv_heads=2, capacity=32, head_dim=16
    )
    case = oracle.draw(shape, 2000, seed=1)
    expected = oracle.decode(case, **_OPTIONS[options])
    found = oracle.run(case, implementation, **_OPTIONS[options])
    oracle.check(case, found, expected)


def _arguments(**changed):
  """Of a call with shapes, or values, changed."""
  dims = {"query": (1, 4, 8), "key": (1, 2, 8), "value": (1, 2, 8)}
  arguments = {
      "cache": slots_lib.empty(1, 2, 16, 8),
      "positions": jnp.zeros(1, jnp.int32),
  }
  return {
      name: jnp.ones(x) if isinstance(x, tuple) else x
      for name, x in (dims | arguments | changed).items()
  }


def _cache(**changed):
  cache = vars(slots_lib.empty(1, 2, 16, 8))
  return slots_lib.Slots(**cache | changed)


class WrongCallTest(parameterized.TestCase):

  def setUp(self):
    # What users see: shapes are not checked by annotations outside tests.
    super().setUp()
    jaxtyping.config.update("jaxtyping_disable", True)
    self.addCleanup(jaxtyping.config.update, "jaxtyping_disable", False)

  @parameterized.named_parameters(
      ("heads", {"query": (1, 5, 8)}, "5 query heads must be a multiple of"),
      ("axes", {"query": (1, 1, 4, 8)}, "in a step it must have 3 axes"),
      ("batch", {"query": (2, 4, 8)}, "must have equal first"),
      ("type", {"query": jnp.ones((1, 4, 8), jnp.int32)}, "a float type"),
      ("cache", {"cache": (1, 2, 16, 8)}, "cache is a .*slots.Slots"),
      ("slots", {"cache": slots_lib.empty(2, 2, 16, 8)}, r"be \[1, 2, slots\]"),
      (
          "head_dim",
          {"cache": slots_lib.empty(1, 2, 16, 4)},
          r"cache.key is float32 \(1, 2, 16, 4\); it must be .*16, 8\)",
      ),
      (
          "score",
          {"cache": _cache(score=jnp.zeros((1, 2, 16), jnp.bfloat16))},
          "cache.score is bfloat16 .* must be float32",
      ),
      (
          "pos",
          {"cache": _cache(pos=jnp.zeros((1, 2, 16)))},
          "cache.pos is float32 .* must be an int32 array",
      ),
      (
          "scales",
          {"cache": _cache(key_scale=jnp.zeros((1, 2, 16)))},
          "key_scale is for int8; with float32 it must be None",
      ),
      (
          "no_scales",
          {
              "cache": _cache(
                  key=jnp.zeros((1, 2, 16, 8), jnp.int8),
                  value=jnp.zeros((1, 2, 16, 8), jnp.int8),
              )
          },
          "key_scale is NoneType .* must be float32",
      ),
      ("positions", {"positions": jnp.zeros(1)}, "positions is float32"),
      ("sizes", {"positions": jnp.zeros(2, jnp.int32)}, r"of shape \(1,\)"),
      (
          "protected",
          {"num_sinks": 4, "num_recent": 12},
          "protect 16 tokens, but of 16 slots at most 15",
      ),
      ("sinks", {"num_sinks": -1}, "num_sinks=-1 must be at least 0"),
      ("recent", {"num_recent": 0.5}, "num_recent=0.5 must be an integer"),
      ("window", {"window": 0}, "window=0 must be at least 1"),
      ("rule", {"score": "max"}, "must be one of sum, mean, ema"),
      ("reduce", {"reduce": "min"}, "must be one of sum, max, mean, layer"),
      ("decay", {"decay": -0.1}, "decay=-0.1 must be from 0 to 1"),
      ("gain", {"gain": 0.0}, "gain=0.0 must be positive"),
      ("history", {"history": 33}, "history=33 must be at most 32"),
      ("no_votes", {"score": "votes"}, "a cache with no votes"),
      (
          "votes",
          {"cache": slots_lib.empty(1, 2, 16, 8, has_votes=True)},
          "score='sum' and a cache with votes",
      ),
      ("cap", {"logits_soft_cap": -1.0}, "must be positive"),
      ("scale", {"scale": float("nan")}, "scale=nan must be finite"),
      ("unknown", {"implementation": "cuda"}, "'cuda' is unknown"),
      ("tpu", {"implementation": "pallas_tpu"}, "needs a TPU"),
      ("gpu", {"implementation": "pallas_gpu"}, "needs a GPU"),
      ("config", {"config": 64}, "not for implementation='xla'"),
  )
  def test_says_what_would_be_right(self, changed, message):
    with self.assertRaisesRegex(ValueError, message):
      api.decode_step(**_arguments(**changed))


class DebugTest(parameterized.TestCase):
  """What is only known when the program runs, under checkify."""

  @parameterized.parameters(
      (-2, 0, "positions has -2; each must be a position, or -1"),
      (3, 3, "the cache holds position 3, which is not before"),
      (3, 2, None),
      (-1, 9, None),
  )
  @pytest.mark.by_default(0, 1)
  def test_positions(self, position, newest, message):
    arguments = _arguments(
        positions=jnp.full(1, position, jnp.int32),
        cache=_cache(pos=jnp.full((1, 2, 16), newest, jnp.int32)),
    )
    checked = jax.jit(checkify.checkify(api.decode_step))
    error, _ = checked(**arguments)
    if message is None:
      self.assertIsNone(error.get())
    else:
      self.assertRegex(error.get(), message)


if __name__ == "__main__":
  absltest.main()
