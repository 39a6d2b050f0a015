import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

from joma.inference.cost import model_size
from joma.scale import estimate
from joma.scale import meshes
from joma.scale import plan_config
from scansnap_jax.experiment import errors

_CONFIG = plan_config.PlanConfig(topology="v5e:4x4", batch=32, seq_len=1024)


class PlanConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(topology="v3:2x2"), "v3 is none of v4, .*, v7x, h100, h200"),
      (dict(topology="a100:8"), "a100 is none of v4"),
      (dict(topology="h100:16"), "1 to 8 GPUs, as in h100:8; more machines"),
      (dict(topology="h100:0"), "1 to 8 GPUs"),
      (dict(topology="h200:2x4"), "1 to 8 GPUs, as in h200:8"),
      (dict(topology="h100"), "1 to 8 GPUs"),
      # Digits, of which int() makes no number.
      (dict(topology="h100:\u00b2"), "1 to 8 GPUs"),
      (dict(topology="v5e:\u00b2x2"), "v5e torus has 2 sides"),
      (dict(mesh="\u00b2,1,1"), "must be numbers from 1 for data"),
      (dict(topology="h100:8", num_slices=2), "slices of h100 is"),
      (
          dict(topology="h100:4", mesh="1,8,1"),
          "is of 8 devices, and topology=h100:4 has 4",
      ),
      (dict(topology="v5p:4x4"), "v5p torus has 3 sides, as in v5p:4x4x4"),
      (dict(topology="v5e:4x0"), "a side must be 1 or more"),
      (
          dict(topology="v5e:4x4", mesh="1,4,2"),
          "is of 8 devices, and .* has 16",
      ),
      (dict(num_slices=0), "num_slices"),
      # libtpu ends the process of such.
      (dict(topology="v6e:8x32"), "a pod of v6e has 16 x 16 chips; more are"),
      (
          dict(topology="v5e:4x4", num_slices=2, mesh="1,16,1"),
          "is of 16 devices, and num_slices=2 of v5e:4x4 have 32",
      ),
      (
          dict(topology="v4:2x2x1", num_slices=2),
          "num_slices=2: .*slices of v4 is, .* known of v5e, v5p, v6e",
      ),
      (dict(mesh="64"), "must be numbers from 1 for data"),
      (dict(capacity=8), "are those of task=decode"),
      (dict(task="decode", policy="h2o"), "policy=h2o needs capacity"),
      (dict(task="decode", capacity=8), "has no effect with policy=full"),
  )
  def test_what_cannot_be_planned_is_refused(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      plan_config.PlanConfig(**changes)

  def test_devices_as_jax_counts_them(self):
    of = lambda name: plan_config.PlanConfig(topology=name).num_devices
    self.assertEqual((of("v5p:4x4x8"), of("v7x:2x2x1")), (128, 8))
    self.assertEqual((of("h100:8"), of("h200:3")), (8, 3))

  @parameterized.parameters(
      ("smollm2_1b7", 1.7e9), ("llama32_1b", 1.24e9), ("llama3_405b", 405e9)
  )
  def test_named_shapes_have_their_size(self, name, number):
    shape = plan_config.PlanConfig(shape=name).model()
    found = model_size.count(shape).total
    self.assertAlmostEqual(found / number, 1, delta=0.01)

  def test_an_unknown_shape_names_those_there_are(self):
    with self.assertRaisesRegex(
        errors.UserError, "none of llama3_8b, .*folder"
    ):
      plan_config.PlanConfig(shape="llama9").model()


class MeshesTest(parameterized.TestCase):

  def test_every_mesh_that_divides_is_ranked(self):
    model = _CONFIG.model()
    ranking = meshes.rank(_CONFIG, model)
    sizes = {tuple(one.mesh.values()) for one in ranking.best}
    # 16 = d f t s with t of 1, 2, 4, 8, as there are 8 KV heads.
    wanted = {
        (16 // (f * t * s), f, t, s)
        for t in (1, 2, 4, 8)
        for f in (1, 2, 4, 8, 16)
        for s in (1, 2, 4, 8, 16)
        if 16 % (f * t * s) == 0
    }
    self.assertEqual(sizes, wanted)
    self.assertEqual(ranking.num_refused, 1)
    fitting = [one.seconds for one in ranking.best if one.fits]
    self.assertEqual(fitting, sorted(fitting))
    flags = [one.fits for one in ranking.best]
    self.assertEqual(flags, sorted(flags, reverse=True))

  @parameterized.parameters(
      ((1, 1, 16, 1), "num_kv_heads=8 .* tensor=16; 1, 2, 4, 8 would do"),
      ((1, 1, 1, 3), "seq_len=1024 .* seq=3; 1, 2, 4, 8, 16 would do"),
      ((8, 2, 1, 1), "batch=8 .* = 16 devices; 1, 2, 4, 8 would do"),
  )
  def test_a_mesh_that_does_not_divide_names_those_that_would(
      self, sizes, message
  ):
    config = dataclasses.replace(_CONFIG, batch=8)
    with self.assertRaisesRegex(errors.UserError, message):
      meshes.check(config, config.model(), sizes)

  def test_none_that_divides_is_refused(self):
    config = dataclasses.replace(_CONFIG, topology="v5e:1x1", batch=1)
    model = dataclasses.replace(config.model(), vocab_size=7)
    self.assertLen(meshes.rank(config, model).best, 1)
    odd = dataclasses.replace(config, topology="v5e:2x2", seq_len=1023)
    with self.assertRaisesRegex(errors.UserError, "batch=1"):
      meshes.rank(odd, model)


class EstimateTest(parameterized.TestCase):

  def test_fsdp_alone_by_hand(self):
    found = estimate.of_mesh(_CONFIG, _CONFIG.model(), (1, 16, 1, 1))
    params = model_size.count(_CONFIG.model()).total
    # Weights three times, gradients once: bfloat16, 15 / 16 of each is sent.
    self.assertAlmostEqual(
        found.ici_bytes["fsdp"] / (4 * 2 * params * 15 / 16), 1
    )
    self.assertEqual(found.ici_bytes["data"], 0)
    self.assertEqual(found.ici_bytes["tensor"], 0)
    # 4 x 4 chips of v5e close no ring: two lines of 50 GB/s each.
    seconds = found.ici_bytes["fsdp"] / 100e9
    self.assertAlmostEqual(found.ici_seconds / seconds, 1)

  def test_a_batch_that_does_not_divide_is_copied_in_decoding(self):
    of = lambda batch, sizes: estimate.of_mesh(
        dataclasses.replace(_CONFIG, task="decode", batch=batch),
        _CONFIG.model(),
        sizes,
    )
    # Eight texts over 16 devices lie whole on each, as on a mesh of tensor.
    copied, split = of(8, (16, 1, 1, 1)), of(16, (16, 1, 1, 1))
    self.assertAlmostEqual(copied.flops / split.flops, 8, places=6)
    texts = copied.hbm_bytes - split.hbm_bytes
    one = of(32, (16, 1, 1, 1)).hbm_bytes - split.hbm_bytes
    self.assertAlmostEqual(texts / one, 7, places=6)
    self.assertGreater(copied.held_bytes, split.held_bytes)

  def test_seq_alone_by_hand(self):
    found = estimate.of_mesh(_CONFIG, _CONFIG.model(), (4, 1, 1, 4))
    params = model_size.count(_CONFIG.model()).total
    # 32 layers of keys and values of 8 heads of 128; 8 sequences of 256 each.
    chunk = 32 * 8 * 256 * 2 * 8 * 128
    # Three passes of bfloat16, and gradients in float32 in the last.
    ring = 3 * chunk * (3 * 2 + 4)
    gradients = 2 * 2 * params * 3 / 4
    self.assertAlmostEqual(found.ici_bytes["seq"] / (ring + gradients), 1)
    whole = estimate.of_mesh(_CONFIG, _CONFIG.model(), (4, 1, 4, 1))
    self.assertEqual(found.flops, whole.flops)

  def test_tensor_alone_by_hand(self):
    found = estimate.of_mesh(_CONFIG, _CONFIG.model(), (4, 1, 4, 1))
    # 32 layers, 2 sums in each of 3 passes of 8 sequences of 1,024 x 4,096.
    stream = 8 * 1024 * 4096 * 2
    wanted = 32 * 2 * 3 * 2 * stream * 3 / 4
    self.assertAlmostEqual(found.ici_bytes["tensor"] / wanted, 1)

  def test_six_flops_a_parameter_and_token_and_attention(self):
    needed = estimate.model_flops(_CONFIG, _CONFIG.model())
    size = model_size.count(_CONFIG.model())
    tokens = 32 * 1024
    pairs = 32 * 1024 * 1025 // 2 * 32  # Sequences, pairs, layers.
    wanted = 6 * tokens * size.multiplied + 3 * 4 * pairs * 32 * 128
    self.assertAlmostEqual(needed / wanted, 1, places=3)
    found = estimate.of_mesh(_CONFIG, _CONFIG.model(), (1, 16, 1, 1))
    self.assertAlmostEqual(found.flops * 16 / needed, 4 / 3)

  def test_a_cache_that_evicts_holds_less(self):
    full = plan_config.PlanConfig(task="decode", batch=64, seq_len=65_536)
    h2o = dataclasses.replace(full, policy="h2o", capacity=4096)
    held = [
        estimate.of_mesh(one, one.model(), (8, 1, 8, 1)).held_bytes
        for one in (full, h2o)
    ]
    weights = 2 * model_size.count(full.model()).total / 8
    kv = 64 * 65_536 * 32 * 8 * 2 * 128 * 2 / 64
    self.assertAlmostEqual(held[0] / (weights + kv), 1, places=3)
    self.assertLess(held[1] - weights, kv / 15)


if __name__ == "__main__":
  absltest.main()
