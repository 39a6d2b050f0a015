"""A bias of rows and columns: shifts change nothing, and its twin is blind."""

import functools
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from joma.systems.score_rules import grid_bias
from joma.transformer import attention
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import model as models
from kernels_pallas import masks
from scansnap_jax.experiment import errors
from tests import draws
from tests.joma.transformer import applied

_ROWS, _COLUMNS, _FIRST = 3, 4, 2
_LENGTH = _FIRST + _ROWS * _COLUMNS + 1
# Which a rule of places alone asks nothing.
_CALL = mock.Mock(spec=hooks.Call)
_ENTRY = f"grid_bias:rows={_ROWS}:columns={_COLUMNS}:first={_FIRST}:start=1.0"


def _bias(system, seed=0, length=_LENGTH):
  """Of all pairs of positions [N, T, T], and the table."""
  config = configs.TransformerConfig(num_heads=2, num_kv_heads=1)
  params = system.init_params(jax.random.key(seed), config, 0)
  rule = system.weights(params, _CALL)
  places = jnp.arange(length)[None]
  query = jnp.zeros((1, length, 2, 4))
  return np.asarray(rule.bias(query, places, places)[0]), params["bias"]


class GridBiasTest(parameterized.TestCase):

  def test_is_of_row_and_column_distance(self):
    found, table = _bias(
        grid_bias.GridBias(rows=3, columns=4, first=2, start=1.0)
    )
    for t in range(_LENGTH):
      for s in range(_LENGTH):
        cells = [place - _FIRST for place in (t, s)]
        if not all(0 <= cell < 12 for cell in cells):
          np.testing.assert_array_equal(found[:, t, s], 0)
          continue
        (row, column), (of_row, of_column) = (divmod(c, 4) for c in cells)
        want = table[row - of_row + 2, column - of_column + 3]
        np.testing.assert_array_equal(found[:, t, s], want)

  def test_positions_may_be_of_numpy(self):
    config = configs.TransformerConfig(
        vocab_size=5,
        num_layers=1,
        embed_dim=8,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        hidden_dim=8,
        attention=(_ENTRY,),
    )
    model = models.Transformer(config, implementation="reference")
    tokens = jnp.zeros((2, 7), jnp.int32)
    positions = np.broadcast_to(np.arange(7), (2, 7))
    apply = lambda: model.init_with_output(
        jax.random.key(0), tokens, positions=positions
    )
    self.assertEqual(jax.eval_shape(apply)[0].shape, (2, 7, 5))

  def test_a_shift_on_the_grid_changes_nothing(self):
    system = grid_bias.GridBias(rows=4, columns=5, start=1.0)
    found, _ = _bias(system, length=20)
    at = lambda row, column: 5 * row + column
    for row, column in ((0, 0), (1, 0), (0, 2), (2, 1)):
      one = found[:, at(row + 1, column + 1), at(row, column)]
      np.testing.assert_array_equal(one, found[:, at(1, 1), at(0, 0)])
    # The end of a row is no neighbour of the next one's start.
    side = found[:, at(0, 1), at(0, 0)]
    self.assertFalse(np.array_equal(found[:, at(1, 0), at(0, 4)], side))

  def test_one_row_is_the_flattened_grid(self):
    found, _ = _bias(grid_bias.GridBias(rows=1, columns=20, start=1.0), 0, 20)
    for apart in (-3, 1, 4):
      line = np.diagonal(found, offset=-apart, axis1=1, axis2=2)
      np.testing.assert_array_equal(
          line, np.broadcast_to(line[:, :1], line.shape)
      )

  def test_logits_have_it(self):
    sizes = dict(num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1)
    sizes |= dict(head_dim=4, positions="none")
    places = jnp.arange(_LENGTH)[None]
    arguments = (draws.normal(0, 1, _LENGTH, 8), places, masks.causal(_LENGTH))
    params, logits = None, []
    for entry in (_ENTRY, "softmax"):
      config = configs.TransformerConfig(**sizes, attention=(entry,))
      module = attention.Attention(config, 0, implementation="reference")
      if params is None:
        params = applied.layer_params(config, 0, module, *arguments)
      run = jax.jit(functools.partial(module.apply, mutable="intermediates"))
      seen = run({"params": params}, *arguments)[1]["intermediates"]
      logits.append(np.asarray(seen["attn_logits"][0][0]))
    rule = grid_bias.GridBias(rows=_ROWS, columns=_COLUMNS, first=_FIRST)
    rule = rule.weights(params["grid_bias"], _CALL)
    query = jnp.zeros((1, _LENGTH, 2, 4))
    bias = np.asarray(rule.bias(query, places, places))[0]
    self.assertGreater(np.abs(bias).max(), 0.5)
    seen = np.isfinite(logits[1])
    np.testing.assert_allclose(
        logits[0][seen], (logits[1] + bias)[seen], atol=1e-5
    )

  @parameterized.parameters("rows", "columns")
  def test_a_grid_without_cells_is_refused(self, name):
    with self.assertRaisesRegex(errors.UserError, f"{name} must be at least"):
      grid_bias.GridBias(**{name: 0})


if __name__ == "__main__":
  absltest.main()
