import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from kernels_pallas.gated_delta_rule import api
from kernels_pallas.gated_delta_rule import pallas_tpu
from kernels_pallas.gated_delta_rule import shapes
from kernels_pallas.gated_delta_rule import xla
from tests import draws
from tests.kernels_pallas import modes
from tests.kernels_pallas.gated_delta_rule import oracle

_IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")
_SMALL = {
    "reference": None,
    "xla": xla.Config(chunk=16),
    "pallas_tpu": pallas_tpu.Config(chunk=16),
}
_CASES = (("ragged_grouped", "float32"), ("ragged_channels", "float32"))
_SLOW_CASES = tuple(
    (shape, dtype)
    for shape in shapes.TESTS
    for dtype in ("float32", "bfloat16")
    if (shape, dtype) not in _CASES
)
# Two sequences of 22 positions, of which one kind has a decay a channel.
_BY_HEAD = shapes.Shape(
    batch=2,
    length=22,
    num_heads=2,
    num_key_heads=1,
    key_size=8,
    value_size=4,
)
_BY_CHANNEL = dataclasses.replace(_BY_HEAD, is_by_channel=True)


def _attend(implementation, **arguments):
  return api.gated_delta_rule(
      **arguments, implementation=implementation, config=_SMALL[implementation]
  )


def _run_case(implementation, shape, dtype):
  case = oracle.draw(shape, dtype)
  call = lambda **arguments: _attend(implementation, **arguments)
  oracle.check(call, case, implementation)


# One program a kind of decay, for all tests of XLA's.
@jax.jit
def _run(arguments, segment_starts, lengths):
  return _attend(
      "xla", **arguments, segment_starts=segment_starts, lengths=lengths
  )


@jax.jit
def _gradients(arguments, segment_starts, lengths):
  def total(arguments):
    result = _run(arguments, segment_starts, lengths)
    return (result.out**2).sum() + (result.state**2).sum()

  return jax.grad(total)(arguments)


_NO_STARTS = jnp.zeros((2, 22), bool)
_WHOLE = jnp.full(2, 22)


def _case(shape, **changed):
  """Arguments of a call in float32, some of them changed."""
  return oracle.draw(shape, "float32").arguments() | changed


def _alone(arguments, row, first, last, is_new):
  """Out and state of some positions of a sequence, by the oracle."""
  one = slice(row, row + 1)
  part = {
      name: np.asarray(
          x[one] if name == "initial_state" else x[one, first:last], np.float64
      )
      for name, x in arguments.items()
  }
  if is_new:
    part["initial_state"] = 0 * part["initial_state"]
  states, out = oracle.recur(oracle.Case(**part, d_out=None, d_state=None))
  return out[0], states[-1][0]


def _check_equal(one, two, atol=1e-5):
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    largest = max(1.0, np.abs(x).max())
    np.testing.assert_allclose(y, x, atol=atol * largest, rtol=0)


