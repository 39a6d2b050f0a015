"""The harness itself, with a model of random numbers and a task of one file."""

import dataclasses
import json
import os
import pathlib
import random

from absl.testing import absltest
import numpy as np
import pytest

from joma.inference.harness import requests
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer
from scansnap_jax.experiment import errors
from tests.faults import scripts
from tests.joma.transformer import applied

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm_eval is not installed: see the extra eval"
)

_SPOKEN = (
    "to be or not that is the question whether nobler in mind to suffer slings"
    " and arrows of outrageous fortune"
).split()


def _pairs(num):
  """Contexts, some empty, and continuations, of lengths that differ."""
  rng = random.Random(0)
  said = lambda most: " ".join(rng.choices(_SPOKEN, k=rng.randint(0, most)))
  contexts = [said(7) for _ in range(num)]
  return contexts, [f" {said(3)} {i}"[-24:] for i in range(num)]


class JomaTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    from joma.inference.harness import lm_eval_model

    self.folder = pathlib.Path(self.create_tempdir().full_path)
    shape = dataclasses.replace(scripts._MODEL, max_len=64)
    model = models.Transformer(shape, implementation="reference")
    pretrained.save(self.folder, shape, applied.params(model))
    tokenizer.save(tokenizer.Bytes(), self.folder)
    config = self.folder / "config.json"
    fields = json.loads(config.read_text()) | {"eos_token_id": 0}
    config.write_text(json.dumps(fields))
    self.make = lambda **options: lm_eval_model.Joma(
        str(self.folder), **options
    )

  def _request(self, *args):
    from lm_eval.api import instance

    return instance.Instance("loglikelihood", {}, args, 0)

  def test_a_context_is_what_comes_before(self):
    lm = self.make(batch_size=2)
    pairs = [("to be", " or not"), ("a", "b"), ("", "no context")]
    found = lm.loglikelihood(
        [self._request(*pair) for pair in pairs], disable_tqdm=True
    )
    texts = [[*map(ord, "to be or not")], [*map(ord, "ab")]]
    texts.append([0, *map(ord, "no context")])
    expected = lm._answerer.score(texts, [7, 1, 10])
    for (value, _), (wanted, _) in zip(found, expected, strict=True):
      self.assertAlmostEqual(value, wanted, places=4)

  def test_rolling_windows_predict_each_token_once(self):
    lm = self.make(max_length=8, batch_size=3)
    text = "twenty letters, more"
    (found,) = lm.loglikelihood_rolling([self._request(text)])
    ids = [0, *map(ord, text)]
    # Windows of eight: each begins where the one before ended, but the last.
    parts = [(ids[0:9], 8), (ids[8:17], 8), (ids[12:21], 4)]
    expected = sum(
        lm._answerer.score([part], [count])[0][0] for part, count in parts
    )
    self.assertAlmostEqual(found, expected, places=3)

  def test_a_policy_wants_a_capacity(self):
    with self.assertRaisesRegex(errors.UserError, "capacity"):
      self.make(policy="h2o")
    lm = self.make(policy="h2o", capacity=4)
    self.assertIsInstance(lm._answerer, requests.Answerer)
    self.assertEqual(lm._answerer.policy.label, "H2O")

  def test_a_text_ends_where_a_request_says(self):
    lm = self.make()
    options = {"until": ["x"], "max_gen_toks": 6}
    (found,) = lm.generate_until([self._request("abc", options)])
    (whole,) = lm._answerer.say([[*map(ord, "abc")]], max_new_tokens=6)
    self.assertEqual(found, whole.split("x")[0])
    with self.assertRaisesRegex(errors.UserError, "do_sample"):
      lm.generate_until([self._request("a", {"do_sample": True})])

  @pytest.mark.slow
  @pytest.mark.filterwarnings("ignore")  # Of the harness's own packages.
  def test_200_requests_are_those_of_hf(self):
    from lm_eval.models import huggingface

    from joma.inference.harness import lm_eval_model

    folder = os.environ.get("SCANSNAP_LM_EVAL_FOLDER", str(self.folder))
    own = lm_eval_model.Joma(folder, batch_size=8)
    peer = huggingface.HFLM(
        pretrained=folder,
        device="cpu",
        dtype="float32",
        batch_size=8,
        # A tokenizer of bytes names none of its own.
        prefix_token_id=own.prefix_token_id,
    )
    pieces = list(map(self._request, *_pairs(200)))
    found = own.loglikelihood(pieces, disable_tqdm=True)
    wanted = peer.loglikelihood(pieces, disable_tqdm=True)
    gaps = [abs(a - b) for (a, _), (b, _) in zip(found, wanted, strict=True)]
    print(f"largest gap of {len(gaps)} loglikelihoods: {max(gaps):.1e}")
    self.assertLen(gaps, 200)
    self.assertLess(max(gaps), 1e-4)
    self.assertEqual([g for _, g in found], [g for _, g in wanted])
    whole = [self._request(a + b) for a, b in (p.args for p in pieces[:8])]
    for value, of_peer in zip(
        own.loglikelihood_rolling(whole),
        peer.loglikelihood_rolling(whole),
        strict=True,
    ):
      # Sums over a whole text: float32 has seven digits, of which two go.
      np.testing.assert_allclose(value, of_peer, rtol=1e-5)

  @pytest.mark.filterwarnings("ignore")  # Of the harness's own packages.
  def test_a_task_of_the_harness_that_needs_no_download(self):
    documents = [
        {"text": f"{a} and {a} are", "choices": [f" {b}" for b in (a, 2 * a)]}
        for a in range(2, 8)
    ]
    data = self.folder / "data.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(self.folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 1,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    for options in ({}, {"policy": "window", "capacity": 3}):
      lm = self.make(batch_size=4, **options)
      found = lm_eval.simple_evaluate(model=lm, tasks=[dict(task)])
      right = 0
      for document in documents:
        texts = [
            [*map(ord, document["text"] + choice)]
            for choice in document["choices"]
        ]
        counts = [len(choice) for choice in document["choices"]]
        scores = [value for value, _ in lm._answerer.score(texts, counts)]
        right += scores[1] > scores[0]
      accuracy = found["results"]["sums"]["acc,none"]
      self.assertAlmostEqual(accuracy, right / len(documents))


if __name__ == "__main__":
  absltest.main()
