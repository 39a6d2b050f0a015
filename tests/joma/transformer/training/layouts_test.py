import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

from joma.transformer import config as config_lib
from joma.transformer import sharding
from joma.transformer.text import batches as batches_lib
from joma.transformer.training import layouts
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from kernels_pallas.aot import chips
from kernels_pallas.aot import topology
from scansnap_jax.experiment import errors

# Trains on one device and on four, saving and restoring half-way.
_ON_FOUR = """
import json, re
import jax, numpy as np
jax.config.update("jax_disable_most_optimizations", True)
from joma.transformer import config, sharding
from joma.transformer.text import batches
from joma.transformer.training import layouts, lm_config, lm_step
model = config.TransformerConfig(
    vocab_size=12, num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=2,
    head_dim=4, hidden_dim=8)
settings = lm_config.LmConfig(
    model=model, batch_size=8, seq_len=6, grad_accum=2, lr=.03)
task = lm_step.make_task(settings, 4, 4)
draw = np.random.default_rng(0).integers
inputs, targets = draw(0, 12, (2, 2, 8, 6), np.int32)
weights = np.ones(inputs.shape, np.float32)
weights[:, 3:, 4:] = 0
text = batches.Batch(inputs, targets, weights)
found = {}
for name, layout in {
    "one": layouts.Replicated(jax.devices()[:1]),
    "replicated": layouts.Replicated(),
    "mesh": layouts.Sharded(sharding.make_mesh(2, 2)),
}.items():
  train = layout.map(lm_step.train, donate=True, task=task)
  state, first = train(layout.init(lm_step.init, task=task), text)
  saved = layout.to_save(state)
  assert layouts.is_finite(saved).all()
  state, _ = train(state, text)
  state, second = train(layout.from_saved(saved), text)
  loss = layout.map(lm_step.evaluate, task=task)(state.params, text)
  gathered = layout.gather((first, second, loss))
  found[name] = [np.ravel(x).tolist() for x in gathered]
kernel = state.params["layers_0"]["mlp"]["up"]["kernel"]
found["part"] = kernel.addressable_shards[0].data.shape
with jax.set_mesh(layout.mesh):
  compiled = layout.compiled(lm_step.train, state, True, task=task)
  program = compiled.lower(state, layout._split(text)).compile().as_text()
pattern = r"= \\(?(\\w+\\[[\\d,]*\\])[^=]* all-gather"
found["gathered"] = re.findall(pattern, program)
print(json.dumps(found))
"""


class LayoutsTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_four_devices_train_as_one_does_copied_or_split(self):
    flags = "--xla_force_host_platform_device_count=4"
    printed = subprocess.check_output(
        [sys.executable, "-c", _ON_FOUR],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(__file__).parents[4],
        stderr=subprocess.DEVNULL,
        text=True,
    )
    found = json.loads(printed)
    for name in ("replicated", "mesh"):
      for ours, alone in zip(found[name], found["one"], strict=True):
        # Sums of 40 numbers in another order.
        np.testing.assert_allclose(ours, alone, rtol=1e-5, err_msg=name)
    self.assertLess(found["one"][2][0], found["one"][0][0])
    # The restored state, not a donated one, went on.
    self.assertNotEqual(found["one"][0], found["one"][1])
    self.assertEqual(found["part"], [4, 4])
    # Parameters are gathered for use; of activations [B, T, _], which stay
    # split, only what was looked up in an embedding that is split by columns.
    self.assertIn("f32[8,4]", found["gathered"])
    streams = [s for s in found["gathered"] if s.startswith("f32[4,6,")]
    self.assertLessEqual(len(streams), 1)

  @pytest.mark.slow
  def test_losses_of_fifty_steps_are_those_of_one_device_on_every_mesh(self):
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.joma.transformer.training.devices.on_eight",
        ],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(__file__).parents[4],
        capture_output=True,
        text=True,
    )
    self.assertEqual(done.returncode, 0, done.stderr[-4000:])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    alone = rows.pop(0)["losses"]
    self.assertLess(alone[-1], 0.7 * alone[0])  # It learns.
    self.assertLen(rows, 8)
    for row in rows:
      off = np.abs(np.subtract(row["losses"], alone)).max()
      self.assertLess(off, 1e-5, row["layout"])

  def test_a_batch_that_devices_cannot_share_is_refused(self):
    config = lm_config.LmConfig(batch_size=7, seq_len=8)
    layout = layouts.make_layout(config)
    self.assertEqual(layout.num_parts, len(jax.devices()))
    two = layouts.Replicated(jax.devices()[:1] * 2)
    self.assertEqual(two.num_parts, 2)
    message = "multiple of 2 devices.*; 1, 7 devices would"
    with self.assertRaisesRegex(errors.UserError, message):
      layouts.check_batch(config, two.num_parts)

  def test_a_cpu_has_no_host_to_keep_activations(self):
    config = lm_config.LmConfig(batch_size=8, seq_len=8, remat="offload")
    with self.assertRaisesRegex(errors.UserError, "remat=dots keeps the same"):
      layouts.make_layout(config)


def _compile_for(chip, num_devices, fsdp, tensor, seq=1):
  """A training step on a mesh of TPUs that are not there."""
  model = config_lib.TransformerConfig(
      vocab_size=256,
      num_layers=1,
      embed_dim=128,
      num_heads=2,
      num_kv_heads=2,
      head_dim=128,
      hidden_dim=256,
  )
  config = lm_config.LmConfig(
      model=model, batch_size=8, seq_len=128, dtype="bfloat16"
  )
  task = lm_step.make_task(config, 1, 1)
  devices = topology.device_mesh(chips.get_chip(chip), num_devices).devices
  mesh = sharding.make_mesh(fsdp, tensor, seq, devices.ravel().tolist())
  layout = layouts.Sharded(mesh)
  state = layout.to_restore(jax.eval_shape(lambda: lm_step.init(task)))
  place = sharding.batch_sharding(mesh, 3, batch_axis=1)
  array = lambda dtype: jax.ShapeDtypeStruct((1, 8, 128), dtype, sharding=place)
  batch = batches_lib.Batch(array(np.int32), array(np.int32), array(np.float32))
  with jax.set_mesh(mesh):
    step = layout.compiled(lm_step.train, state, True, task=task)
    return topology.compiled(step.lower(state, batch))


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class TpuTest(parameterized.TestCase):

  def _check(self, compiled):
    program = compiled.as_text()
    # Attention forward and backward, on each device's own heads.
    self.assertGreaterEqual(program.count("tpu_custom_call"), 2)
    self.assertRegex(program, r"all-(gather|reduce)")
    memory = compiled.memory_analysis()
    # The state takes the place of the old one.
    self.assertGreater(
        memory.alias_size_in_bytes, 0.95 * memory.output_size_in_bytes
    )

  @parameterized.parameters((2, 2, 1), (2, 1, 2))
  @pytest.mark.by_default(0)
  def test_a_step_compiles_for_a_mesh_of_v5e(self, *sizes):
    self._check(_compile_for("v5e", 4, *sizes))

  @parameterized.parameters("v4", "v5p", "v6e", "v7x")
  @pytest.mark.slow
  def test_a_step_compiles_for_a_mesh_of_other_chips(self, chip):
    self._check(_compile_for(chip, 8, fsdp=2, tensor=2, seq=2))


if __name__ == "__main__":
  absltest.main()