class GatedDeltaRuleTest(parameterized.TestCase):

  @parameterized.product(implementation=_IMPLEMENTATIONS, case=_CASES)
  @pytest.mark.by_default(2, 3, 4, 5)
  def test_equals_the_oracle(self, implementation, case):
    _run_case(implementation, shapes.TESTS[case[0]], case[1])

  @parameterized.parameters(_BY_HEAD, _BY_CHANNEL)
  def test_a_state_continues_its_sequence(self, shape):
    arguments = _case(shape)
    whole = _run(arguments, _NO_STARTS, _WHOLE)
    # Within a chunk.
    first = _run(arguments, _NO_STARTS, _WHOLE - 13)
    rest = {name: jnp.roll(x, -9, axis=1) for name, x in arguments.items()}
    rest["initial_state"] = first.state
    rest = _run(rest, _NO_STARTS, _WHOLE - 9)
    out = np.concatenate([first.out[:, :9], rest.out[:, :13]], axis=1)
    _check_equal(tuple(whole), (out, rest.state))

  @parameterized.parameters(_BY_HEAD, _BY_CHANNEL)
  def test_documents_see_only_themselves(self, shape):
    arguments = _case(shape)
    starts = _NO_STARTS.at[0, :8:7].set(True).at[1, 12].set(True)
    found = _run(arguments, starts, _WHOLE)
    # The first document of the second sequence continues the initial state.
    for row, first, last, is_new in (
        (0, 0, 7, True),
        (0, 7, 22, True),
        (1, 0, 12, False),
        (1, 12, 22, True),
    ):
      out, state = _alone(arguments, row, first, last, is_new)
      _check_equal(out, found.out[row, first:last])
      if last == 22:
        _check_equal(state, found.state[row])

  def test_gradients_end_where_a_document_begins(self):
    starts = _NO_STARTS.at[:, ::12].set(True)
    found = _gradients(_case(_BY_CHANNEL), starts, _WHOLE)
    np.testing.assert_array_equal(found["initial_state"], 0)
    np.testing.assert_array_equal(found["log_decay"][:, ::12], 0)
    self.assertGreater(np.abs(found["log_decay"]).max(), 0)

  @parameterized.parameters(_BY_HEAD, _BY_CHANNEL)
  @pytest.mark.by_default(0)
  def test_padding_at_the_end_leaves_the_state(self, shape):
    arguments, lengths = _case(shape), jnp.array([13, 22])
    # Whatever is there: what a batch is padded with may be anything.
    for name in ("query", "key", "value"):
      arguments[name] = arguments[name].at[0, 13:].set(jnp.nan)
    found = _run(arguments, _NO_STARTS, lengths)
    out, state = _alone(arguments, 0, 0, 13, False)
    _check_equal(state, found.state[0], 1e-6)
    _check_equal(out, found.out[0, :13], 1e-6)
    np.testing.assert_array_equal(found.out[0, 13:], 0)
    for name, x in _gradients(arguments, _NO_STARTS, lengths).items():
      self.assertTrue(np.isfinite(x).all(), name)
      if name != "initial_state":
        np.testing.assert_array_equal(x[0, 13:], 0, name)

  def test_without_beta_there_is_only_decay(self):
    arguments = _case(_BY_CHANNEL)
    arguments["beta"] = 0 * arguments["beta"]
    left = np.exp(np.asarray(arguments["log_decay"], np.float64).sum(axis=1))
    expected = left[..., None] * arguments["initial_state"]
    found = _run(arguments, _NO_STARTS, _WHOLE)
    _check_equal(expected, found.state, 1e-6)

  def test_orthonormal_keys_are_recalled(self):
    arguments = _case(_BY_HEAD)
    turned, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))
    # Written twice: what is there is replaced, not added to.
    keys = jnp.tile(jnp.asarray(turned, jnp.float32), (2, 2, 1))[:, :, None]
    arguments["key"] = arguments["key"].at[:, :16].set(keys)
    arguments["log_decay"] *= 0
    arguments["beta"] = jnp.ones_like(arguments["beta"])
    found = _run(arguments, _NO_STARTS, _WHOLE - 6)
    read = jnp.einsum("BTH,BNHJ->BTNJ", keys[:, 8:, 0], found.state)
    _check_equal(arguments["value"][:, 8:16], read, 1e-6)

  def test_equal_channels_are_one_decay(self):
    arguments = _case(_BY_HEAD)
    wide = jnp.repeat(arguments["log_decay"][..., None], 8, axis=3)
    one = _run(arguments, _NO_STARTS, _WHOLE)
    arguments["log_decay"] = wide
    _check_equal(one, _run(arguments, _NO_STARTS, _WHOLE))

  def test_defaults(self):
    arguments = _case(_BY_HEAD)
    explicit = _run(
        arguments | {"initial_state": jnp.zeros((2, 2, 8, 4))},
        _NO_STARTS,
        _WHOLE,
    )
    del arguments["initial_state"]
    # Another chunk, too: all positions are in one.
    plain = jax.jit(api.gated_delta_rule)(**arguments)
    _check_equal(plain, explicit)

  @parameterized.parameters(*_IMPLEMENTATIONS)
  def test_of_no_position_is_the_state(self, implementation):
    arguments = _case(_BY_HEAD)
    state = arguments.pop("initial_state")
    none = {name: x[:, :0] for name, x in arguments.items()}
    with modes.mode_of(implementation):
      found = _attend(implementation, **none, initial_state=state)
    self.assertEqual(found.out.shape, (2, 0, 2, 4))
    np.testing.assert_array_equal(found.state, state)

  def test_float64_is_summed_in_float64(self):
    with jax.enable_x64(True):
      case = oracle.draw(_BY_CHANNEL, "float32").wide()
      arguments = jax.tree.map(jnp.asarray, case.arguments())
      found = _attend("xla", **arguments)
    states, out = oracle.recur(case)
    _check_equal((out, states[-1]), found, 1e-13)


