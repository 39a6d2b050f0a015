from absl.testing import absltest
from absl.testing import parameterized
import hypothesis
from hypothesis import strategies as st
import jax
from jax.experimental import checkify
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from kernels_pallas.gather_mlp import api
from kernels_pallas.gather_mlp import shapes
from tests.kernels_pallas import modes
from tests.kernels_pallas.gather_mlp import oracle

_IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")
# Shape, type, activation, lists per sequence, entries that do not count.
_CASES = (
    ("one", "float32", "relu", False, False),
    ("ragged", "bfloat16", "relu", True, True),
    ("swiglu", "float32", "silu", True, False),
    ("swiglu_bias", "float32", "silu", False, True),
)
_SLOW_CASES = tuple(
    case
    for shape in shapes.TESTS
    for dtype in ("float32", "bfloat16")
    for activation in oracle.ACTIVATIONS
    for lists in ((False, False), (False, True), (True, True))
    if (case := (shape, dtype, activation, *lists)) not in _CASES
)


def _call(implementation, case, config=None):
  """A function of the arrays, ids and their number."""

  def call(arrays, block_ids, num_valid):
    return api.gather_mlp(
        **arrays,
        block_ids=block_ids,
        num_valid=num_valid,
        activation=case.activation,
        block_size=case.block_size,
        implementation=implementation,
        config=config,
    )

  return call


def _run_case(implementation, shape, dtype, activation, lists, is_ragged):
  case = oracle.draw(
      shapes.TESTS[shape],
      dtype,
      activation,
      num_chosen=3,
      per_sequence=lists,
      is_ragged=is_ragged,
  )
  both = oracle.both_passes(_call(implementation, case))
  oracle.check(both, case, implementation)


class OracleTest(absltest.TestCase):
  """The oracle itself, on what can be computed by hand."""

  def test_two_neurons_of_three(self):
    case = oracle.Case(
        arrays={
            "x": np.array([[2.0]]),
            "up": np.array([[1.0], [5.0], [-1.0]]),
            "down": np.array([[3.0], [7.0], [4.0]]),
            "up_bias": np.array([0.5, 0, 0]),
        },
        block_ids=np.array([2, 0]),
        num_valid=None,
        activation="relu",
        block_size=1,
        d_out=np.array([[10.0]]),
    )
    y, grads = oracle.expected(case)
    # relu(2 + 0.5) * 3; neuron 1 is not chosen, neuron 2 is off.
    np.testing.assert_allclose(y, [[7.5]])
    np.testing.assert_allclose(grads["down"], [[25], [0], [0]])
    np.testing.assert_allclose(grads["up"], [[60], [0], [0]])
    np.testing.assert_allclose(grads["up_bias"], [30, 0, 0])
    np.testing.assert_allclose(grads["x"], [[30]])

  def test_slopes_are_those_of_the_activations(self):
    z = np.array([-2.0, -0.3, 0.4, 1.7])
    for act, slope in oracle.ACTIVATIONS.values():
      difference = (act(z + 1e-6) - act(z - 1e-6)) / 2e-6
      np.testing.assert_allclose(slope(z), difference, atol=1e-8)


class GatherMlpTest(parameterized.TestCase):

  @parameterized.product(implementation=_IMPLEMENTATIONS, case=_CASES)
  @pytest.mark.by_default(1, 3)
  def test_equals_the_oracle(self, implementation, case):
    _run_case(implementation, *case)

  @parameterized.parameters(*_IMPLEMENTATIONS)
  @pytest.mark.by_default(0)
  def test_no_entry_that_counts_leaves_the_bias(self, implementation):
    case = oracle.draw(shapes.TESTS["one"], "float32")
    with modes.mode_of(implementation):
      y = _call(implementation, case)(case.arrays, case.block_ids, 0)
      np.testing.assert_array_equal(y, case.arrays["down_bias"][None])
      y = _call(implementation, case)(case.arrays, case.block_ids[:0], None)
      np.testing.assert_array_equal(y, case.arrays["down_bias"][None])

  def test_float64_is_summed_in_float64(self):
    with jax.enable_x64(True):
      case = oracle.draw(shapes.TESTS["swiglu_bias"], "float64", "gelu")
      y = _call("xla", case)(case.arrays, case.block_ids, None)
    np.testing.assert_allclose(y, oracle.expected(case)[0], atol=1e-13)

  @hypothesis.given(seed=st.integers(0, 2**31 - 1))
  @hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
  def test_any_blocks_and_values(self, seed):
    oracle.check(_ANY_BOTH, _draw_any(seed), "xla")


def _draw_any(seed):
  return oracle.draw(
      shapes.TESTS["swiglu_bias"],
      "float32",
      "silu",
      num_chosen=4,
      per_sequence=True,
      is_ragged=True,
      seed=seed,
  )


