"""Methods within a model, and what is calibrated on it."""

import dataclasses
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.sparsity.gated import calibration
from joma.inference.sparsity.gated import error_training
from joma.inference.sparsity.gated import fitted
from joma.inference.sparsity.gated import methods
from joma.inference.sparsity.gated import router
from joma.inference.sparsity.gated import spec as specs
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.layers import cross_entropy
from scansnap_jax.experiment import errors
from tests.joma.inference.sparsity.gated import methods_test
from tests.joma.transformer import applied

_CONFIG = configs.TransformerConfig(
    vocab_size=11,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    hidden_dim=32,
    max_len=16,
    use_gated_mlp=True,
    activation="silu",
)
_TEXTS = np.random.default_rng(0).integers(11, size=(4, 8)).astype(np.int32)


def _model():
  model = models.Transformer(_CONFIG, implementation="reference")
  return model, applied.params(model)


class RouterTest(absltest.TestCase):

  @pytest.mark.slow
  def test_prompts_are_dense_and_reads_are_those_of_the_others(self):
    model, params = _model()
    arrays = {
        "least_x": jnp.array([0.5, 0.0]),
        "least_h": jnp.array([0.0, 0.0]),
    }
    added = router.MethodRouter(
        arrays=arrays, config=_CONFIG, method=methods.Teal(), prompt_len=3
    )
    logits, seen = model.apply(
        {"params": params},
        jnp.asarray(_TEXTS),
        router=added,
        mutable=[router.COLLECTION, "intermediates"],
    )
    dense = model.apply({"params": params}, jnp.asarray(_TEXTS))
    np.testing.assert_allclose(logits[:, :3], dense[:, :3], atol=1e-5)
    self.assertGreater(float(jnp.abs(logits - dense)[:, 3:].max()), 1e-3)
    read = [
        seen[router.COLLECTION][f"layers_{n}"]["mlp"]["read"][0]
        for n in range(2)
    ]
    # The second layer leaves nothing out: all weights of 4 x 5 tokens.
    self.assertEqual(float(read[1]), 20 * 3 * 16 * 32)
    self.assertLess(float(read[0]), float(read[1]))

  @pytest.mark.slow
  def test_steepness_is_the_square_of_a_slope(self):
    model, params = _model()
    seen = calibration.see(model, params, _TEXTS[:2])
    self.assertEqual(seen.x.shape, (2, 16, 16))

    def loss(shift):
      shifts = jnp.zeros((2, 2, 8, 16)).at[1, 0, 2, 5].set(shift)
      logits = model.apply(
          {"params": params},
          jnp.asarray(_TEXTS[:2]),
          router=router.ShiftRouter(shifts),
      )
      tokens = jnp.asarray(_TEXTS[:2, 1:])
      return float(cross_entropy.token_losses(logits[:, :-1], tokens).sum())

    slopes = jax.grad(
        lambda shifts: cross_entropy.token_losses(
            model.apply(
                {"params": params},
                jnp.asarray(_TEXTS[:2]),
                router=router.ShiftRouter(shifts),
            )[:, :-1],
            jnp.asarray(_TEXTS[:2, 1:]),
        ).sum()
    )(jnp.zeros((2, 2, 8, 16)))
    by_hand = (loss(1e-2) - loss(-1e-2)) / 2e-2
    self.assertAlmostEqual(float(slopes[1, 0, 2, 5]), by_hand, places=3)
    wanted = np.square(slopes).sum(-1).mean((1, 2))
    np.testing.assert_allclose(seen.steepness, wanted, rtol=1e-4)


