from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.cache_policies import chunks
from joma.systems.cache_policies.by_attention import chunkkv
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """What the last queries gave to all of a token's chunk."""

  def score_prompt(self, tokens, seen):
    first = max(seen.length - self.policy.window, 0)
    for t, token in enumerate(tokens):
      token["score"] = seen.weights[:, first:, t].mean()

  def priorities(self, tokens, position, head):
    sums = {}
    # In the order of the text, as floats are added there.
    for token in sorted(tokens, key=lambda token: token["pos"]):
      chunk = token["pos"] // self.policy.chunk_size
      sums[chunk] = sums.get(chunk, 0.0) + token["score"]
    return [sums[token["pos"] // self.policy.chunk_size] for token in tokens]

  def observe(self, kept, rows, position):
    for i, token in enumerate(kept):
      given = sum(weights[i] for _, weights in rows) / len(rows)
      token["score"] += (given - token["score"]) / self.policy.window


_POLICY = chunkkv.ChunkKV(chunk_size=3, window=4)


class ChunkKVTest(parameterized.TestCase):

  def test_keeps_what_plain_python_keeps_at_every_step(self):
    plain.check(Plain, _POLICY)

  @parameterized.parameters((4, 1), (4, 2), (3, 3))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, *heads):
    plain.check(Plain, _POLICY, *heads, num_steps=512)

  def test_sums_of_chunks_by_hand(self):
    score = jnp.array([[[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]]])
    pos = jnp.array([[[7, 0, 6, -1, 2, 4]]], jnp.int32)
    found = chunks.sums(score, pos, 3)
    np.testing.assert_array_equal(found[0, 0], [5, 18, 5, 8, 18, 32])

  @parameterized.parameters(dict(chunk_size=0), dict(window=0))
  def test_out_of_range_is_named(self, **fields):
    (name,) = fields
    with self.assertRaisesRegex(Exception, f"{name}=0"):
      chunkkv.ChunkKV(**fields)


if __name__ == "__main__":
  absltest.main()