_ANY_BOTH = oracle.both_passes(_call("xla", _draw_any(0)))


@pytest.mark.slow
class EveryCombinationTest(parameterized.TestCase):

  @parameterized.product(implementation=_IMPLEMENTATIONS, case=_SLOW_CASES)
  def test_equals_the_oracle(self, implementation, case):
    _run_case(implementation, *case)


def _arrays(**changed):
  shapes_of = {
      "x": (2, 8),
      "up": (32, 8),
      "down": (32, 8),
      "gate": None,
      "up_bias": (32,),
      "gate_bias": None,
      "down_bias": (8,),
  }
  return {
      name: jnp.ones(x) if isinstance(x, tuple) else x
      for name, x in (shapes_of | changed).items()
      if name in shapes_of
  }


class WrongCallTest(parameterized.TestCase):

  def setUp(self):
    # What users see: shapes are not checked by annotations outside tests.
    super().setUp()
    jaxtyping.config.update("jaxtyping_disable", True)
    self.addCleanup(jaxtyping.config.update, "jaxtyping_disable", False)

  @parameterized.named_parameters(
      ("axes", {"x": (8,)}, r"x has shape \(8,\); it must have 2 axes"),
      ("width", {"down": (32, 9)}, r"down has shape \(32, 9\).* \(32, 8\)"),
      ("neurons", {"down": (31, 8)}, r"a row for each neuron"),
      ("gate", {"gate": (16, 8)}, r"gate has shape \(16, 8\)"),
      ("bias", {"up_bias": (8,)}, r"up_bias has shape \(8,\).* \(32,\)"),
      ("down_bias", {"down_bias": (32,)}, r"must be \(8,\)"),
      ("gate_bias", {"gate_bias": (32,)}, "gate_bias needs a gate"),
      ("list", {"up": [[1.0]]}, "up is a list; it must be an array"),
      (
          "types",
          {"x": jnp.ones((2, 8), jnp.bfloat16)},
          "up is float32 and x is bfloat16; they must have one type",
      ),
      ("integers", {"x": jnp.ones((2, 8), int)}, "x is int32; it must be a fl"),
      (
          "blocks",
          {"block_size": 24},
          "block_size=24 must be a positive divisor",
      ),
      ("block_0", {"block_size": 0}, "block_size=0 must be .* the 32 neurons"),
      ("activation", {"activation": "elu"}, "'elu' is unknown; .* relu, gelu"),
      ("float_ids", {"block_ids": np.ones(2)}, "block_ids is float"),
      (
          "ids_axes",
          {"block_ids": np.ones((3, 2), int)},
          r"B\] with B = 2|B = 2",
      ),
      (
          "num_axes",
          {"num_valid": np.ones(2, int)},
          r"num_valid has shape \(2,\); with block_ids \(3,\) it must be \(\)",
      ),
      ("unknown", {"implementation": "cuda"}, "'cuda' is unknown"),
      ("tpu", {"implementation": "pallas_tpu"}, "needs a TPU"),
      ("gpu", {"implementation": "pallas_gpu"}, "needs a GPU"),
      ("config", {"config": 64}, "must be a kernels_pallas.gather_mlp.xla"),
      (
          "range",
          {"block_ids": np.array([1, 4]), "debug": True},
          "block_ids has entries from 1 to 4, but there are blocks 0 to 3",
      ),
      (
          "negative",
          {"block_ids": np.array([-1, 3]), "debug": True},
          "entries from -1 to 3",
      ),
      (
          "twice",
          {"block_ids": np.array([[0, 1], [2, 2]]), "debug": True},
          "block_ids has 2 twice in one list",
      ),
      (
          "num",
          {"num_valid": 4, "debug": True},
          "num_valid is from 4 to 4, but block_ids is 3 wide",
      ),
  )
  def test_says_what_would_be_right(self, changed, message):
    options = {"block_ids": np.array([0, 2, 3], np.int32), "block_size": 8}
    with self.assertRaisesRegex(ValueError, message):
      api.gather_mlp(**options | changed | _arrays(**changed))

  def test_what_does_not_count_may_be_out_of_range(self):
    ids = np.array([3, 1 << 20, -5], np.int32)
    y = api.gather_mlp(
        **_arrays(), block_ids=ids, num_valid=1, block_size=8, debug=True
    )
    # 8 neurons of 8 + 1, each of weight 1, and the bias.
    np.testing.assert_array_equal(y, np.full((2, 8), 8 * 9 + 1))

  def test_of_traced_values_checkify_tells(self):
    def call(ids):
      return api.gather_mlp(
          **_arrays(), block_ids=ids, block_size=8, debug=True
      )

    error, _ = jax.jit(checkify.checkify(call))(jnp.array([0, 9]))
    with self.assertRaisesRegex(Exception, "there are blocks 0 to 3"):
      error.throw()


if __name__ == "__main__":
  absltest.main()
