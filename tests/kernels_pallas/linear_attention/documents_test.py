"""Packed documents and padded rows are what each text alone is."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear_attention import api
from kernels_pallas.linear_attention import output
from kernels_pallas.linear_attention import pallas_tpu
from kernels_pallas.linear_attention import xla
from tests.kernels_pallas import modes
from tests.kernels_pallas.linear_attention import oracle

# A hundred roundings of float32, of values of about 4.
_ATOL = 2e-5
_DECAY = np.float32([1.0, 0.9, 0.5, 1e-3])
_STARTS = {0: (3, 4, 17), 1: (0, 16)}  # Of each row.
_LENGTHS = jnp.array([23, 9])
_CONFIGS = {
    "reference": None,
    "xla": xla.Config(chunk=8),
    "pallas_tpu": pallas_tpu.Config(chunk=128),
}


def _draw(length=23):
  rng = np.random.default_rng(0)
  shapes = [(2, length, heads, 8) for heads in (4, 2, 2)] + [(2, 4, 8, 8)]
  return [
      jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes
  ]


def _marks(length=23):
  marks = np.zeros((2, length), bool)
  for row, places in _STARTS.items():
    marks[row, list(places)] = True
  return jnp.asarray(marks)


def _call(implementation, arrays, **options):
  query, key, value, state = arrays
  with modes.mode_of(implementation):
    return api.linear_attention(
        query,
        key,
        value,
        decay=jnp.asarray(_DECAY),
        initial_state=state,
        return_state=True,
        implementation=implementation,
        config=_CONFIGS[implementation],
        **options,
    )


def _alone(arrays, row, start, stop, state):
  """One document by the recurrence, in float64."""
  query, key, value, _ = arrays
  part = [x[row : row + 1, start:stop] for x in (query, key, value)]
  case = oracle.Case(*part, _DECAY, state, None, None).wide()
  states, out = oracle.recur(case)
  return output.LinearAttentionOutput(out, states[-1])


def _alone_by_jax(arrays, row, start, stop, state):
  query, key, value, _ = arrays
  part = [x[row : row + 1, start:stop] for x in (query, key, value)]
  return _call("reference", [*part, state])


def _apart(arrays, lengths, alone=_alone):
  """Rows whose documents are read one by one."""
  outs, states = [], []
  for row, length in enumerate(lengths):
    places = [0, *(at for at in _STARTS[row] if 0 < at < length), length]
    state = arrays[3][row : row + 1]
    if 0 in _STARTS[row]:
      state = jnp.zeros_like(state)
    row_out = []
    for start, stop in zip(places, places[1:], strict=False):
      found = alone(arrays, row, start, stop, state)
      row_out.append(found.out)
      state, last = jnp.zeros_like(state), found.state
    fill = arrays[0].shape[1] - length
    out = jnp.concatenate(row_out, axis=1)
    outs.append(jnp.pad(out, ((0, 0), (0, fill), (0, 0), (0, 0))))
    states.append(last)
  return jnp.concatenate(outs), jnp.concatenate(states)


def _gradients(call, arrays):
  def loss(arrays):
    out, state = call(arrays)
    return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + (
        state * jnp.sin(jnp.arange(state.size).reshape(state.shape))
    ).sum()

  return jax.jit(jax.grad(loss))(arrays)


class DocumentsTest(parameterized.TestCase):

  @parameterized.parameters("reference", "xla")
  @pytest.mark.by_default(1)
  def test_packed_documents_are_those_alone(self, implementation):
    arrays = _draw()
    for lengths in (None, _LENGTHS):
      found = _call(
          implementation, arrays, segment_starts=_marks(), lengths=lengths
      )
      whole = (23, 23) if lengths is None else (23, 9)
      out, state = _apart(arrays, whole)
      np.testing.assert_allclose(found.out, out, atol=_ATOL)
      np.testing.assert_allclose(found.state, state, atol=_ATOL)

  @parameterized.parameters("reference", "xla", "pallas_tpu")
  @pytest.mark.slow
  def test_a_padded_row_is_the_row_alone(self, implementation):
    arrays = _draw()
    found = _call(implementation, arrays, lengths=_LENGTHS)
    for row, length in enumerate((23, 9)):
      state = arrays[3][row : row + 1]
      want = _alone(arrays, row, 0, length, state)
      np.testing.assert_allclose(
          found.out[row, :length], want.out[0], atol=_ATOL
      )
      np.testing.assert_array_equal(found.out[row, length:], 0)
      np.testing.assert_allclose(found.state[row], want.state[0], atol=_ATOL)

  @pytest.mark.slow
  def test_gradients_are_those_of_documents_apart(self):
    arrays = _draw()
    marks = _marks()
    got = _gradients(
        lambda x: _call("xla", x, segment_starts=marks, lengths=_LENGTHS)[:2],
        arrays,
    )
    want = _gradients(lambda x: _apart(x, (23, 9), _alone_by_jax), arrays)
    for one, two in zip(got, want, strict=True):
      np.testing.assert_allclose(one, two, atol=10 * _ATOL)

  def test_what_does_not_fit_is_refused(self):
    arrays = _draw()
    with self.assertRaisesRegex(ValueError, "cannot follow segment_starts"):
      _call("pallas_tpu", arrays, segment_starts=_marks())
    with self.assertRaisesRegex(ValueError, "lengths has 24; each must be 0"):
      _call("xla", arrays, lengths=jnp.array([24, 3]))


if __name__ == "__main__":
  absltest.main()
