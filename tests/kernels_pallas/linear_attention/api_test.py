import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from kernels_pallas.linear_attention import api
from kernels_pallas.linear_attention import pallas_tpu
from kernels_pallas.linear_attention import shapes
from kernels_pallas.linear_attention import xla
from tests import draws
from tests.kernels_pallas import modes
from tests.kernels_pallas.linear_attention import oracle

_IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")
_SMALL = {
    "reference": None,
    "xla": xla.Config(chunk=64),
    "pallas_tpu": pallas_tpu.Config(chunk=128),
}
_CASES = (
    ("ragged_gqa", "float32", "mixed"),
    ("ragged_mqa", "bfloat16", "mixed"),
    ("single", "float32", "slow"),
)
_SLOW_CASES = tuple(
    (shape, dtype, decay)
    for shape in shapes.TESTS
    for dtype in ("float32", "bfloat16")
    for decay in oracle.DECAYS
    if (shape, dtype, decay) not in _CASES
)


def _attend(implementation, **arguments):
  return api.linear_attention(
      **arguments, implementation=implementation, config=_SMALL[implementation]
  )


def _run_case(implementation, shape, dtype, decay):
  case = oracle.draw(shapes.TESTS[shape], dtype, decay)
  call = lambda **arguments: _attend(implementation, **arguments)
  oracle.check(call, case, implementation)


@jax.jit
def _any_attend(arguments):
  return _attend("xla", **arguments, return_state=True)


class OracleTest(absltest.TestCase):
  """The oracle itself, on what can be computed by hand."""

  def test_two_positions(self):
    column = lambda *x: np.array(x, np.float64).reshape(1, -1, 1, 1)
    state = np.full((1, 1, 1, 1), 8.0)
    case = oracle.Case(
        query=column(1, 10),
        key=column(2, 3),
        value=column(5, 7),
        decay=np.array([0.5]),
        initial_state=state,
        d_out=column(0, 1),
        d_state=0 * state,
    )
    # 8 / 2 + 2 * 5 = 14; 14 / 2 + 3 * 7 = 28.
    states, out = oracle.recur(case)
    np.testing.assert_allclose(states.ravel(), [8, 14, 28])
    np.testing.assert_allclose(out.ravel(), [14, 280])
    found = {k: v.ravel() for k, v in oracle.gradients(case).items()}
    # out_1 = 10 (decay^2 8 + decay 2 * 5 + 3 * 7).
    np.testing.assert_allclose(found["query"], [0, 28])
    np.testing.assert_allclose(found["key"], [25, 70])
    np.testing.assert_allclose(found["value"], [10, 30])
    np.testing.assert_allclose(found["decay"], [180])
    np.testing.assert_allclose(found["initial_state"], [2.5])


