from absl.testing import absltest
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer.training import lm_probes
from tests.joma.transformer.training.made import tiny_task


def setUpModule():
  # These tests compile much and run little.
  jax.config.update("jax_disable_most_optimizations", True)


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


class ProbeTest(absltest.TestCase):

  @pytest.mark.slow
  def test_uniform_attention_over_35_positions(self):
    task = tiny_task.make_task(seq_len=35)
    params = tiny_task.init(task=task).params
    attn = params["layers_0"]["attn"]
    attn["query"]["kernel"] = jnp.zeros_like(attn["query"]["kernel"])
    batches = tiny_task.draw_batches(2, num_rows=2, seq_len=35)
    found = lm_probes.probe(params, batches, task=task)
    # ln(35!) / 35.
    np.testing.assert_allclose(found.entropy, [2.63250], atol=1e-4)
    np.testing.assert_allclose(found.effective_support, [18], rtol=1e-5)
    # The first token has 1 / t of the t-th query, .118 in the mean.
    np.testing.assert_array_equal(found.sink_rate, [0])
    kernel = np.array(params["layers_0"]["mlp"]["up"]["kernel"])
    squares = np.linalg.svd(kernel, compute_uv=False) ** 2
    np.testing.assert_allclose(
        found.stable_rank, [squares.sum() / squares[0]], rtol=1e-5
    )

  @pytest.mark.slow
  def test_padding_is_not_probed(self):
    task = tiny_task.make_task()
    params = tiny_task.init(task=task).params
    batches = tiny_task.draw_batches(1)
    weights = batches.weights.at[..., 2:].set(0)
    found = lm_probes.probe(
        params, batches._replace(weights=weights), task=task
    )
    half = jax.tree.map(lambda leaf: leaf[..., :2], batches)
    expected = lm_probes.probe(params, half, task=task)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)

  def test_probes_are_means_over_all_batches(self):
    task = tiny_task.make_task()
    params = tiny_task.init(task=task).params
    batches = tiny_task.draw_batches(3)
    one_by_one = [
        lm_probes.probe(
            params,
            jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batches),
            task=task,
        )
        for i in range(3)
    ]
    found = lm_probes.probe(params, batches, task=task)
    for name in ("entropy", "effective_support"):
      parts = [getattr(part, name) for part in one_by_one]
      self.assertGreater(np.ptp(parts, axis=0).max(), 1e-4)
      np.testing.assert_allclose(
          getattr(found, name), np.mean(parts, axis=0), rtol=1e-5
      )

  @pytest.mark.slow
  def test_maps_are_of_the_first_sequence(self):
    task = tiny_task.make_task()
    params = tiny_task.init(task=task).params
    batches = tiny_task.draw_batches(2)
    maps = lm_probes.attn_maps(params, batches, task=task)
    self.assertEqual(maps.shape, (1, 2, 6, 6))
    _, seen = task.model.apply(
        {"params": params}, batches.inputs[0], mutable="intermediates"
    )
    weights = seen["intermediates"]["layers_0"]["attn"]["attn_weights"][0]
    np.testing.assert_allclose(maps[0], weights[0], rtol=1e-5)


if __name__ == "__main__":
  absltest.main()
