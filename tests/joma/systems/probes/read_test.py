"""Named probes over a whole model, whatever is padding and split in calls."""

import functools

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.probes import names as probe_names
from joma.systems.probes import read
from joma.systems.probes import stream
from joma.systems.probes import update_rank
from joma.transformer import config as configs
from joma.transformer import inspection
from joma.transformer import model as models

_CONFIG = configs.TransformerConfig(
    vocab_size=16,
    num_layers=2,
    embed_dim=8,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    hidden_dim=12,
    max_len=8,
    attention=("softmax", "no_mixing"),
)
_NAMES = tuple(n for n in probe_names.PROBES if n != probe_names.OF_UPDATES)


_init = jax.jit(models.Transformer(_CONFIG).init)


@functools.cache
def _params(seed=0):
  return _init(jax.random.key(seed), np.zeros((1, 4), np.int32))["params"]


class ReadTest(absltest.TestCase):

  @pytest.mark.slow
  def test_a_model_is_read_by_layer_and_head(self):
    ids = np.random.default_rng(0).integers(0, 16, (1, 12))
    found = inspection.measure(_CONFIG, _params(), ids, 8, names=_NAMES)
    probes = found["probes"]
    shapes = {
        "secondary_sinks": (2,),
        "diversity": (2,),
        "local": (2, 2, 4),
    }
    for name, value in probes.items():
      self.assertEqual(value.shape, shapes.get(name, (2, 2)), name)
    rows = read.rows(probes)
    self.assertEqual(tuple(rows), read.row_names(_NAMES))
    # The second layer has no weights, and the stream all the same.
    for name, values in rows.items():
      is_known = np.isfinite(values).tolist()
      self.assertEqual(is_known, [True, name == "secondary_sinks"], name)

  @pytest.mark.slow
  def test_secondary_sinks_are_counted_by_the_layer_they_begin_behind(self):
    resid = np.tile(np.eye(12, dtype=np.float32)[None], (6, 1, 1))
    resid[1:5, 0] *= 50
    resid[2:4, 7] = resid[2:4, 0]
    resid[3:5, 9] = resid[3:5, 0]
    is_token = jnp.arange(12)[None] < jnp.array([12, 8])[:, None]
    both = jnp.stack([resid, resid])
    found = stream.text_sums(both, is_token)
    np.testing.assert_array_equal(found, [0, 2, 1, 0, 0])

  def test_updates_are_of_every_matrix_of_attention_and_mlp(self):
    found = update_rank.of_params(_params(0), _params(1))
    self.assertContainsSubset(
        [f"update_rank_{n}" for n in ("attn_query", "attn_out", "mlp_up")],
        found,
    )
    # [D, N H] of 8 x 8, [N H, D] likewise, and [D, F] of 8 x 12.
    self.assertGreater(found["update_rank_attn_query"][0], 4)
    none = update_rank.of_params(_params(0), _params(0))
    self.assertEqual(none["update_rank_mlp_up"].tolist(), [0, 0])


if __name__ == "__main__":
  absltest.main()