class StepTest(parameterized.TestCase):

  @parameterized.parameters(_BY_HEAD, _BY_CHANNEL)
  def test_token_by_token_is_the_chunked_form(self, shape):
    arguments = _case(shape)
    whole = _run(arguments, _NO_STARTS, _WHOLE)
    state = arguments.pop("initial_state")
    visit = lambda state, x: api.step(state, **x)[::-1]
    in_turn = {name: jnp.moveaxis(x, 1, 0) for name, x in arguments.items()}
    state, out = jax.lax.scan(visit, state, in_turn)
    _check_equal(tuple(whole), (jnp.moveaxis(out, 0, 1), state), 1e-6)

  def test_a_donated_state_is_updated_in_place(self):
    vectors = draws.normal(0, 3, 2, 4, 32)
    state, gate = jnp.zeros((2, 4, 32, 32)), jnp.zeros((2, 4))
    step = jax.jit(api.step, donate_argnums=0)
    memory = step.lower(state, *vectors, gate, gate).compile().memory_analysis()
    self.assertEqual(memory.alias_size_in_bytes, state.nbytes)
    self.assertLess(memory.temp_size_in_bytes, state.nbytes // 4)


class WrongCallTest(parameterized.TestCase):

  def setUp(self):
    # What users see: shapes are not checked by annotations outside tests.
    super().setUp()
    jaxtyping.config.update("jaxtyping_disable", True)
    self.addCleanup(jaxtyping.config.update, "jaxtyping_disable", False)

  @parameterized.named_parameters(
      ("alike", {"key": (1, 9, 2, 8)}, r"key \(1, 9, 2, 8\) must be alike"),
      ("positions", {"value": (1, 9, 4, 6)}, "batch and positions"),
      ("heads", {"value": (1, 7, 3, 6)}, "3 value heads must be a multiple"),
      ("axes", {"query": (1, 7, 8)}, "must have 4 axes"),
      ("types", {"value": jnp.ones((1, 7, 4, 6), "bfloat16")}, "have one type"),
      ("decay", {"log_decay": (1, 7, 4, 6)}, r"\(1, 7, 4, 8\), one a key"),
      (
          "decay_1",
          {"log_decay": (1, 7, 4)},
          "a value of 1; each must be at most",
      ),
      ("beta", {"beta": (1, 7, 2)}, r"it must be \(1, 7, 4\)"),
      ("beta_nan", {"beta": np.full((1, 7, 4), np.nan)}, "a value of nan"),
      ("list", {"beta": [1.0] * 7}, "beta is a list"),
      ("state", {"initial_state": (1, 4, 6, 8)}, r"size = \(1, 4, 8, 6\)"),
      ("starts", {"segment_starts": np.zeros((1, 8), bool)}, r"= \(1, 7\)"),
      ("starts_int", {"segment_starts": np.zeros((1, 7), int)}, "not bool"),
      ("lengths", {"lengths": np.array([8])}, "8; each must be 0 to the 7"),
      ("lengths_2", {"lengths": np.array([1, 2])}, "each of the 1 sequences"),
      ("scale", {"scale": float("inf")}, "scale=inf must be finite"),
      ("unknown", {"implementation": "cuda"}, "'cuda' is unknown"),
      ("gpu", {"implementation": "pallas_gpu"}, "needs a GPU"),
      ("tpu", {"implementation": "pallas_tpu"}, "needs a TPU"),
      (
          "config",
          {"config": 64},
          "must be a kernels_pallas.gated_delta_rule.xla",
      ),
  )
  def test_says_what_would_be_right(self, changed, message):
    given = {
        "query": (1, 7, 2, 8),
        "key": (1, 7, 2, 8),
        "value": (1, 7, 4, 6),
        "log_decay": np.zeros((1, 7, 4)),
        "beta": (1, 7, 4),
    }
    arguments = {
        name: jnp.ones(x) if isinstance(x, tuple) else x
        for name, x in (given | changed).items()
    }
    with self.assertRaisesRegex(ValueError, message):
      api.gated_delta_rule(**arguments)

  def test_of_a_step(self):
    vector, state = jnp.ones((1, 2, 4)), jnp.ones((1, 2, 4, 4))
    gate = jnp.zeros((1, 2))
    with self.assertRaisesRegex(ValueError, "in a step it must have 3 axes"):
      api.step(state, vector[None], vector, vector, gate, gate)
    with self.assertRaisesRegex(ValueError, "state has shape"):
      api.step(state[0], vector, vector, vector, gate, gate)
    with self.assertRaisesRegex(ValueError, "each must be at most 0"):
      api.step(state, vector, vector, vector, gate + 1, gate)

  @parameterized.parameters(0, 48)
  def test_a_chunk_that_is_no_power_of_two(self, chunk):
    with self.assertRaisesRegex(ValueError, f"chunk={chunk} must be a power"):
      xla.Config(chunk=chunk)


@pytest.mark.slow
class EveryCombinationTest(parameterized.TestCase):

  @parameterized.product(implementation=_IMPLEMENTATIONS, case=_SLOW_CASES)
  def test_equals_the_oracle(self, implementation, case):
    _run_case(implementation, shapes.TESTS[case[0]], case[1])

  @parameterized.product(
      implementation=_IMPLEMENTATIONS,
      length=(1, 7, 64, 100, 257),
      sizes=((16, 32), (64, 16), (32, 128), (128, 64)),
      is_by_channel=(False, True),
  )
  def test_of_every_size(self, implementation, length, sizes, is_by_channel):
    shape = shapes.Shape(
        length=length,
        num_heads=2,
        num_key_heads=1,
        key_size=sizes[0],
        value_size=sizes[1],
        is_by_channel=is_by_channel,
    )
    _run_case(implementation, shape, "float32")


if __name__ == "__main__":
  absltest.main()
