import dataclasses

from absl.testing import absltest
import numpy as np
import pytest

from joma.transformer import config as config_lib
from joma.transformer import model as model_lib
from launch.bench import lm
from launch.bench.language import lm_gpu
from launch.bench.language import lm_llama
from launch.bench.language import lm_sizes
from scansnap_jax.experiment import errors

_SMALL = lm_sizes.LmBenchConfig(
    vocab_size=40,
    embed_dim=8,
    batch_size=2,
    seq_len=5,
    num_layers=2,
    num_rounds=2,
    num_steps=2,
)


class TrainTest(absltest.TestCase):

  def test_both_have_the_loss_of_one_model(self):
    pytest.importorskip("torch", reason="PyTorch is not installed.")
    found = lm.measure(_SMALL)["train"]
    self.assertEqual([row["row"] for row in found], ["torch", "jax"])
    np.testing.assert_allclose(found[0]["loss"], found[1]["loss"], rtol=1e-5)
    for row in found:
      self.assertGreater(row["step_ms"], 0)
      np.testing.assert_allclose(
          row["tokens_per_sec"], 10 / (row["step_ms"] / 1e3), rtol=1e-6
      )
    self.assertEqual(found[0]["torch over it"], 1)


class LlamaTest(absltest.TestCase):

  def test_a_row_a_size(self):
    pytest.importorskip("transformers", reason="transformers is not installed.")
    sizes = ("1x8x5x2x40", "2x8x4x1x11")
    config = dataclasses.replace(_SMALL, part="llama", llama_sizes=sizes)
    found = lm.measure(config)["llama"]
    self.assertEqual(
        [(row["L"], row["V"]) for row in found], [(1, 40), (2, 11)]
    )
    for row in found:
      self.assertGreater(row["transformers over ours"], 0)
      self.assertGreater(row["ours_ms"], 0)

  def test_both_models_have_as_many_parameters(self):
    pytest.importorskip("transformers", reason="transformers is not installed.")
    settings = lm_llama.settings_of((2, 64, 16, 4, 40))
    theirs = sum(p.numel() for p in lm_llama._llama(settings).parameters())
    # 4 D^2 and 3 D 4 D a layer, two norms each, one more, and the table.
    self.assertEqual(theirs, 2 * (16 * 64**2 + 2 * 64) + 64 + 40 * 64)
    self.assertEqual(theirs, model_lib._num_parameters(settings.model))

  def test_a_size_that_is_none_is_refused(self):
    with self.assertRaisesRegex(
        errors.UserError, "llama_sizes=2x128 must be layers"
    ):
      dataclasses.replace(_SMALL, llama_sizes=("2x128",))


class GpuTrainTest(absltest.TestCase):

  def test_without_a_gpu_says_so(self):
    config = dataclasses.replace(_SMALL, part="gpu_train")
    with self.assertRaisesRegex(errors.UserError, "wants one of H100.*cpu"):
      lm.measure(config)

  def test_flops_of_a_token_by_hand(self):
    model = config_lib.TransformerConfig(
        vocab_size=10,
        num_layers=2,
        embed_dim=4,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        hidden_dim=5,
    )
    # query 4 x 8, key and value 4 x 4, out 8 x 4; three of 4 x 5; output.
    params = 2 * (32 + 16 + 16 + 32 + 3 * 20) + 40
    attention = 2 * 7 * 2 * 4
    self.assertEqual(lm_gpu.flops_per_token(model, 7), 6 * (params + attention))


if __name__ == "__main__":
  absltest.main()
