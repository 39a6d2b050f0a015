"""Tests of what methods read and return, neuron by neuron in NumPy."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from joma.inference.sparsity.gated import methods
from joma.inference.sparsity.gated import weights as weights_lib

_WIDTH, _NEURONS, _ROWS = 8, 12, 5


def make_weights(is_gated=True, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda n, m: jnp.asarray(rng.normal(size=(n, m)), jnp.float32)
  kernels = {"up": draw(_WIDTH, _NEURONS), "down": draw(_NEURONS, _WIDTH)}
  if is_gated:
    kernels["gate"] = draw(_WIDTH, _NEURONS)
  biases = {} if is_gated else {"up": draw(1, _NEURONS)[0]}
  return weights_lib.Weights(kernels, biases, "silu" if is_gated else "relu")


def make_x(seed=1):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(_ROWS, _WIDTH)), jnp.float32)


def _hidden(weights, x, kernels=None):
  """h of one token, in float64."""
  kernels = kernels or weights.kernels
  made = {
      name: (
          x @ np.float64(kernels[name])
          + np.float64(weights.biases.get(name, 0))
      )
      for name in weights.inner
  }
  if "gate" in made:
    return made["gate"] / (1 + np.exp(-made["gate"])) * made["up"]
  return np.maximum(made["up"], 0)


class MethodsTest(parameterized.TestCase):

  @parameterized.product(is_gated=(True, False))
  def test_teal_reads_the_rows_of_large_inputs(self, is_gated):
    weights, x = make_weights(is_gated), make_x()
    arrays = {"least_x": jnp.float32(0.7), "least_h": jnp.float32(0.4)}
    found = methods.Teal().update(weights, x, arrays)
    for row in range(_ROWS):
      kept = np.float64(x[row]) * (np.abs(x[row]) >= 0.7)
      hidden = _hidden(weights, kept)
      large = hidden * (np.abs(hidden) >= 0.4)
      out = large @ np.float64(weights.kernels["down"])
      np.testing.assert_allclose(found.out[row], out, rtol=1e-4, atol=1e-5)
      read = (1 + is_gated) * (kept != 0).sum() * _NEURONS
      read += (large != 0).sum() * _WIDTH
      self.assertAlmostEqual(float(found.read[row]), read, places=3)

  def test_a_low_rank_part_takes_what_thresholds_leave_out(self):
    weights, x = make_weights(), make_x()
    low = {
        f"low_{name}": {"first": kernel, "last": jnp.eye(kernel.shape[1])}
        for name, kernel in weights.kernels.items()
    }
    arrays = {"least_x": jnp.float32(0.7), "least_h": jnp.float32(0.4)}
    found = methods.RSparse(rank=4).update(weights, x, arrays | low)
    # The other part is the matrix itself: nothing is lost.
    wanted = weights.out(weights.dense_hidden(x))
    np.testing.assert_allclose(found.out, wanted, rtol=1e-4, atol=1e-5)
    teal = methods.Teal().update(weights, x, arrays)
    at_h = methods.is_large(weights.dense_hidden(x), jnp.float32(0.4))
    read = 2 * (np.abs(x) >= 0.7).sum(axis=1) * _NEURONS
    read = read + np.asarray(at_h.sum(axis=1)) * _WIDTH
    extra = 3 * 4 * (_WIDTH + _NEURONS)
    np.testing.assert_allclose(found.read, read + extra, rtol=1e-5)
    self.assertFalse(np.allclose(teal.out, wanted, atol=1e-2))

  @parameterized.product(is_gated=(True, False))
  def test_cats_reads_gate_and_the_rows_of_large_activations(self, is_gated):
    weights, x = make_weights(is_gated), make_x()
    found = methods.Cats().update(weights, x, {"least": jnp.float32(0.5)})
    for row in range(_ROWS):
      hidden = _hidden(weights, np.float64(x[row]))
      if is_gated:
        gate = np.float64(x[row]) @ np.float64(weights.kernels["gate"])
        active = np.abs(gate / (1 + np.exp(-gate))) >= 0.5
      else:
        active = hidden >= 0.5
      out = (hidden * active) @ np.float64(weights.kernels["down"])
      np.testing.assert_allclose(found.out[row], out, rtol=1e-4, atol=1e-5)
      read = _WIDTH * (_NEURONS + (1 + is_gated) * active.sum())
      self.assertAlmostEqual(float(found.read[row]), read, places=3)

  @parameterized.product(block_size=(1, 3), num=(1, 3))
  def test_an_oracle_keeps_what_moves_the_stream_most(self, block_size, num):
    weights, x = make_weights(), make_x()
    method = methods.Oracle(block_size=block_size)
    found = method.update(weights, x, {"num": jnp.int32(num)})
    down = np.float64(weights.kernels["down"])
    for row in range(_ROWS):
      hidden = _hidden(weights, np.float64(x[row]))
      moved = (hidden * np.linalg.norm(down, axis=1)) ** 2
      moved = moved.reshape(-1, block_size).sum(axis=1)
      kept = np.repeat(
          np.isin(np.arange(len(moved)), np.argsort(-moved)[:num]), block_size
      )
      out = (hidden * kept) @ down
      np.testing.assert_allclose(found.out[row], out, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.read, 3 * _WIDTH * num * block_size)

  def test_a_sketch_of_full_rank_and_exact_codes_are_the_oracle(self):
    weights, x = make_weights(), make_x()
    low = {
        f"low_{name}": {
            "first": weights.kernels[name],
            "last": jnp.eye(_NEURONS),
        }
        for name in ("up", "gate")
    }
    arrays = {"num": jnp.int32(4)} | low
    oracle = methods.Oracle().update(weights, x, arrays)
    sketch = methods.Sketched(rank=8).update(weights, x, arrays)
    coded = methods.Coded(bits=16, group_size=4).update(weights, x, arrays)
    for found in (sketch, coded):
      np.testing.assert_allclose(found.out, oracle.out, rtol=1e-3, atol=1e-4)
    extra = 2 * 8 * (_WIDTH + _NEURONS) + _NEURONS
    np.testing.assert_allclose(sketch.read, oracle.read + extra)
    # 16 bits, and 32 of scale and offset for four inputs: 1.5 weights each.
    extra = 2 * 1.5 * _WIDTH * _NEURONS + _NEURONS
    np.testing.assert_allclose(coded.read, oracle.read + extra, rtol=1e-6)

  def test_what_is_filled_is_between_the_copies_and_the_weights(self):
    weights, x = make_weights(), make_x()
    method = methods.Coded(bits=2, group_size=4, is_filled=True)
    found = method.update(weights, x, {"num": jnp.int32(3)})
    copies = {
        name: methods.rounded(kernel, 2, 4)
        for name, kernel in weights.kernels.items()
    }
    down = np.float64(weights.kernels["down"])
    for row in range(_ROWS):
      hidden = _hidden(weights, np.float64(x[row]))
      guess = _hidden(weights, np.float64(x[row]), copies)
      order = np.argsort(-np.abs(guess) * np.linalg.norm(down, axis=1))
      kept = np.isin(np.arange(_NEURONS), order[:3])
      out = (hidden * kept) @ down
      out += (guess * ~kept) @ np.float64(copies["down"])
      np.testing.assert_allclose(found.out[row], out, rtol=1e-4, atol=1e-4)
    whole = method.update(weights, x, {"num": jnp.int32(_NEURONS)})
    wanted = weights.out(weights.dense_hidden(x))
    np.testing.assert_allclose(whole.out, wanted, rtol=1e-4, atol=1e-4)

  def test_codes_are_off_by_half_a_step_and_counted_with_their_scales(self):
    kernel = np.float32(np.random.default_rng(2).normal(size=(10, 3)))
    back = np.asarray(methods.rounded(jnp.asarray(kernel), 4, 4))
    for first in (0, 4, 8):
      group = kernel[first : first + 4]
      step = (group.max(axis=0) - group.min(axis=0)) / 15
      gap = np.abs(back[first : first + 4] - group).max(axis=0)
      np.testing.assert_array_less(gap, step / 2 + 1e-6)
    # 4 bits and 2 x 16 for 32 inputs: 5 of 16.
    self.assertEqual(methods.share_of_codes(4, 32), 5 / 16)
    weights, x = make_weights(), make_x()
    found = methods.Quantized(bits=8, group_size=8).update(weights, x, {})
    np.testing.assert_allclose(found.read, 12 / 16 * weights.size)

  def test_a_predictor_chooses_by_its_scores(self):
    weights, x = make_weights(), make_x()
    scores = np.array([0.0, 3, 1, 2], np.float32)
    predictor = {
        "project": jnp.zeros((_WIDTH, 2)),
        "expand": jnp.zeros((2, 4)),
        "bias": jnp.asarray(scores),
    }
    method = methods.Learned(rank=2, block_size=3)
    found = method.update(
        weights, x, {"num": jnp.int32(2), "predictor": predictor}
    )
    kept = np.repeat([False, True, False, True], 3)
    wanted = jnp.where(kept, weights.dense_hidden(x), 0)
    wanted = wanted @ weights.kernels["down"]
    np.testing.assert_allclose(found.out, wanted, rtol=1e-4, atol=1e-5)
    read = 3 * _WIDTH * 6 + 2 * (_WIDTH + 4) + 4
    np.testing.assert_allclose(found.read, read)

  def test_weights_are_static_but_for_their_arrays(self):
    weights = make_weights()
    self.assertEqual(dataclasses.replace(weights).size, 3 * _WIDTH * _NEURONS)


if __name__ == "__main__":
  absltest.main()
