"""A step over coded blocks, beside NumPy in float64."""

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import interpret
from kernels_pallas.decode import shapes
from kernels_pallas.decode.coded import api
from kernels_pallas.decode.coded import codes
from kernels_pallas.decode.coded import cost


def draw(batch, num_heads, num_kv_heads, num_blocks, size=128, head_dim=128):
  rng = np.random.default_rng(num_heads + num_blocks)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  # Channels of keys differ in size, as they do in models.
  wide = np.exp(normal(num_kv_heads, 1, head_dim))
  lead = (batch, num_blocks, num_kv_heads, size, head_dim)
  newest = (batch, num_kv_heads, size, head_dim)
  return (
      normal(batch, num_heads, head_dim) * head_dim**-0.25,
      normal(*lead) * wide * head_dim**-0.25 + 0.5,
      normal(*lead) - 1,
      normal(*newest) * head_dim**-0.25,
      normal(*newest),
  )


def plain(query, key, value, newest_key, newest_value, position, scale):
  """One sequence, token by token; keys and values as they come back."""
  size, out = newest_key.shape[1], np.zeros(query.shape)
  groups = len(query) // len(newest_key)
  for n, q in enumerate(np.float64(query)):
    k = n // groups
    tokens = [
        (key[m, k, r], value[m, k, r])
        for m in range(position // size)
        for r in range(size)
    ]
    tokens += [
        (newest_key[k, r], newest_value[k, r])
        for r in range(position % size + 1)
    ]
    logits = np.array([scale * q @ np.float64(x) for x, _ in tokens])
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    out[n] = sum(
        w * np.float64(x) for w, (_, x) in zip(weights, tokens, strict=True)
    )
  return out


def coded(key, value, dtype=jnp.float32):
  keys = codes.encode(jnp.asarray(key), "tokens", dtype)
  return keys, codes.encode(jnp.asarray(value), "channels", dtype)


class CodesTest(absltest.TestCase):

  def test_codes_are_those_of_numpy(self):
    _, key, value, *_ = draw(1, 2, 1, 2, size=4, head_dim=6)
    for x, over, axis in ((key, "tokens", -2), (value, "channels", -1)):
      blocks = codes.encode(jnp.asarray(x), over, jnp.float32)
      low = x.min(axis=axis, keepdims=True)
      step = (x.max(axis=axis, keepdims=True) - low) / np.float32(15)
      wanted = np.round((x - low) / step)
      found = np.concatenate([blocks.data & 15, blocks.data >> 4], axis=-2)
      # Keys have a row a channel.
      found = found.swapaxes(-1, -2) if over == "tokens" else found
      np.testing.assert_array_equal(found, wanted)
      np.testing.assert_allclose(
          codes.decode(blocks, over), low + step * wanted, atol=1e-6
      )


class AttendTest(parameterized.TestCase):

  @parameterized.parameters(
      ("reference", 4, 2, (5, 128, 300)),
      ("pallas_tpu", 4, 2, (5, 128, 300)),
  )
  @pytest.mark.by_default(0)
  def test_is_that_of_numpy(self, implementation, heads, kv_heads, positions):
    """To 1e-6 of values of order 1 and more; -1 is no token."""
    arrays = draw(3, heads, kv_heads, 3)
    keys, values = coded(arrays[1], arrays[2])
    with interpret.interpreted():
      found = api.attend(
          jnp.asarray(arrays[0]),
          keys,
          values,
          *map(jnp.asarray, arrays[3:]),
          jnp.array(positions),
          scale=0.7,
          implementation=implementation,
      )
    key = np.asarray(codes.decode(keys, "tokens"))
    value = np.asarray(codes.decode(values, "channels"))
    for b, position in enumerate(positions):
      wanted = plain(
          arrays[0][b],
          key[b],
          value[b],
          *(x[b] for x in arrays[3:]),
          position,
          0.7,
      )
      np.testing.assert_allclose(found[b], wanted, atol=4e-6)

  @parameterized.product(heads=((1, 1), (8, 8), (6, 3)), num_blocks=(1, 4))
  @pytest.mark.slow
  def test_other_heads_and_blocks_in_both_types(self, heads, num_blocks):
    arrays = draw(2, *heads, num_blocks)
    positions = jnp.array([128 * num_blocks + 7, -1])
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 5e-2)):
      keys, values = coded(arrays[1], arrays[2], dtype)
      as_type = lambda x, dtype=dtype: jnp.asarray(x, dtype)
      query, *newest = map(as_type, (arrays[0], *arrays[3:]))
      made = []
      for implementation in ("reference", "pallas_tpu"):
        with interpret.interpreted():
          made.append(
              api.attend(
                  query,
                  keys,
                  values,
                  *newest,
                  positions,
                  scale=1.0,
                  implementation=implementation,
              ).astype(jnp.float32)
          )
      np.testing.assert_allclose(made[1][0], made[0][0], atol=tolerance)
      np.testing.assert_array_equal(made[0][1], 0)
      np.testing.assert_array_equal(made[1][1], 0)

  def test_sizes_that_do_not_fit_are_named(self):
    arrays = draw(1, 2, 2, 1, size=4, head_dim=8)
    keys, values = coded(arrays[1], arrays[2])
    query, *newest = map(jnp.asarray, (arrays[0], *arrays[3:]))
    attend = lambda *x, **options: api.attend(
        *x, jnp.array([1]), scale=1.0, **options
    )
    with interpret.interpreted():
      with self.assertRaisesRegex(
          ValueError, "blocks of 4 tokens and heads of 8"
      ):
        attend(query, keys, values, *newest, implementation="pallas_tpu")
      with self.assertRaisesRegex(ValueError, "pallas_gpu"):
        attend(query, keys, values, *newest, implementation="pallas_gpu")
    short = [x[:, :, :2] for x in newest]
    with self.assertRaisesRegex(ValueError, "keys have codes"):
      attend(query, keys, values, *short)
    with self.assertRaisesRegex(ValueError, "3 query heads"):
      attend(jnp.zeros((1, 3, 8)), keys, values, *newest)

  def test_bytes_are_those_of_the_arrays(self):
    shape = shapes.Shape(
        batch=2, num_heads=4, num_kv_heads=2, capacity=512, head_dim=128
    )
    arrays = draw(2, 4, 2, 4)
    both = coded(arrays[1], arrays[2], jnp.bfloat16)
    size = lambda x: np.asarray(x).nbytes
    read = sum(size(x) for b in both for x in (b.data, b.scale, b.offset))
    # Newest block, query and out of 2 bytes, positions of 4.
    read += sum(x.size * 2 for x in arrays[3:]) + 2 * arrays[0].size * 2 + 8
    self.assertEqual(cost.attend(shape).bytes_accessed, read)


if __name__ == "__main__":
  absltest.main()
