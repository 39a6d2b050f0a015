import pathlib
from unittest import mock

from absl.testing import absltest
import pytest

from launch.bench import speculative
from scansnap_jax.experiment import errors
from tests.launch import generate_test


class BenchSpeculativeTest(absltest.TestCase):

  @pytest.mark.slow
  def test_guesses_write_the_same_tokens(self):
    folder = self.create_tempdir().full_path
    generate_test.save_model(pathlib.Path(folder))
    config = speculative.BenchConfig(ks=(2,), num_new=6, num_rounds=1)
    with mock.patch.object(speculative, "_PAUSE_S", 0.0):
      found = speculative.measure(folder, config)["prompts"]
    for prompt in found:
      self.assertTrue(all(row["same_tokens"] for row in prompt["rows"]))
      self.assertGreaterEqual(prompt["rows"][1]["tokens_per_pass"], 1)

  def test_no_guess_is_no_draft(self):
    with self.assertRaisesRegex(errors.UserError, "ks must be at least 1"):
      speculative.BenchConfig(ks=(0,))


if __name__ == "__main__":
  absltest.main()