class LinearAttentionTest(parameterized.TestCase):

  @parameterized.product(implementation=_IMPLEMENTATIONS, case=_CASES)
  @pytest.mark.by_default(0)
  def test_equals_the_oracle(self, implementation, case):
    _run_case(implementation, *case)

  @parameterized.parameters("xla", "pallas_tpu")
  @pytest.mark.by_default(1)
  def test_a_state_continues_its_sequence(self, implementation):
    case = oracle.draw(shapes.TESTS["ragged_mqa"], "float32", "mixed")
    arguments = case.arguments()
    cut = lambda part: {
        name: arguments[name][:, part] for name in ("query", "key", "value")
    }

    @jax.jit
    def run(state, arrays):
      return _attend(
          implementation,
          **arrays,
          decay=case.decay,
          initial_state=state,
          return_state=True,
      )

    state = case.initial_state
    with modes.mode_of(implementation):
      whole = run(state, cut(slice(None)))
      # At the end of a chunk of both: the same sums in the same order.
      first = run(state, cut(slice(128)))
      second = run(first.state, cut(slice(128, None)))
    np.testing.assert_array_equal(whole.state, second.state)
    out = np.concatenate([first.out, second.out], axis=1)
    largest = np.abs(whole.out).max()
    np.testing.assert_allclose(out, whole.out, atol=1e-6 * largest, rtol=0)

  def test_defaults(self):
    arrays = draws.normal(0, 3, 1, 8, 2, 16)
    plain = api.linear_attention(*arrays)
    self.assertIsNone(plain.state)
    explicit = api.linear_attention(
        *arrays,
        decay=jnp.ones(2),
        scale=0.25,
        initial_state=jnp.zeros((1, 2, 16, 16)),
        implementation="xla",
    )
    np.testing.assert_array_equal(plain.out, explicit.out)

  @parameterized.parameters(*_IMPLEMENTATIONS)
  @pytest.mark.by_default(0)
  def test_of_no_position_is_the_state(self, implementation):
    state = jnp.ones((1, 2, 4, 4))
    empty = jnp.zeros((1, 0, 2, 4))
    with modes.mode_of(implementation):
      found = _attend(
          implementation,
          query=empty,
          key=empty,
          value=empty,
          decay=jnp.full(2, 0.5),
          initial_state=state,
          return_state=True,
      )
    self.assertEqual(found.out.shape, empty.shape)
    np.testing.assert_array_equal(found.state, state)

  @pytest.mark.slow
  def test_vanishing_decays_see_only_the_present(self):
    arrays = draws.normal(0, 3, 1, 40, 1, 8)
    for decay in (1e-45, 1e-30):  # The first is below what a CPU can multiply.
      out = api.linear_attention(*arrays, decay=jnp.full(1, decay)).out
      present = (arrays[0] * arrays[1]).sum(-1, keepdims=True) * arrays[2]
      np.testing.assert_allclose(out, present * 8**-0.5, atol=1e-5)

  @hypothesis.given(
      seed=st.integers(0, 2**31 - 1),
      decay=st.lists(st.floats(1e-3, 1), min_size=4, max_size=4),
      size=st.sampled_from((1e-3, 1.0, 30.0)),
  )
  @hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
  def test_any_decays_and_values(self, seed, decay, size):
    case = oracle.draw(shapes.TESTS["ragged_gqa"], "float32", "slow", seed)
    case = dataclasses.replace(
        case,
        query=size * case.query,
        value=size * case.value,
        decay=jnp.asarray(decay, jnp.float32),
    )
    found = _any_attend(case.arguments())
    states, out = oracle.recur(case.wide())
    results = (("out", found.out, out), ("state", found.state, states[-1]))
    for name, x, want in results:
      # Two hundred positions of products of these sizes.
      atol = 2e-5 * max(np.abs(want).max(), size**2)
      np.testing.assert_allclose(x, want, atol=atol, rtol=0, err_msg=name)

  def test_float64_is_summed_in_float64(self):
    with jax.enable_x64(True):
      case = oracle.draw(shapes.TESTS["ragged_gqa"], "float32", "mixed").wide()
      arguments = jax.tree.map(jnp.asarray, case.arguments())
      found = _attend("xla", **arguments, return_state=True)
    states, out = oracle.recur(case)
    np.testing.assert_allclose(found.out, out, atol=1e-12 * np.abs(out).max())
    np.testing.assert_allclose(found.state, states[-1], atol=1e-11)


@pytest.mark.slow
class EveryCombinationTest(parameterized.TestCase):

  @parameterized.product(implementation=_IMPLEMENTATIONS, case=_SLOW_CASES)
  def test_equals_the_oracle(self, implementation, case):
    _run_case(implementation, *case)


