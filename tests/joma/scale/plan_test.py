import json
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from joma.scale import plan
from joma.scale import plan_config
from joma.scale import report
from joma.scale import step
from joma.transformer import config as configs
from kernels_pallas.aot import overflow
from kernels_pallas.aot import topology
from scansnap_jax.experiment import errors

_L, _D, _V = 2, 512, 1024
_SHAPE = configs.TransformerConfig(
    vocab_size=_V,
    num_layers=_L,
    embed_dim=_D,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    hidden_dim=1024,
)
# Query, key, value, out; gate, up, down. Norms are not split.
_LAYER = (8 + 4 + 4 + 8) * 128 * _D + 3 * 1024 * _D
_NORMS = (2 * _L + 1) * _D


def _plan(**settings):
  config = plan_config.PlanConfig(**settings)
  with mock.patch.object(plan_config.PlanConfig, "model", lambda self: _SHAPE):
    return plan.make(config)


def _bytes(row, kind, axes):
  return sum(
      one["bytes"]
      for one in row["collectives"]
      if (one["kind"], one["axes"]) == (kind, axes)
  )


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompiledPlanTest(parameterized.TestCase):

  @parameterized.parameters(
      # More slots than the shape says that it was made for.
      ("v5e:2x2", "full", 1024, None),
      ("v5p:2x2x1", "h2o", 4096, 2048),
  )
  def test_decoding_over_tensor_by_hand(self, name, policy, length, capacity):
    summary = _plan(
        topology=name,
        task="decode",
        batch=4,
        seq_len=length,
        mesh="1,1,4",
        policy=policy,
        capacity=capacity,
    )
    (row,) = summary["meshes"]
    params = (_V * _D + _L * _LAYER) // 4 + _NORMS
    self.assertEqual(row["bytes"]["parameters"], 2 * params)
    slots = 4 * (4 // 4) * (capacity or 1024) * _L
    # Keys and values of 128 bfloat16 numbers; a score and a position.
    self.assertEqual(
        row["bytes"]["cache"], slots * (2 * 128 * 2 + 8 * bool(capacity))
    )
    # The embedding's rows, then two sums of the stream a layer.
    summed = (2 * _L + 1) * 4 * _D * 2
    self.assertAlmostEqual(
        _bytes(row, "all-reduce", "tensor") / summed, 1, delta=0.01
    )
    self.assertEqual(_bytes(row, "all-gather", "fsdp"), 0)
    self.assertTrue(row["fits"])
    self.assertEqual(row["bound"], "HBM")
    # Of argument bytes the compiler adds no more than padding.
    padding = row["bytes"]["padding"]
    self.assertBetween(padding, 0, 0.01 * row["held_bytes"])
    # The caches are written in place.
    self.assertLess(row["bytes"]["outputs"], 0.01 * row["held_bytes"])
    # Two FLOPs a weight and sequence; two products of 8 heads with each slot.
    needed = 2 * 4 * (_V * _D + _L * _LAYER) / 4
    needed += 2 * 2 * _L * 4 * (8 // 4) * 128 * (capacity or 1024)
    self.assertAlmostEqual(row["flops"] / needed, 1, delta=0.01)

  @pytest.mark.slow
  def test_training_over_fsdp_by_hand(self):
    summary = _plan(
        topology="v5e:2x2", batch=8, seq_len=512, mesh="1,4,1", remat="full"
    )
    (row,) = summary["meshes"]
    split = _V * _D + _L * _LAYER
    self.assertEqual(row["bytes"]["parameters"], 4 * (split // 4 + _NORMS))
    # Two moments, a count and the step's number.
    self.assertEqual(row["bytes"]["optimizer"], 8 * (split // 4 + _NORMS) + 8)
    # Weights forward, those of layers once more for the backward pass, and the
    # query's twice there: for what is computed anew, and for its gradient.
    gathered = 2 * split + 2 * _L * (_LAYER + _D * 8 * 128)
    self.assertAlmostEqual(
        _bytes(row, "all-gather", "fsdp") / gathered, 1, delta=0.01
    )
    # 6 FLOPs a parameter and token, 2 more for layers computed anew.
    tokens = 8 * 512 / 4
    weights = tokens * (6 * _V * _D + 8 * _L * _LAYER)
    # Attention: two products forward, twice, and five backward, of all pairs of
    # 512 positions or, as tiles are causal, of half of them.
    pairs = tokens * _L * 2 * (2 + 2 + 5) * 512 * 8 * 128
    self.assertBetween(row["flops"], weights + pairs / 2, weights + pairs)

  @pytest.mark.slow
  def test_what_is_offloaded_lies_in_the_host(self):
    """Of each layer what products with weights gave: bytes by hand."""
    settings = dict(topology="v5e:2x2", batch=8, seq_len=512, mesh="4,1,1")
    rows = [
        _plan(remat=remat, **settings)["meshes"][0]
        for remat in ("dots", "offload")
    ]
    self.assertEqual(rows[0]["host_bytes"], 0)
    tokens = 8 * 512 // 4
    # Query, key, value and out; gate and up, in bfloat16. What down gives no
    # gradient asks for.
    width = (8 + 4 + 4) * 128 + _D + 2 * 1024
    # The compiler takes room for more than what lies there at once.
    self.assertBetween(rows[1]["host_bytes"] / (_L * tokens * width * 2), 1, 2)
    self.assertLess(
        rows[1]["bytes"]["temporaries"], rows[0]["bytes"]["temporaries"]
    )

  @pytest.mark.slow
  def test_two_slices_sum_gradients_over_the_network(self):
    summary = _plan(
        topology="v5e:2x2", num_slices=2, batch=8, seq_len=512, mesh="2,4,1"
    )
    (row,) = summary["meshes"]
    between = [one for one in row["collectives"] if one["dcn_seconds"]]
    self.assertEqual({one["axes"] for one in between}, {"data"})
    # Gradients of a device's part in bfloat16; of the embedding those of the
    # looked up rows come apart from those of the output, in float32.
    part = (_V * _D + _L * _LAYER) // 4 + _NORMS
    summed = sum(one["sent_bytes"] for one in between)
    self.assertAlmostEqual(
        summed / (2 * part + 4 * _V * _D // 4), 1, delta=0.01
    )
    self.assertAlmostEqual(
        row["seconds"]["DCN"] / (summed / (25e9 / 8)), 1, places=6
    )
    alone = _plan(topology="v5e:2x2", batch=4, seq_len=512, mesh="1,4,1")
    self.assertNotIn("DCN", alone["meshes"][0]["seconds"])
    self.assertAlmostEqual(
        _bytes(row, "all-gather", "fsdp")
        / _bytes(alone["meshes"][0], "all-gather", "fsdp"),
        1,
        delta=0.01,
    )

  @pytest.mark.slow
  def test_training_over_seq_by_hand(self):
    summary = _plan(topology="v5e:2x2", batch=4, seq_len=512, mesh="1,1,2,2")
    (row,) = summary["meshes"]
    # A device has 256 positions, two key heads and four query heads. Half of
    # them change places for a balanced order: queries, keys and values, and the
    # outputs; keys and values go round. Back, all of it once more with the
    # cotangents of outputs and queries, those of keys and values twice round in
    # float32, and home.
    half = 4 * 128 * 2 * 128 * 2
    forward = 2 + 1 + 1 + 2 * 2 + 2
    backward = forward + 2 + 2 * 2 * 4 + 2 * 2
    self.assertAlmostEqual(
        _bytes(row, "permute", "seq") / (_L * half * (forward + backward)),
        1,
        delta=0.01,
    )

  def test_a_step_of_decoding_has_no_positions_to_split(self):
    with self.assertRaisesRegex(errors.UserError, "give seq=1"):
      _plan(topology="v5e:2x2", task="decode", seq_len=64, mesh="1,1,2,2")

  @pytest.mark.slow
  def test_search_compiles_the_best_and_says_what_it_left(self):
    summary = _plan(
        topology="v5e:2x2", task="decode", batch=4, seq_len=64, num_compiled=1
    )
    self.assertLen(summary["meshes"], 1)
    self.assertLen(summary["estimates"], 6)
    self.assertRegex(summary["finding"][1], "Not compiled: 5 more meshes")

  def test_what_compiles_for_gpus_is_named_where_it_is_absent(self):
    self.enterContext(
        mock.patch.object(topology, "has_toolchain", lambda _: False)
    )
    with self.assertRaisesRegex(
        errors.UserError, "jax >= 0.11 and its CUDA plugin: pip install"
    ):
      _plan(topology="h100:2", batch=2, seq_len=8, mesh="1,2,1")

  def test_no_such_topology_is_one_line(self):
    with self.assertRaisesRegex(errors.UserError, "v5e:3x5 is no topology"):
      _plan(
          topology="v5e:3x5", task="decode", batch=15, seq_len=8, mesh="15,1,1"
      )


@absltest.skipUnless(
    topology.has_toolchain("cuda"), "no CUDA plugin for this jax"
)
class CompiledGpuPlanTest(absltest.TestCase):

  @pytest.mark.slow
  def test_training_over_fsdp_by_hand(self):
    summary = _plan(
        topology="h100:4", batch=8, seq_len=512, mesh="1,4,1", remat="full"
    )
    (row,) = summary["meshes"]
    split = _V * _D + _L * _LAYER
    self.assertEqual(row["bytes"]["parameters"], 4 * (split // 4 + _NORMS))
    # Not as on a TPU the vocabulary's, too, are gathered twice, and so are the
    # texts' tokens, of 4 bytes.
    gathered = 4 * split + 8 * 512 * 4
    self.assertAlmostEqual(
        _bytes(row, "all-gather", "fsdp") / gathered, 1, delta=0.01
    )
    # 6 FLOPs a parameter and token, 2 more for layers computed anew but for
    # the last product of each, which nothing asks for. Of attention, none.
    anew = _LAYER - 1024 * _D
    tokens = 8 * 512 / 4
    weights = tokens * (6 * _V * _D + _L * (6 * _LAYER + 2 * anew))
    self.assertAlmostEqual(row["flops"] / weights, 1, delta=0.01)
    self.assertGreater(row["silent_kernels"], 0)
    self.assertEqual(row["unknown_loops"], [])
    self.assertRegex(" ".join(summary["finding"]), "declare no FLOPs")
    self.assertEqual(row["hbm_bytes"], 80 * 10**9)
    self.assertTrue(row["fits"])

  @pytest.mark.slow
  def test_decoding_over_tensor_by_hand(self):
    summary = _plan(
        topology="h200:4", task="decode", batch=4, seq_len=1024, mesh="1,1,4"
    )
    (row,) = summary["meshes"]
    params = (_V * _D + _L * _LAYER) // 4 + _NORMS
    self.assertEqual(row["bytes"]["parameters"], 2 * params)
    slots = 4 * (4 // 4) * 1024 * _L
    self.assertEqual(row["bytes"]["cache"], slots * 2 * 128 * 2)
    # Two sums of the stream a layer; the embedding's rows are summed in
    # float32, as they are not on a TPU.
    summed = 2 * _L * 4 * _D * 2 + 4 * _D * 4
    self.assertAlmostEqual(
        _bytes(row, "all-reduce", "tensor") / summed, 1, delta=0.01
    )
    # All of the work is in products: there is no kernel.
    needed = 2 * 4 * (_V * _D + _L * _LAYER) / 4
    needed += 2 * 2 * _L * 4 * (8 // 4) * 128 * 1024
    self.assertAlmostEqual(row["flops"] / needed, 1, delta=0.01)
    self.assertEqual(row["silent_kernels"], 0)
    self.assertEqual(row["hbm_bytes"], 141 * 10**9)


class SummaryTest(parameterized.TestCase):

  def test_of_meshes_that_take_as_long_the_least_busy_is_recommended(self):
    times = iter([(2.0, 3.0), (1.0, 2.5), (1.0, 2.0)])

    def of_mesh(config, model, guess):
      bound, serial = next(times)
      return {
          **{"mesh": guess.mesh, "fits": True, "bound": "HBM", "mfu": 0.5},
          **{"bound_seconds": bound, "serial_seconds": serial},
      }

    with mock.patch.object(plan, "of_mesh", of_mesh):
      summary = _plan(topology="v5e:2x2", batch=4, seq_len=64, num_compiled=3)
    found = [row["serial_seconds"] for row in summary["meshes"]]
    self.assertEqual(found, [2.0, 2.5, 3.0])

  @parameterized.parameters((6, "batch=6 .* fsdp = 4: every"), (8, "^$"))
  def test_texts_that_are_copied_are_said(self, batch, said):
    config = plan_config.PlanConfig(
        topology="v5e:2x2", task="decode", batch=batch, mesh="1,4,1"
    )
    row = {
        **{"mesh": {"data": 1, "fsdp": 4, "tensor": 1, "seq": 1}},
        **{"fits": True, "bound_seconds": 1.0, "bound": "HBM", "mfu": 0.5},
    }
    self.assertRegex(" ".join(plan.findings(config, [row], 1, 0)[1:]), said)

  def test_what_does_not_fit_is_reported_and_drawn(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    error = overflow.OutOfHbm("HBM: 40 GB of 16 GB", 40, 16)
    with mock.patch.object(step, "compile_step", side_effect=error):
      summary = _plan(topology="v5e:2x2", batch=4, seq_len=64, mesh="1,4,1")
    (row,) = summary["meshes"]
    self.assertFalse(row["fits"])
    self.assertIn("No mesh that was compiled fits", summary["finding"][0])
    path = report.write(folder, summary, {"command": "c"})
    self.assertIn("HBM: 40 GB of 16 GB", path.read_text())
    self.assertEqual(
        json.loads((folder / "summary.json").read_text())["meshes"], [row]
    )


if __name__ == "__main__":
  absltest.main()