class CalibrationTest(absltest.TestCase):

  def test_a_low_rank_part_is_the_best_on_these_rows(self):
    """Of rank r, the sum of the squares of the singular values of x W left."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(64, 6)) * [5, 3, 1, 1, 0.3, 0.1])
    kernel = np.float32(rng.normal(size=(6, 9)))
    low = calibration.low_rank(kernel, x, 2)
    error = np.square(x @ kernel - x @ low["first"] @ low["last"]).sum()
    left = np.linalg.svd(x @ kernel, compute_uv=False)[2:]
    self.assertAlmostEqual(error / np.square(left).sum(), 1, places=4)

  def test_quantiles_by_hand(self):
    sizes = np.float32([[[1, -2, 3, -4]], [[0, 0, 8, -6]]])
    found = calibration.quantiles(sizes, (0.5, 0.25, 1.0))
    np.testing.assert_array_equal(found, [[3, 4, 0], [6, 8, 0]])

  def test_errors_of_options_by_numpy(self):
    weights, x = methods_test.make_weights(), methods_test.make_x()
    nums = jnp.array([2, 12])
    reads, squares = calibration.errors(
        methods.Oracle(), weights, x, {}, {"num": nums}
    )
    np.testing.assert_allclose(reads, [3 * 8 * 2, 3 * 8 * 12])
    dense = weights.out(weights.dense_hidden(x))
    one = methods.Oracle().update(weights, x, {"num": jnp.int32(2)}).out
    wanted = np.square(one - dense).sum(-1).mean()
    np.testing.assert_allclose(squares, [wanted, 0], rtol=1e-4, atol=1e-6)


class ErrorTrainingTest(absltest.TestCase):

  def test_the_loss_by_numpy(self):
    weights, x = methods_test.make_weights(), methods_test.make_x()
    rng = np.random.default_rng(3)
    predictor = {
        "project": rng.normal(size=(8, 2)),
        "expand": rng.normal(size=(2, 12)),
        "bias": rng.normal(size=12),
    }
    predictor = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), predictor)
    found = error_training.loss(predictor, weights, x, num=4)
    lost = whole = 0.0
    for row in np.float64(x):
      normed = row / np.sqrt(np.mean(row**2))
      scores = normed @ np.float64(predictor["project"])
      scores = scores @ np.float64(predictor["expand"])
      scores += np.float64(predictor["bias"])
      border = np.sort(scores)[::-1][3:5].mean()
      closed = 1 / (1 + np.exp(scores - border))
      hidden = methods_test._hidden(weights, row)
      down = np.float64(weights.kernels["down"])
      lost += np.square((closed * hidden) @ down).sum()
      whole += np.square(hidden @ down).sum()
    self.assertAlmostEqual(float(found), lost / whole, places=5)

  @pytest.mark.slow
  def test_training_leaves_less_out_than_chance(self):
    weights = methods_test.make_weights()
    x = jnp.asarray(np.random.default_rng(5).normal(size=(512, 8)), jnp.float32)
    _, losses = error_training.train(
        weights, x, num=6, rank=8, num_steps=200, batch=64
    )
    self.assertLess(float(losses[-20:].mean()), 0.8 * float(losses[0]))


class FittedTest(parameterized.TestCase):

  @parameterized.parameters(
      "teal",
      "teal:split",
      "teal:layers",
      "rsparse:layers",
      "cats:layers",
      "oracle:layers:4",
      "sketch",
      "int4_scores:layers",
      "output_error",
  )
  @pytest.mark.slow
  def test_what_is_fitted_reads_what_it_may(self, name):
    model, params = _model()
    fitter = fitted.Fitter(
        model, params, held_out=_TEXTS[:2], training=_TEXTS[2:], rank=1
    )
    for budget in (0.5, 0.8):
      found = fitter.fit(specs.parse(name), budget)
      reads = []
      for layer in range(2):
        weights = calibration.layer_weights(model, params, layer)
        arrays = jax.tree.map(lambda a, n=layer: a[n], found.arrays)
        x = jnp.asarray(fitter._seen.x[layer])
        reads.append(float(found.method.update(weights, x, arrays).read.mean()))
      self.assertLess(np.mean(reads) / weights.size, budget + 0.05)
      self.assertGreater(np.mean(reads) / weights.size, budget - 0.3)

  def test_predictors_take_the_steps_and_rows_that_they_are_given(self):
    model, params = _model()
    sizes = {"num_steps": 3, "num_rows": 5}
    fitter = fitted.Fitter(
        model, params, held_out=_TEXTS[:2], training=_TEXTS[2:], rank=1, **sizes
    )
    with mock.patch.object(
        error_training, "train", wraps=error_training.train
    ) as train:
      fitter.fit(specs.parse("output_error"), 0.5)
    asked = [call.kwargs for call in train.call_args_list]
    self.assertEqual([one["num_steps"] for one in asked], [3, 3])
    self.assertEqual([one["batch"] for one in asked], [5, 5])


class SpecTest(parameterized.TestCase):

  def test_names(self):
    wanted = specs.Spec(name="oracle", spread="layers", block_size=16)
    self.assertEqual(specs.parse("oracle:layers:16"), wanted)
    self.assertEqual(specs.parse("int8"), specs.Spec(name="int8"))
    self.assertEqual(dataclasses.replace(wanted, block_size=1).block_size, 1)

  @parameterized.parameters(
      ("tael", "begins with none"),
      ("teal:wide", "even or layers"),
      ("cats:split", "split after teal or rsparse"),
      ("teal:even:4", "begin with one of oracle"),
      ("oracle:even:0", "above 0"),
  )
  def test_names_that_are_none(self, name, message):
    with self.assertRaisesRegex(errors.UserError, message):
      specs.parse(name)


if __name__ == "__main__":
  absltest.main()
