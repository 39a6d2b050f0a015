"""The optimizer against PyTorch's numbers, written out."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from joma.transformer.training import lm_config
from joma.transformer.training import optimizer as optimizer_lib

_PLAIN = lm_config.LmConfig(
    lr=0.1,
    beta_2=0.999,
    weight_decay=0.0,
    clip_norm=None,
    warmup_steps=0,
    schedule="constant",
)
_PARAMS = {
    "layers_0": {"mlp": {"up": {"kernel": np.array([1.0, -2.0])}}},
    "output": {"kernel": np.array([3.0])},
}


def _run(config, grads, steps_per_epoch=100, num_steps=10):
  """Parameters after each of some gradients, as vectors (mlp, output)."""
  optimizer = optimizer_lib.make_optimizer(config, num_steps, steps_per_epoch)
  params = jax.tree.map(jnp.float32, _PARAMS)
  opt_state, found = optimizer.init(params), []
  for step, grad in enumerate(grads):
    tree = {
        "layers_0": {"mlp": {"up": {"kernel": jnp.float32(grad[:2])}}},
        "output": {"kernel": jnp.float32(grad[2:])},
    }
    params, opt_state = optimizer.update(
        tree, opt_state, params, jnp.int32(step)
    )
    found.append(np.concatenate(jax.tree.leaves(params)))
  return np.stack(found)


class UpdateTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.start = np.array([1.0, -2.0, 3.0])
    self.grads = np.random.default_rng(0).normal(size=(4, 3))

  def _adam(self, grads, lr=0.1, decay=0.0, decoupled=False):
    """The update of https://arxiv.org/abs/1412.6980, in float64."""
    value, mean, square, found = self.start, 0.0, 0.0, []
    for t, grad in enumerate(grads, start=1):
      grad = grad + (0 if decoupled else decay * value)
      mean = 0.9 * mean + 0.1 * grad
      square = 0.999 * square + 0.001 * grad**2
      unit = (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
      value = value - lr * (unit + (decay * value if decoupled else 0))
      found.append(value)
    return np.stack(found)

  def test_adam_is_the_published_one(self):
    config = dataclasses.replace(_PLAIN, optimizer="adam")
    np.testing.assert_allclose(
        _run(config, self.grads), self._adam(self.grads), rtol=1e-5
    )

  def test_adam_decays_inside_and_adamw_outside(self):
    for name in ("adam", "adamw"):
      config = dataclasses.replace(_PLAIN, optimizer=name, weight_decay=0.2)
      expected = self._adam(self.grads, decay=0.2, decoupled=name == "adamw")
      np.testing.assert_allclose(
          _run(config, self.grads), expected, rtol=1e-5, err_msg=name
      )

  def test_sgd_has_a_rate_of_its_own_for_mlps(self):
    config = dataclasses.replace(_PLAIN, optimizer="sgd", lr=0.5, lr_mlp=1.0)
    expected = self.start - np.cumsum(
        self.grads * np.array([1.0, 1.0, 0.5]), axis=0
    )
    np.testing.assert_allclose(_run(config, self.grads), expected, rtol=1e-5)

  def test_clipping_is_by_the_norm_of_all_parameters(self):
    config = dataclasses.replace(_PLAIN, optimizer="sgd", clip_norm=0.5)
    grads = np.array([[3.0, 0.0, 4.0], [0.1, 0.2, 0.2]])
    moved = -np.diff(_run(config, grads), axis=0, prepend=self.start[None])
    np.testing.assert_allclose(moved[0], [0.03, 0, 0.04], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(moved[1], 0.1 * grads[1], rtol=1e-5)

  def test_a_reset_is_a_new_adam_at_the_start_of_each_epoch(self):
    config = dataclasses.replace(
        _PLAIN, optimizer="adam", reset_optimizer_every_epoch=True
    )
    found = _run(config, self.grads, steps_per_epoch=2)
    self.start = found[1]
    np.testing.assert_allclose(found[2:], self._adam(self.grads[2:]), rtol=1e-5)
    kept = _run(dataclasses.replace(_PLAIN, optimizer="adam"), self.grads)
    self.assertGreater(np.abs(kept[2:] - found[2:]).max(), 1e-3)

  def test_layers_that_are_left_out_stay_to_the_bit(self):
    config = dataclasses.replace(
        _PLAIN, weight_decay=0.2, clip_norm=0.5, update_layers=(0,)
    )
    # The gradients that are left out would be all of the norm.
    grads = self.grads * [1.0, 1.0, 1e3]
    found = _run(config, grads)
    np.testing.assert_array_equal(found[:, 2], 3.0)
    norms = np.linalg.norm(grads[:, :2], axis=1, keepdims=True)
    clipped = grads * np.minimum(1, 0.5 / norms)
    wanted = self._adam(clipped, decay=0.2, decoupled=True)
    np.testing.assert_allclose(found[:, :2], wanted[:, :2], rtol=1e-5)

  def test_a_layer_is_no_other_that_begins_with_its_number(self):
    path = lambda name: (jax.tree_util.DictKey(name),)
    self.assertTrue(optimizer_lib.is_updated(path("layers_1"), (1, 3)))
    self.assertFalse(optimizer_lib.is_updated(path("layers_12"), (1, 3)))
    self.assertFalse(optimizer_lib.is_updated(path("output"), (1, 3)))
    self.assertTrue(optimizer_lib.is_updated(path("output"), ()))


class LearningRateTest(absltest.TestCase):

  def test_rises_linearly_and_falls_by_half_a_cosine(self):
    config = dataclasses.replace(
        _PLAIN, warmup_steps=2, schedule="cosine", lr_end=0.2
    )
    rates = [
        float(optimizer_lib.learning_rate(config, step, 7)) for step in range(7)
    ]
    half = 0.1 * (0.2 + 0.8 / 2)
    np.testing.assert_allclose(
        [rates[i] for i in (0, 1, 2, 4, 6)],
        [0.05, 0.1, 0.1, half, 0.02],
        rtol=1e-5,
    )

  def test_a_schedule_that_is_not_stepped_is_a_constant(self):
    rates = [
        float(optimizer_lib.learning_rate(_PLAIN, step, 7))
        for step in (0, 3, 6)
    ]
    np.testing.assert_allclose(rates, 0.1, rtol=1e-6)


if __name__ == "__main__":
  absltest.main()
