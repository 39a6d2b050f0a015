import pathlib
from unittest import mock

from absl.testing import absltest
import pytest

from launch.bench import serving
from scansnap_jax.experiment import errors
from tests.launch import generate_test


class BenchServingTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = self.create_tempdir().full_path
    generate_test.save_model(pathlib.Path(self.folder))

  @pytest.mark.slow
  def test_rows_and_prefixes_write_the_same_answers(self):
    config = serving.BenchConfig(
        num_requests=3,
        num_rows=2,
        prompt_lens=(2, 5),
        new_tokens=(1, 4),
        prefix_len=6,
        num_rounds=1,
    )
    with mock.patch.object(serving, "_PAUSE_S", 0.0):
      result = serving.measure(self.folder, config)
    rows = result["rows"] + result["prefix"]
    self.assertEqual([row["same_answers"] for row in rows], [3] * 5)
    self.assertEqual(rows[0]["times_faster"], 1)
    # The tokens of a round are those that the requests want.
    tokens = {round(row["tokens_per_sec"] * row["seconds"], 6) for row in rows}
    wanted = sum(request.num_new for request in serving._requests(256, config))
    self.assertEqual(tokens, {wanted})

  def test_sizes_that_are_none_are_one_sentence(self):
    for fields, message in (
        ({"prompt_lens": (5, 2)}, "prompt_lens=5,2 must be two numbers from 1"),
        ({"new_tokens": (1,)}, "new_tokens=1 must be two numbers"),
        ({"num_rows": 0}, "num_rows must be at least 1"),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        serving.BenchConfig(**fields)


if __name__ == "__main__":
  absltest.main()
