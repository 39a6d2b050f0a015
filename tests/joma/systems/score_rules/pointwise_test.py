"""Each form beside plain numbers; where they are softmax, and where not."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.score_rules import pointwise
from joma.transformer import hooks
from joma.transformer.weighing import rows
from kernels_pallas import masks
from scansnap_jax.experiment import errors

_TOLERANCE = 1e-6
_BY_HAND = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "identity": lambda x: x,
    "taylor": lambda x: ((1 + x) ** 2 + 1) / 2,
    "uniform": lambda x: 1 + 0 * x,
}


def _of(rule, logits):
  return np.asarray(rule.of_logits(jnp.asarray(logits)))


def _logits(shape=(2, 5, 5)):
  draw = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  return np.where(np.tri(shape[-1], dtype=bool), draw, -np.inf)


class PointwiseTest(parameterized.TestCase):

  @parameterized.product(form=list(_BY_HAND), sums=(False, True))
  def test_weights_are_the_function_by_the_row(self, form, sums):
    logits = _logits()
    got = pointwise.Pointwise(form=form, sums=sums).of_logits(
        jnp.asarray(logits)
    )
    for head, t in np.ndindex(2, 5):
      want = _BY_HAND[form](logits[head, t, : t + 1].astype(np.float64))
      if sums:
        want /= max(abs(want.sum()), 1) if form == "identity" else want.sum()
      np.testing.assert_allclose(got[head, t, : t + 1], want, atol=_TOLERANCE)
      np.testing.assert_array_equal(got[head, t, t + 1 :], 0)

  def test_elu_is_softmax_where_logits_are_not_positive(self):
    logits = np.where(np.isinf(_logits()), -np.inf, -np.abs(_logits()))
    rule = pointwise.Pointwise(form="elu", sums=True)
    want = jax.nn.softmax(logits)
    np.testing.assert_allclose(_of(rule, logits), want, atol=_TOLERANCE)
    # The twin: the same with positive ones, which exp would tell apart.
    error = _of(rule, np.where(np.isinf(logits), logits, -logits)) - want
    self.assertGreater(float(jnp.abs(error).max()), 0.01)

  def test_taylor_comes_to_softmax_as_the_cube_of_the_logits(self):
    rule = pointwise.Pointwise(form="taylor", sums=True)
    apart = [
        np.abs(
            _of(rule, size * _logits()) - jax.nn.softmax(size * _logits())
        ).max()
        for size in (0.4, 0.2)
    ]
    self.assertBetween(apart[0] / apart[1], 6, 10)

  def test_a_weight_without_sums_knows_no_other_key(self):
    logits = _logits()
    more = logits.copy()
    more[:, 4, 0] += 3
    for sums in (False, True):
      rule = pointwise.Pointwise(sums=sums)
      same = np.array_equal(
          _of(rule, logits)[:, 4, 1:], _of(rule, more)[:, 4, 1:]
      )
      self.assertEqual(same, not sums)

  @pytest.mark.slow
  def test_memory_is_of_the_length_and_rows_of_nothing_have_gradients(self):
    """Bytes of a pass forward and backward at T and 2 T; no number is NaN."""
    rule = hooks.WeightRule(
        name="pointwise", normalize=pointwise.Pointwise(sums=True).of_logits
    )
    options = hooks.AttentionOptions(scale=0.5, weights=rule)

    def run(attend, length):
      x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
      places = jnp.arange(length)[None]
      loss = lambda *arrays: attend(
          *arrays, masks.causal(length), options, (places, places)
      ).sum()
      return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()

    held = lambda attend, length: (
        run(attend, length).memory_analysis().temp_size_in_bytes
    )
    small, large = (held(rows.attend, length) for length in (1024, 2048))
    self.assertLess(large / small, 2.5)
    self.assertLess(large, held(rows.attend_at_once, 2048) / 4)
    nothing = np.full((1, 1, 2, 2), -np.inf, np.float32)
    grad = jax.grad(lambda x: rule.normalize(x).sum())(jnp.asarray(nothing))
    self.assertTrue(np.isfinite(grad).all())

  def test_an_unknown_form_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "form='tanh' is none of"):
      pointwise.Pointwise(form="tanh")


if __name__ == "__main__":
  absltest.main()
