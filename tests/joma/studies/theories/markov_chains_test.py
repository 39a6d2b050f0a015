from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.studies.theories import markov_chains


def _params(rng, length, size):
  return {
      "distance": jnp.asarray(rng.normal(size=length)),
      "match": jnp.asarray(rng.normal(size=(size, size))),
      "strength": jnp.asarray(0.7),
  }


class ChainsTest(absltest.TestCase):

  @pytest.mark.slow
  def test_rows_are_drawn_evenly_from_all_distributions(self):
    found = np.asarray(
        markov_chains.draw_chains(jax.random.key(0), 40_000, 3, 2)
    )
    first, second, third = found.T
    for column in (first, second, third):
      share = np.bincount(column, minlength=3) / 40_000
      np.testing.assert_allclose(share, 1 / 3, atol=0.012)
    # Of a row drawn evenly, E p_n^2 = 2 / (k (k + 1)) = 1/6: what has followed
    # once, follows again with (1 + 1) / (1 + 3).
    again = (first == second) & (second == third)
    stayed = (first == second).mean()
    self.assertAlmostEqual(again.mean() / stayed, 1 / 2, delta=0.02)

  def test_references_are_counts_plus_one(self):
    chains = np.array([[0, 1, 0, 1, 1], [2, 2, 2, 0, 2]])
    losses = {"unigram": [], "bigram": []}
    for chain in chains:
      for i in range(4):
        past, now, following = chain[: i + 1], chain[i], chain[i + 1]
        count = (past == following).sum()
        losses["unigram"].append(-np.log((count + 1) / (i + 1 + 3)))
        pairs = [*zip(past[:-1], past[1:], strict=True)]
        count = sum(pair == (now, following) for pair in pairs)
        total = sum(pair[0] == now for pair in pairs)
        losses["bigram"].append(-np.log((count + 1) / (total + 3)))
    found = markov_chains.references(chains, 3)
    for name, want in losses.items():
      self.assertAlmostEqual(found[name], np.mean(want))


class LayersTest(absltest.TestCase):

  def test_two_layers_by_loops(self):
    rng = np.random.default_rng(0)
    chains = rng.integers(0, 3, (2, 5))
    with jax.enable_x64(True):
      params = _params(rng, 4, 3)
      found = markov_chains.predict(params, jnp.asarray(chains))
      loss = markov_chains.mean_loss(params, jnp.asarray(chains))
    p = {name: np.asarray(value) for name, value in params.items()}
    total = 0.0
    softmax = lambda x: np.exp(x) / np.exp(x).sum()
    for b, chain in enumerate(chains):
      x, h = np.eye(3)[chain], []
      for i in range(4):
        weights = softmax([p["distance"][i - j] for j in range(i + 1)])
        h.append(weights @ x[: i + 1])
        logits = [x[i] @ p["match"] @ h[j] for j in range(i + 1)]
        read = softmax(logits) @ x[: i + 1]
        want = softmax(0.7 * np.log(read + 3 / (i + 1)))
        np.testing.assert_allclose(np.exp(found[b, i]), want, rtol=1e-6)
        total -= np.log(want[chain[i + 1]]) / 8
    self.assertAlmostEqual(float(loss), total, places=6)

  @pytest.mark.slow
  def test_the_first_layer_has_no_slope_under_a_second_of_zeros(self):
    rng = np.random.default_rng(1)
    chains = jnp.asarray(rng.integers(0, 3, (4, 8)))
    params = _params(rng, 7, 3)
    slope = jax.grad(markov_chains.mean_loss)
    self.assertGreater(np.abs(slope(params, chains)["distance"]).max(), 1e-4)
    params["match"] = jnp.zeros((3, 3))
    found = slope(params, chains)
    np.testing.assert_array_equal(found["distance"], 0)
    self.assertGreater(np.abs(found["match"]).max(), 1e-4)

  @pytest.mark.slow
  def test_formed_goes_from_chance_to_certain(self):
    params = {"distance": jnp.zeros(5), "match": jnp.ones((3, 3))}
    found = markov_chains.formed(params)
    np.testing.assert_allclose([*found.values()], 0, atol=1e-6)
    params["distance"] = params["distance"].at[1].set(30.0)
    params["match"] = params["match"] + 30 * jnp.eye(3)
    found = markov_chains.formed(params)
    np.testing.assert_allclose([*found.values()], 1, atol=1e-6)
    # Weights of 4 : 1 : 1 : 1 : 1, and of e^ln 4 : 1 : 1.
    params["distance"] = jnp.zeros(5).at[1].set(np.log(4))
    params["match"] = jnp.eye(3) * np.log(4)
    found = markov_chains.formed(params)
    self.assertAlmostEqual(float(found["layer 1"]), (0.5 - 0.2) / 0.8, 5)
    self.assertAlmostEqual(float(found["layer 2"]), (2 / 3 - 1 / 3) * 1.5, 5)


if __name__ == "__main__":
  absltest.main()
