from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.cache_policies.own_cache import int4


def plain(x, over, size):
  """Codes and what comes back, group by group in float32."""
  x, codes, back = np.float32(x), np.zeros(x.shape, int), np.zeros_like(x)
  num_tokens, num_channels = x.shape
  if over == "tokens":
    groups = [
        (slice(t, t + size), slice(c, c + 1))
        for t in range(0, num_tokens, size)
        for c in range(num_channels)
    ]
  else:
    groups = [
        (slice(t, t + 1), slice(c, c + size))
        for t in range(num_tokens)
        for c in range(0, num_channels, size)
    ]
  for group in groups:
    least, most = x[group].min(), x[group].max()
    scale = (most - least) / np.float32(15)
    steps = (x[group] - least) / scale if scale else 0 * x[group]
    codes[group] = np.clip(np.round(steps), 0, 15)
    back[group] = least + scale * np.float32(codes[group])
  return codes, back


class Int4Test(parameterized.TestCase):

  @parameterized.parameters(
      ("tokens", 4), ("channels", 3), ("tokens", 8), ("channels", 6)
  )
  @pytest.mark.by_default(0)
  def test_is_that_of_numpy(self, over, size):
    """To 1e-6 of numbers of order 1; one group is constant."""
    x = np.random.default_rng(0).standard_normal((2, 8, 6), np.float32)
    x[0, :4, 0], x[0, 0, :3] = 0.5, 0.5
    coded = int4.encode(jnp.asarray(x), over, size, jnp.float32)
    got = int4.decode(coded, over, size)
    for i, one in enumerate(x):
      codes, back = plain(one, over, size)
      low, high = np.asarray(coded.data[i]) & 15, coded.data[i] >> 4
      np.testing.assert_array_equal(np.concatenate([low, high], -1), codes)
      np.testing.assert_allclose(got[i], back, atol=1e-6)

  @pytest.mark.slow
  def test_is_off_by_half_a_step_at_most(self):
    x = np.random.default_rng(1).standard_normal((32, 16), np.float32)
    coded = int4.encode(jnp.asarray(x), "tokens", 32, jnp.float32)
    got = int4.decode(coded, "tokens", 32)
    bound = np.ptp(x, axis=0) / 30
    self.assertLessEqual(float((abs(got - x) - bound[None]).max()), 1e-6)

  @pytest.mark.slow
  def test_scales_of_bfloat16_are_made_up_for(self):
    """Codes go by the scales as they are kept: a step of theirs at most."""
    x = 100 + np.random.default_rng(1).standard_normal((32, 16), np.float32)
    coded = int4.encode(jnp.asarray(x), "tokens", 32, jnp.bfloat16)
    self.assertEqual(coded.scale.dtype, jnp.bfloat16)
    got = int4.decode(coded, "tokens", 32)
    # The offset, near 100, is rounded to 2^-8 of itself, which codes carry
    # where they can: it is the greatest of a group that may be out of reach.
    bound = np.ptp(x, axis=0) / 30 + 100 / 256
    self.assertLessEqual(float((abs(got - x) - bound[None]).max()), 1e-6)


if __name__ == "__main__":
  absltest.main()
