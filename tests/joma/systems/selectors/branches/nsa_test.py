"""Native sparse attention: its branches one by one, and how it chooses."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import masks
from scansnap_jax.experiment import errors
from tests.joma.systems import one_layer

_CONFIG = dataclasses.replace(one_layer.CONFIG, positions="none")


def _only(branch, entry, length=13):
  """The heads' outputs with the gate of one branch at 1, and what it read."""
  config, params, x = one_layer.draw(entry, _CONFIG, length=length)
  own = dict(params["nsa"])
  own["gate"] = jnp.zeros_like(own["gate"])
  # A sigmoid of 200 is 1 and one of -200 is 0, to the bit.
  own["bias"] = jnp.full((4, 3), -200.0).at[:, branch].set(200.0)
  params = params | {"nsa": own}
  got = one_layer.head_out(config, params, x, 0, "xla")
  project = lambda name: np.einsum(
      "BTD,DNH->BTNH", x, np.asarray(params[name]["kernel"])
  )
  return got, [project(name) for name in ("query", "key", "value")], params, x


def _attend(query, keys, values, is_seen):
  """Attention of [T, H] to [S, H]; rows of nothing give 0."""
  logits = np.where(is_seen, query @ keys.T / 8**0.5, -np.inf)
  raised = np.exp(logits - np.maximum(logits.max(-1, keepdims=True), -1e9))
  total = raised.sum(axis=-1, keepdims=True)
  return raised / np.where(total == 0, 1, total) @ values


class NsaTest(parameterized.TestCase):

  @parameterized.parameters("mean", "mlp")
  @pytest.mark.by_default(0)
  def test_compressed_reads_complete_blocks(self, compress):
    entry = f"nsa:block=3:compress={compress}:hidden=8"
    got, (query, key, value), params, _ = _only(0, entry)
    own = {name: np.asarray(leaf) for name, leaf in params["nsa"].items()}

    def compressed(blocks, of):
      if compress == "mean":
        return blocks.mean(axis=1)
      placed = (blocks + own[f"{of}_place"]).reshape(len(blocks), -1)
      inner = np.asarray(jax.nn.gelu(placed @ own[f"{of}_in"]))
      return inner @ own[f"{of}_out"]

    complete = (np.arange(13)[:, None] + 1) // 3 > np.arange(4)
    for head in range(4):
      keys, values = (
          compressed(x[0, :12, head // 2].reshape(4, 3, 8), of)
          for of, x in (("key", key), ("value", value))
      )
      want = _attend(query[0, :, head], keys, values, complete)
      np.testing.assert_allclose(got[0, :, head], want, atol=1e-5)
    np.testing.assert_array_equal(got[0, :2], 0)  # No block is complete yet.

  def test_selected_reads_the_blocks_of_most_weight(self):
    got, (query, key, value), _, _ = _only(1, "nsa:block=3:k=2")
    for group in range(2):
      keys = key[0, :12, group].reshape(4, 3, 8).mean(axis=1)
      heads = (2 * group, 2 * group + 1)
      for t in range(13):
        own, seen = t // 3, np.arange(13) // 3 == t // 3
        if own:
          raised = [
              np.exp(keys[:own] @ query[0, t, head] / 8**0.5) for head in heads
          ]
          best = sum(one / one.sum() for one in raised).argmax()
          seen |= np.arange(13) // 3 == best
        seen &= np.arange(13) <= t
        for head in heads:
          want = _attend(
              query[0, t : t + 1, head],
              key[0, :, group],
              value[0, :, group],
              seen[None],
          )
          np.testing.assert_allclose(got[0, t, head], want[0], atol=1e-5)

  @parameterized.parameters((1, "nsa:block=3:k=9"), (2, "nsa:window=99"))
  @pytest.mark.slow
  def test_a_branch_of_everything_is_attention(self, branch, entry):
    got, _, params, x = _only(branch, entry)
    plain = one_layer.head_out(_CONFIG, params, x)
    np.testing.assert_allclose(got, plain, atol=2e-6)

  @pytest.mark.slow
  def test_the_window_is_that_of_a_layer_with_one(self):
    got, _, params, x = _only(2, "nsa:window=4")
    config = dataclasses.replace(_CONFIG, windows=(4,))
    plain = one_layer.head_out(config, params, x)
    np.testing.assert_allclose(got, plain, atol=2e-6)

  def test_what_does_not_fit_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "compress='max' must be one"):
      one_layer.draw("nsa:compress=max")
    with self.assertRaisesRegex(errors.UserError, "no mask but the causal"):
      config, params, x = one_layer.draw("nsa", _CONFIG)
      ids = np.array([0] * 4 + [1] * 5)
      one_layer.run(config, params, x, mask=masks.document(ids))


if __name__ == "__main__":
  absltest.main()
