import dataclasses

from absl.testing import absltest
import numpy as np
import pytest

from joma.transformer import config as config_lib
from launch.bench import lm
from launch.bench.language import lm_gpu
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
