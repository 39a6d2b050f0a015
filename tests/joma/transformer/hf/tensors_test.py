"""Tests of the table between tensors of a file and leaves of our tree."""

from absl.testing import absltest
from absl.testing import parameterized
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import model
from joma.transformer.hf import tensors
from tests.joma.transformer import tiny_models

_SIZES = {"V": 11, "P": 9, "E": 7, "D": 5, "F": 6, "N": 4, "K": 2, "H": 3}
_SIZES["3"] = 3
_PATTERNS = sorted({
    row.pattern
    for table in tensors.TABLES.values()
    for row in (*table.rows, *table.layer_rows)
})


def _numbered(*shape):
  return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


class PatternTest(parameterized.TestCase):

  @parameterized.parameters(*_PATTERNS)
  def test_writing_undoes_reading(self, pattern):
    tensor = _numbered(*tensors.file_shape(pattern, _SIZES))
    leaves = tensors.from_file(tensor, pattern, _SIZES)
    for leaf in leaves:
      self.assertEqual(leaf.shape, tensors.leaf_shape(pattern, _SIZES))
    back = tensors.to_file(leaves, pattern, _SIZES)
    np.testing.assert_array_equal(back, tensor)
    self.assertTrue(back.flags.c_contiguous)

  def test_rows_of_llama_are_heads_then_sizes(self):
    # q_proj is [out, in], out = n H + h.
    tensor = _numbered(12, 5)
    (leaf,) = tensors.from_file(tensor, "(N H) D -> D N H", _SIZES)
    self.assertEqual(leaf[4, 2, 1], tensor[2 * 3 + 1, 4])

  def test_columns_of_gpt2_are_query_then_key_then_value(self):
    # c_attn is [in, out], out = c N H + n H + h with c = 1 for keys.
    tensor = _numbered(5, 36)
    leaves = tensors.from_file(tensor, "D (3 N H) -> 3 D N H", _SIZES)
    self.assertLen(leaves, 3)
    self.assertEqual(leaves[1][4, 2, 1], tensor[4, 1 * 12 + 2 * 3 + 1])

  def test_rows_of_gpt_neox_are_heads_then_query_key_value(self):
    # query_key_value is [out, in], out = n 3 H + c H + h.
    tensor = _numbered(36, 5)
    leaves = tensors.from_file(tensor, "(N 3 H) D -> 3 D N H", _SIZES)
    self.assertEqual(leaves[2][4, 1, 0], tensor[1 * 9 + 2 * 3 + 0, 4])


class TableTest(parameterized.TestCase):

  @parameterized.parameters(*tiny_models.NAMES)
  @pytest.mark.by_default(1, 5)
  def test_leaves_are_those_of_the_model(self, name):
    config = tiny_models.config_of(name)
    shapes = jax.eval_shape(
        model.Transformer(config).init,
        jax.random.key(0),
        jnp.zeros((1, 2), jnp.int32),
    )
    expected = traverse_util.flatten_dict(shapes["params"], sep="/")
    table = tensors.TABLES[tiny_models.fields_of(name)["model_type"]]
    rows = list(table.rows_of(config))
    sizes = tensors.sizes_of(config)
    actual = {
        leaf: tensors.leaf_shape(row.pattern, sizes)
        for row in rows
        for leaf in row.leaves.split()
    }
    self.assertEqual(actual, {k: v.shape for k, v in expected.items()})
    # Each leaf and each tensor once.
    self.assertLen(actual, sum(len(row.leaves.split()) for row in rows))
    self.assertLen({row.name for row in rows}, len(rows))


if __name__ == "__main__":
  absltest.main()
