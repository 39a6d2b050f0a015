import importlib.util
import pathlib
from unittest import mock

from absl.testing import absltest
import pytest

from launch.bench import inference
from scansnap_jax.experiment import errors
from tests.launch import generate_test

_SMALL = dict(
    batch_sizes=(2,),
    length=32,
    capacity=8,
    num_layers=1,
    num_rounds=1,
    num_steps=2,
)


class BenchInferenceTest(absltest.TestCase):

  @pytest.mark.slow
  def test_rows_say_time_and_bytes_of_both_caches(self):
    folder = self.create_tempdir().full_path
    generate_test.save_model(pathlib.Path(folder))
    config = inference.BenchConfig(peer=False, **_SMALL)
    rates = {"_bandwidth": lambda: 10.0, "_tflops": lambda: 0.1}
    with mock.patch.multiple(inference, _PAUSE_S=0.0, **rates):
      (batch,) = inference.measure(folder, config)["batches"]
    for part in ("attention", "decode"):
      names = [row["name"] for row in batch[part]]
      self.assertEqual(names, ["full", "h2o"])
      self.assertEqual(batch[part][1]["times_h2o"], 1)
    # One layer, 2 sequences, one head, 8 numbers of key and of value.
    full, small = (row["cache_bytes"] for row in batch["decode"])
    self.assertEqual(full, 2 * 4 * 2 * 8 * (32 + 4))
    self.assertEqual(small, 2 * 8 * (2 * 4 * 8 + 8))
    self.assertGreater(batch["ratio_of_cost_model"], 1)

  @pytest.mark.slow
  def test_the_peer_decodes_the_same_weights(self):
    if importlib.util.find_spec("kvpress") is None:
      self.skipTest("kvpress is not installed: see the extra bench")
    config = inference.BenchConfig(**_SMALL)
    (batch,) = inference.measure(None, config)["batches"]
    self.assertLen(batch["decode"], 4)

  def test_a_capacity_above_the_text_is_named(self):
    with self.assertRaisesRegex(errors.UserError, "capacity=9000"):
      inference.BenchConfig(capacity=9000)
