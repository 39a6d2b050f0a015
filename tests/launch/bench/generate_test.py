import importlib.util
import pathlib
from unittest import mock

from absl.testing import absltest
import numpy as np
import pytest

from launch.bench import generate
from scansnap_jax.experiment import errors
from tests.launch import generate_test

_SMALL = generate.BenchConfig(
    peer=False, batch_sizes=(2,), prompt_len=4, num_rounds=1, num_steps=3
)


class BenchGenerateTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = self.create_tempdir().full_path
    generate_test.save_model(pathlib.Path(self.folder))

  @pytest.mark.slow
  def test_a_row_has_the_figures_of_its_turns(self):
    with mock.patch.object(generate, "_PAUSE_S", 0.0):
      (batch,) = generate.measure(self.folder, _SMALL)["batches"]
    (row,) = batch["rows"]
    self.assertEqual((batch["batch_size"], row["times_ours"]), (2, 1))
    # Two sequences: tokens/s x ms a step = 2000.
    product = row["tokens_per_sec"] * row["ms_per_step"]
    self.assertAlmostEqual(product, 2000, places=6)

  @pytest.mark.slow
  def test_transformers_writes_the_same_tokens(self):
    for name in ("torch", "transformers"):
      pytest.importorskip(name, reason=f"{name} is not installed.")
    writers = [
        start(self.folder, 2, _SMALL)
        for start in (generate.start_ours, generate.start_transformers)
    ]
    ours, theirs = (np.concatenate([x.steps(), x.steps()]) for x in writers)
    np.testing.assert_array_equal(ours, theirs)

  @pytest.mark.slow
  def test_a_missing_peer_is_named(self):
    config = generate.BenchConfig(peer=True)
    with mock.patch.object(importlib.util, "find_spec", lambda name: None):
      with self.assertRaisesRegex(errors.UserError, "torch is not installed"):
        generate.measure(self.folder, config)
