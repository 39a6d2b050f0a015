"""Which residual stream the predictors read, against dense models by hand.

The MLP of one layer that drops neurons of the last token is, for its logits,
the dense MLP without those rows of W_down. So a model of one layer is compared
with dense ones whose W_down has lost the rows that a predictor leaves out.
"""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.sparsity import contextual_config
from joma.inference.sparsity import contextual_sparsity as sparsity
from joma.inference.sparsity import plan as plan_lib
from joma.inference.sparsity import predictors
from joma.inference.sparsity import unit_rules
from joma.transformer import config as configs
from joma.transformer import model as models
from tests.joma.transformer import applied

_CONFIG = configs.TransformerConfig(
    vocab_size=31,
    num_layers=1,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=24,
    norm="layer_norm",
)
_NUM = 5
# Of float32 logits of size 3.
_TOLERANCE = 2e-5


@functools.cache
def _made():
  """Parameters, their predictor, and ten tokens."""
  tokens = jnp.asarray(np.random.default_rng(0).integers(31, size=(1, 10)))
  params = applied.params(models.Transformer(_CONFIG))
  draws = np.random.default_rng(1)
  params = jax.tree.map(
      lambda x: x + 0.4 * draws.standard_normal(x.shape, np.float32),
      jax.device_get(params),
  )
  found = predictors.init(
      contextual_config.PredictorConfig(rank=8), 1, 16, 24, 4
  )
  return params, found, tokens


def _dense_without(params, kept):
  """The model whose W_down has the rows `kept` alone."""
  layer = params["layers_0"]
  down = layer["mlp"]["down"]["kernel"] * kept[:, None]
  mlp = {**layer["mlp"], "down": {**layer["mlp"]["down"], "kernel": down}}
  return {**params, "layers_0": {**layer, "mlp": mlp}}


def _expected(stream):
  """Logits of each token when `stream`, sown, chooses its neurons."""
  params, found, tokens = _made()
  dense = models.Transformer(_CONFIG)
  run = jax.jit(
      lambda params: dense.apply(
          {"params": params}, tokens, mutable="intermediates"
      )
  )
  _, state = run(params)
  inputs = stream(state["intermediates"], params)
  scores = predictors.scores(predictors.layer(found, 0)["mlp"], inputs)
  logits = []
  for t, score in enumerate(np.asarray(scores[0])):
    kept = np.zeros(24, np.float32)
    kept[np.argsort(-score)[:_NUM]] = 1
    logits.append(run(_dense_without(params, kept))[0][0, t])
  return np.stack(logits)


def _before_attention(intermediates, params):
  del params
  return intermediates["resid_embed"][0]


def _after_attention(intermediates, params):
  """What the MLP's norm reads."""
  del params
  return intermediates["layers_0"]["resid_attn"][0]


class LookaheadTest(parameterized.TestCase):

  @parameterized.parameters((1, _before_attention), (0, _after_attention))
  @pytest.mark.slow
  def test_the_mlp_is_chosen_by_the_stream_that_lookahead_names(
      self, lookahead, stream
  ):
    params, found, tokens = _made()
    plan = plan_lib.SparsityPlan(
        mlp=unit_rules.Predicted(num=_NUM, rank=8, num_units=24),
        lookahead=lookahead,
    )
    model = sparsity.SparseTransformer(_CONFIG, plan=plan)
    prepared = sparsity.prepare(_CONFIG, params, predictors=found)
    logits = model.apply({"params": prepared}, tokens)[0]
    np.testing.assert_allclose(logits, _expected(stream), atol=_TOLERANCE)
    # The other stream would choose other neurons.
    others = {_before_attention, _after_attention} - {stream}
    other = _expected(others.pop())
    self.assertGreater(np.abs(logits - other).max(), 0.01)


if __name__ == "__main__":
  absltest.main()
