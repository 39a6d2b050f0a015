"""Overlaps of planted choices."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from joma.inference.sparsity import neuron_overlap


class NeuronOverlapTest(absltest.TestCase):

  def test_planted_choices_overlap_as_planted(self):
    """Blocks of two neurons, two of eight chosen.

    Layer 0: all texts use blocks 0 and 1. Layer 1: text b uses blocks 2 b and
    2 b + 1. Layer 2: prompts use blocks 0 and 1, what follows 1 and 2, and all
    in all 1 more than any.
    """
    rng = np.random.default_rng(0)
    hidden = 0.01 * np.abs(rng.normal(size=(3, 2, 10, 8, 2)))
    hidden[0, :, :, :2] += 1
    for b in range(2):
      hidden[1, b, :, 2 * b : 2 * b + 2] += 1
    hidden[2, :, :6, 0] += 1
    hidden[2, :, :, 1] += 2
    hidden[2, :, 6:, 2] += 1
    hidden = jnp.asarray(hidden.reshape(3, 2, 10, 16), jnp.float32)
    measure = jax.jit(neuron_overlap.measure, static_argnums=(1, 2, 3))
    found = measure(hidden, 6, 2, 2)
    np.testing.assert_allclose(found.texts, [1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(found.continuation, [1, 1, 0.5], atol=1e-6)
    # Text 0 has the same blocks in layers 0 and 1, text 1 others.
    np.testing.assert_allclose(found.layers[0], [1, 0.5, 1], atol=1e-6)
    self.assertEqual(found.chance, 0.25)


if __name__ == "__main__":
  absltest.main()
