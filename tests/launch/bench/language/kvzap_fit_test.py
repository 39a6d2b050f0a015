"""Networks are fitted, written, and kept tokens by; a random model does."""

import dataclasses
import pathlib

from absl.testing import absltest
import numpy as np
import pytest

from joma.systems.cache_policies.by_attention import kvzap
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.text import corpus_text
from joma.transformer.text import tokenizer
from launch.bench.language import kvzap_fit
from scansnap_jax.experiment import errors
from tests.faults import scripts
from tests.joma.transformer import applied


class ConfigTest(absltest.TestCase):

  def test_what_cannot_be_is_named(self):
    for fields, message in (
        ({"budget": 1.0}, "budget=1.0 must be between 0 and 1"),
        ({"policies": ("h3o",)}, "policy='h3o' is unknown"),
        ({"num_texts": 0}, "num_texts"),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        kvzap_fit.BenchConfig(**fields)

  def test_texts_do_not_overlap_and_must_be_there(self):
    rng = np.random.default_rng(0)
    found = kvzap_fit._pieces(np.arange(20), 4, 5, rng)
    self.assertEqual(sorted(found.ravel().tolist()), list(range(20)))
    with self.assertRaisesRegex(errors.UserError, "20 tokens in a split, 2"):
      kvzap_fit._pieces(np.arange(20), 3, 8, rng)


class MeasureTest(absltest.TestCase):

  @pytest.mark.slow
  def test_a_random_model_is_fitted_and_measured(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    shape = dataclasses.replace(scripts._MODEL, max_len=256)
    model = models.Transformer(shape, implementation="reference")
    pretrained.save(folder, shape, applied.params(model))
    tokenizer.save(tokenizer.Bytes(), folder)
    weights = folder / "kvzap.npz"
    config = kvzap_fit.BenchConfig(
        corpus=corpus_text.EMBEDDED,
        num_texts=6,
        num_held_out=2,
        length=48,
        rest=8,
        size=4,
        num_steps=60,
    )
    found = kvzap_fit.measure(str(folder), str(weights), None, config)
    networks = kvzap.load(str(weights))
    self.assertEqual(
        networks.inner.shape[:2], (shape.num_layers, shape.embed_dim)
    )
    self.assertLess(found["loss_last"], found["loss_first"])
    self.assertGreater(found["correlation_mean"], 0)
    kinds = [(row["policy"], row.get("scope")) for row in found["rows"]]
    scopes = ("head", "layer", "model")
    compared = [(name, s) for name in ("kvzip", "kvzap") for s in scopes]
    others = [("snapkv", "head"), ("random", "head")]
    self.assertEqual(kinds, [("full", None), *compared, *others])
    # Whoever keeps nearly all changes nearly nothing.
    more = dataclasses.replace(config, budget=0.99, policies=())
    for row in kvzap_fit.measure(str(folder), str(weights), None, more)["rows"][
        1:
    ]:
      self.assertLess(abs(row["mean"] - 1), 0.02)


if __name__ == "__main__":
  absltest.main()
