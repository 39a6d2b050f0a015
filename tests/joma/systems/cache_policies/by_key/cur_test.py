from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from joma.systems.cache_policies.by_key import cur
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import plain


class Plain(plain.Plain):
  """Shares of squared lengths among the kept of a chunk."""

  def priorities(self, tokens, position, head):
    def shares(name):
      squares = [np.sum(token[name] ** 2) for token in tokens]
      chunk = [token["pos"] // self.policy.chunk_size for token in tokens]
      total = {
          c: sum(
              s for s, other in zip(squares, chunk, strict=True) if other == c
          )
          for c in set(chunk)
      }
      return [s / total[c] for s, c in zip(squares, chunk, strict=True)]

    pairs = zip(shares("key"), shares("value"), strict=True)
    return [key * value for key, value in pairs]


_POLICY = cur.CUR(num_sinks=2, chunk_size=5)


class CURTest(parameterized.TestCase):

  def test_keeps_what_plain_python_keeps_at_every_step(self):
    plain.check(Plain, _POLICY, num_steps=10)

  @parameterized.parameters((4, 1), (4, 2), (3, 3))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, *heads):
    plain.check(Plain, _POLICY, *heads, num_steps=512)

  def test_out_of_range_is_named(self):
    with self.assertRaisesRegex(errors.UserError, "chunk_size=0"):
      cur.CUR(chunk_size=0)


if __name__ == "__main__":
  absltest.main()
