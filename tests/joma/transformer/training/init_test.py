import dataclasses
import math

from absl.testing import absltest
import chex
import jax
import numpy as np
import pytest

from joma.transformer import config as config_lib
from joma.transformer import model as model_lib
from joma.transformer.training import init as init_lib
from joma.transformer.training import lm_config
from scansnap_jax.experiment import errors

_MODEL = dataclasses.replace(
    config_lib.authors_encoder(num_layers=2),
    vocab_size=600,
    embed_dim=24,
    head_dim=24,
    hidden_dim=40,
)


def _init(**changes):
  settings = dict(model=_MODEL, init="pytorch") | changes
  config = lm_config.LmConfig(**settings)
  return init_lib.init_params(config, model_lib.Transformer(config.model))


class InitParamsTest(absltest.TestCase):

  @pytest.mark.slow
  def test_pytorch_bounds_are_filled_and_kept(self):
    params = _init()
    layer = params["layers_1"]
    attn, mlp = layer["attn"], layer["mlp"]
    fused = math.sqrt(6 / (24 + 3 * 24))
    bounds = [
        (params["token_embed"]["embedding"], 0.1),
        (params["output"]["kernel"], 0.1),
        (attn["query"]["kernel"], fused),
        (attn["key"]["kernel"], fused),
        (attn["value"]["kernel"], fused),
        (attn["out"]["kernel"], 24**-0.5),
        (mlp["up"]["kernel"], 24**-0.5),
        (mlp["up"]["bias"], 24**-0.5),
        (mlp["down"]["kernel"], 40**-0.5),
        (mlp["down"]["bias"], 40**-0.5),
    ]
    for values, bound in bounds:
      values = np.abs(values)
      self.assertLessEqual(values.max(), bound)
      # The largest of 24 draws is below .7 bound once in 5,000 seeds.
      self.assertGreater(values.max(), 0.7 * bound)
    for zero in (params["output"], attn["query"], attn["out"]):
      np.testing.assert_array_equal(zero["bias"], 0)
    np.testing.assert_array_equal(layer["attn_norm"]["scale"], 1)
    np.testing.assert_array_equal(layer["attn_norm"]["bias"], 0)

  @pytest.mark.slow
  def test_no_two_parameters_are_one_draw(self):
    attn = _init()["layers_0"]["attn"]
    query, key = attn["query"]["kernel"], attn["key"]["kernel"]
    self.assertGreater(np.abs(query - key).max(), 0.01)

  @pytest.mark.slow
  def test_identical_layers_are_copies_of_the_first(self):
    params = _init(identical_layers=True)
    chex.assert_trees_all_equal(params["layers_0"], params["layers_1"])
    free = _init()
    chex.assert_trees_all_equal(params["layers_0"], free["layers_0"])
    self.assertGreater(
        np.abs(
            free["layers_0"]["mlp"]["up"]["kernel"]
            - free["layers_1"]["mlp"]["up"]["kernel"]
        ).max(),
        0.01,
    )

  @pytest.mark.slow
  def test_seeds_differ(self):
    one, two = (_init(seed=seed)["output"]["kernel"] for seed in (1, 2))
    self.assertGreater(np.abs(one - two).max(), 0.01)

  @pytest.mark.slow
  def test_shapes_are_those_of_the_model(self):
    shapes = jax.tree.map(np.shape, _init())
    self.assertEqual(shapes, jax.tree.map(np.shape, _init(init="model")))


class MemoryTest(absltest.TestCase):

  def test_a_model_that_no_memory_holds_is_refused_by_its_size(self):
    config = config_lib.TransformerConfig(embed_dim=2**31 - 2)
    with self.assertRaisesRegex(
        errors.UserError, r"a model of [\d,]{17,} parameters with its gradient"
    ):
      init_lib.check_memory(config)
    init_lib.check_memory(config_lib.TransformerConfig())


if __name__ == "__main__":
  absltest.main()
