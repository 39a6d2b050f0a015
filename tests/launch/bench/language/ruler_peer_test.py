"""The same examples through kvpress and through ours."""

import dataclasses
import pathlib

from absl.testing import absltest
import pytest

from joma.systems.cache_policies import names
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer
from launch.bench.language import ruler_peer
from scansnap_jax.experiment import errors
from tests.faults import scripts
from tests.joma.transformer import applied


class ConfigTest(absltest.TestCase):

  def test_what_cannot_be_is_named(self):
    for fields, message in (
        ({"budget": 1.0}, "budget=1.0 must be between 0 and 1"),
        ({"policies": ("h2o",)}, "policies=h2o has no equal press; there are"),
        ({"num_samples": 0}, "num_samples"),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        ruler_peer.BenchConfig(**fields)


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_a_random_model_says_the_same(self):
    pytest.importorskip("kvpress", reason="see the extra bench")
    folder = pathlib.Path(self.create_tempdir().full_path)
    shape = dataclasses.replace(scripts._MODEL, max_len=2048)
    model = models.Transformer(shape, implementation="reference")
    pretrained.save(folder, shape, applied.params(model))
    tokenizer.save(tokenizer.Bytes(), folder)
    config = ruler_peer.BenchConfig(
        tasks=("niah_single_1",),
        policies=tuple(names.PRESSES)[1:],
        num_samples=2,
        length=900,
        answer_tokens=6,
    )
    for row in ruler_peer.measure(str(folder), config)["rows"]:
      with self.subTest(row["policy"]):
        self.assertEqual(row["same_answers"], 2)
        self.assertEqual(row["ours"], row["kvpress"])


if __name__ == "__main__":
  absltest.main()
