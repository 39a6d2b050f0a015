"""Seats for attention systems cost nothing where nobody sits.

The numbers are those of the model before it had any, by the same program and
jax: parameters, FLOPs and temporary bytes of a training step and of a decode
step.
"""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models
from joma.transformer.text import batches
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step

_JAX = "0.10.2"  # Another compiler counts otherwise.
_NUM_PARAMS = 20_640
_SHAPE = configs.TransformerConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=64,
)


def _cost(lowered):
  # As users compile, whatever the tests' own flags (`conftest`).
  options = {"xla_cpu_use_fusion_emitters": True}
  compiled = lowered.compile(compiler_options=options)
  memory = compiled.memory_analysis()
  return compiled.cost_analysis()["flops"], memory.temp_size_in_bytes


@absltest.skipUnless(jax.default_backend() == "cpu", "measured on a CPU")
@absltest.skipUnless(jax.__version__ == _JAX, f"measured with jax {_JAX}")
class PlainCostTest(parameterized.TestCase):

  # With remat 9,024 FLOPs and 640 bytes less than before there were seats, ever
  # since hooks read what projections give.
  @parameterized.parameters(
      ("none", 17_702_268, 929_184), ("full", 21_751_436, 864_040)
  )
  @pytest.mark.slow
  def test_a_step_of_training(self, remat, flops, temp_bytes):
    config = lm_config.LmConfig(
        model=_SHAPE, batch_size=4, seq_len=32, remat=remat
    )
    task = lm_step.make_task(config, 1, 1, "xla")
    state = jax.eval_shape(lambda: lm_step.init(task))
    sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)]
    self.assertEqual(sum(sizes), _NUM_PARAMS)
    array = lambda kind: jax.ShapeDtypeStruct((1, 4, 32), kind)
    batch = batches.Batch(
        array(jnp.int32), array(jnp.int32), array(jnp.float32)
    )
    step = jax.jit(
        lambda state, batch: lm_step.train(state, batch, task=task),
        donate_argnums=0,
    )
    lowered = step.lower(state, batch)
    self.assertEqual(_cost(lowered), (flops, temp_bytes))

  def test_a_step_of_decoding(self):
    model = models.Transformer(_SHAPE, implementation="xla")
    one = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    variables = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((2, 1), jnp.int32)
    )
    cache = jax.eval_shape(lambda: full_cache.init(_SHAPE, 2, 64))
    step = jax.jit(
        lambda params, tokens, positions, cache: model.apply(
            {"params": params}, tokens, positions=positions, kv_cache=cache
        ),
        donate_argnums=3,
    )
    lowered = step.lower(variables["params"], one, one, cache)
    self.assertEqual(_cost(lowered), (127_126, 4_400))


if __name__ == "__main__":
  absltest.main()
