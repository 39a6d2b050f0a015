"""Every system trains and decodes on TPUs that are not there."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models
from joma.transformer import sharding
from joma.transformer.text import batches
from joma.transformer.training import layouts
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from kernels_pallas.aot import chips
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import topology

_ENTRIES = ("sink_logits", "lightning", "hip:k=256:block=128", "gdn", "kda")
# Whose products are those of plain attention, or of XLA alone.
_OTHERS = (
    "key_bias",
    "self_gating",
    "pointwise",
    "distance_bias",
    "positional",
    "duo_gates",
    "landmark:k=2",
    "indexer:k=128",
    "superlinear",
    "xattention",
)
# What adds to softmax, or is attention to fewer keys, runs on the kernels.
_ON_KERNELS = ("key_bias", "superlinear", "xattention")


def _model(entry):
  return configs.TransformerConfig(
      vocab_size=256,
      num_layers=1,
      embed_dim=128,
      num_heads=2,
      num_kv_heads=2,
      head_dim=128,
      hidden_dim=256,
      attention=(entry,),
  )


def _train(entry, chip, num_devices):
  """A training step on a mesh of 2 x 2 or more devices."""
  config = lm_config.LmConfig(
      model=_model(entry), batch_size=8, seq_len=512, dtype="bfloat16"
  )
  task = lm_step.make_task(config, 1, 1)
  devices = topology.device_mesh(chips.get_chip(chip), num_devices).devices
  mesh = sharding.make_mesh(2, 2, 1, devices.ravel().tolist())
  layout = layouts.Sharded(mesh)
  state = layout.to_restore(jax.eval_shape(lambda: lm_step.init(task)))
  place = sharding.batch_sharding(mesh, 3, batch_axis=1)
  array = lambda kind: jax.ShapeDtypeStruct((1, 8, 512), kind, sharding=place)
  batch = batches.Batch(array(np.int32), array(np.int32), array(np.float32))
  with jax.set_mesh(mesh):
    step = layout.compiled(lm_step.train, state, True, task=task)
    return topology.compiled(step.lower(state, batch))


def _decode(entry, chip, length):
  model = models.Transformer(_model(entry), jnp.bfloat16)
  one = jax.ShapeDtypeStruct((2, 1), jnp.int32)
  params = jax.eval_shape(
      models.Transformer(_model(entry), implementation="reference").init,
      jax.random.key(0),
      jnp.zeros((2, 1), jnp.int32),
  )
  cache = jax.eval_shape(
      lambda: full_cache.init(model.config, 2, length, jnp.bfloat16)
  )
  step = jax.jit(
      lambda params, tokens, positions, cache: model.apply(
          params, tokens, positions=positions, kv_cache=cache
      ),
      donate_argnums=3,
  )
  return compile_lib.compile_for(chip, step, params, one, one, cache)


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileTest(parameterized.TestCase):

  def _check_training(self, entry, chip, num_devices):
    program = _train(entry, chip, num_devices).as_text()
    # Forward and backward, on each device's own sequences and heads.
    self.assertGreaterEqual(program.count("tpu_custom_call"), 2)

  @parameterized.parameters(*((entry,) for entry in _ENTRIES))
  @pytest.mark.slow
  def test_a_step_of_training_compiles_for_v5e(self, entry):
    self._check_training(entry, "v5e", 4)

  @parameterized.product(entry=_OTHERS, chip=("v5e", "v6e"))
  @pytest.mark.slow
  def test_a_step_of_other_systems_compiles(self, entry, chip):
    program = _train(entry, chip, 4).as_text()
    self.assertEqual("tpu_custom_call" in program, entry in _ON_KERNELS)

  @parameterized.parameters(*((entry,) for entry in _ENTRIES))
  @pytest.mark.slow
  def test_a_step_of_training_compiles_for_v6e(self, entry):
    self._check_training(entry, "v6e", 4)

  @parameterized.product(entry=_ENTRIES, chip=("v5e", "v6e"))
  @pytest.mark.slow
  def test_a_step_of_decoding_compiles(self, entry, chip):
    compiled = _decode(entry, chip, 4096)
    self.assertGreater(compiled.alias_bytes, 0)


if __name__ == "__main__":
  absltest.main()