class StepTest(parameterized.TestCase):

  @parameterized.parameters(("float32", 1e-6), ("bfloat16", 2.0**-8))
  @pytest.mark.by_default(0)
  def test_token_by_token_is_the_chunked_form(self, dtype, atol):
    case = oracle.draw(shapes.TESTS["ragged_gqa"], dtype, "mixed")
    arrays = (case.query, case.key, case.value)
    whole = _attend("xla", **case.arguments(), return_state=True)
    visit = lambda state, x: api.step(state, *x, case.decay)[::-1]
    in_turn = tuple(jnp.moveaxis(x, 1, 0) for x in arrays)
    state, out = jax.lax.scan(visit, case.initial_state, in_turn)
    out = jnp.moveaxis(out, 0, 1)
    self.assertEqual(out.dtype, dtype)
    wide = [np.asarray(x, np.float64) for x in (whole.out, out)]
    largest = np.abs(wide[0]).max()
    np.testing.assert_allclose(wide[1], wide[0], atol=atol * largest, rtol=0)
    largest = np.abs(whole.state).max()
    np.testing.assert_allclose(state, whole.state, atol=1e-6 * largest, rtol=0)

  def test_a_donated_state_is_updated_in_place(self):
    vectors = draws.normal(0, 3, 2, 4, 32)
    state = jnp.zeros((2, 4, 32, 32))
    step = jax.jit(api.step, donate_argnums=0)
    memory = step.lower(state, *vectors).compile().memory_analysis()
    self.assertEqual(memory.alias_size_in_bytes, state.nbytes)
    self.assertLess(memory.temp_size_in_bytes, state.nbytes // 4)


class WrongCallTest(parameterized.TestCase):

  def setUp(self):
    # What users see: shapes are not checked by annotations outside tests.
    super().setUp()
    jaxtyping.config.update("jaxtyping_disable", True)
    self.addCleanup(jaxtyping.config.update, "jaxtyping_disable", False)

  @parameterized.named_parameters(
      (
          "positions",
          {"key": (1, 9, 2, 4), "value": (1, 9, 2, 4)},
          "8 positions",
      ),
      (
          "heads",
          {"key": (1, 8, 3, 4), "value": (1, 8, 3, 4)},
          "multiple of the",
      ),
      ("axes", {"query": (1, 8, 4)}, "must have 4 axes"),
      ("decay", {"decay": np.ones(3)}, "each of the 4 query heads"),
      ("decay_0", {"decay": np.array([0.5, 0.0, 1, 1])}, "a value of 0; each"),
      ("decay_2", {"decay": np.array([0.5, 2.0, 1, 1])}, "at most 1"),
      ("decay_nan", {"decay": np.full(4, np.nan)}, "a value of nan"),
      ("decay_list", {"decay": [1.0] * 4}, "decay is a list"),
      ("state", {"initial_state": (1, 2, 4, 4)}, r"= \(1, 4, 4, 4\)"),
      ("scale", {"scale": float("inf")}, "scale=inf must be finite"),
      ("unknown", {"implementation": "cuda"}, "'cuda' is unknown"),
      ("gpu", {"implementation": "pallas_gpu"}, "needs a GPU"),
      ("tpu", {"implementation": "pallas_tpu"}, "needs a TPU"),
      (
          "config",
          {"config": 64},
          "must be a kernels_pallas.linear_attention.xla",
      ),
  )
  def test_says_what_would_be_right(self, changed, message):
    shapes_of = {
        "query": (1, 8, 4, 4),
        "key": (1, 8, 2, 4),
        "value": (1, 8, 2, 4),
    }
    arguments = {
        name: jnp.ones(x) if isinstance(x, tuple) else x
        for name, x in (shapes_of | changed).items()
    }
    with self.assertRaisesRegex(ValueError, message):
      api.linear_attention(**arguments)

  def test_of_a_step(self):
    vector, state = jnp.ones((1, 2, 4)), jnp.ones((1, 2, 4, 4))
    with self.assertRaisesRegex(ValueError, "in a step it must have 3 axes"):
      api.step(state, vector[None], vector, vector)
    with self.assertRaisesRegex(ValueError, "state has shape"):
      api.step(state[0], vector, vector, vector)
    with self.assertRaisesRegex(ValueError, "at most 1"):
      api.step(state, vector, vector, vector, jnp.array([1.5, 1.0]))


if __name__ == "__main__":
  absltest.main()
