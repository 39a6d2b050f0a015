"""A new system is one short file and one line in the table of names.

The file is written into a package of its own; everything that a user does with
a model then works: train, stop, continue, save, load, generate, inspect,
evaluate.
"""

import dataclasses
import os
import pathlib
import signal
import sys
import textwrap
from unittest import mock

from absl.testing import absltest
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference import generate
from joma.inference.evaluation import evaluate_config
from joma.inference.evaluation import evaluate_grid
from joma.inference.evaluation import evaluate_subject
from joma.systems import names
from joma.transformer import config as configs
from joma.transformer import inspection
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.text import tokenizer
from joma.transformer.training import lm_config
from joma.transformer.training import train
from scansnap_jax.experiment.processes import preemption

_SYSTEM = '''
  """Heads are turned down by what a token says; their loudness costs."""

  import dataclasses
  from typing import ClassVar

  import jax
  import jax.numpy as jnp


  @dataclasses.dataclass(frozen=True)
  class Volume:
    """A gate of a number a head, learned from the layer's input."""

    name: ClassVar[str] = "volume"
    axes: ClassVar[dict] = {"kernel": ("fsdp", "tensor")}
    cost: float = 0.01

    def init_params(self, key, config, layer):
      """Returns the kernel [D, N]."""
      shape = (config.embed_dim, config.num_heads)
      return {"kernel": 0.1 * jax.random.normal(key, shape)}

    def gate(self, params, call, head_out):
      """Returns the heads' outputs, and how loud they are."""
      logits = jnp.einsum("BTD,DN->BTN", call.x, params["kernel"])
      gates = jax.nn.sigmoid(logits).astype(head_out.dtype)
      return gates[..., None] * head_out, {"loudness": self.cost * gates.mean()}
'''


class AddASystemTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    # This compiles much and runs little.
    jax.config.update("jax_disable_most_optimizations", True)
    self.addCleanup(jax.config.update, "jax_disable_most_optimizations", False)
    self.root = pathlib.Path(self.create_tempdir().full_path)
    source = textwrap.dedent(_SYSTEM).lstrip()
    self.assertLessEqual(len(source.splitlines()), 40)
    package = self.root / "added_systems"
    package.mkdir()
    (package / "__init__.py").write_text('"""Systems of a user."""\n')
    (package / "volume.py").write_text(source)
    self.enterContext(
        mock.patch.object(sys, "path", [str(self.root), *sys.path])
    )
    line = {"volume": "added_systems.volume:Volume"}
    self.enterContext(mock.patch.dict(names.SYSTEMS, line))

  def _train(self):
    """Two steps, stopped after the first and continued."""
    model = configs.TransformerConfig(
        num_layers=2,  # One with it, one without.
        embed_dim=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        hidden_dim=8,
        max_len=32,
        attention=("volume:cost=0.5", "softmax"),
    )
    config = lm_config.LmConfig(
        model=model,
        batch_size=4,
        seq_len=6,
        num_steps=2,
        log_every=1,
        eval_every=1,
        checkpoint_every=1,
        eval_batch_size=3,
        map_steps=(0,),
        init="pytorch",
        remat="full",
    )
    corpus = corpus_lib.load()
    corpus = dataclasses.replace(
        corpus, train=corpus.train[:99], valid=corpus.valid[:50]
    )

    taken = []

    def stop(num_steps):
      taken.append(num_steps)
      if sum(taken) == 1:  # A second signal would end the process.
        os.kill(os.getpid(), signal.SIGTERM)

    with self.assertRaisesRegex(preemption.Stopped, "step 1 of 2"):
      train.train_and_evaluate(
          config, corpus, self.root / "run", on_progress=stop
      )
    result = train.train_and_evaluate(config, corpus, self.root / "run")
    return model, result

  @pytest.mark.slow
  def test_all_that_users_do_with_it(self):
    config, result = self._train()
    # ln 256, and half of what half-open gates cost: its loss is trained too.
    start = float(result.history.losses[0])
    self.assertAlmostEqual(start, np.log(256) + 0.25, delta=0.2)
    kernel = result.params["layers_0"]["attn"]["volume"]["kernel"]
    self.assertEqual(kernel.shape, (8, 2))
    self.assertNotIn("volume", result.params["layers_1"]["attn"])
    folder = self.root / "saved"
    pretrained.save(folder, config, result.params)
    tokenizer.save(tokenizer.Bytes(), folder)
    loaded, params = pretrained.load(folder)
    self.assertEqual(loaded, config)
    chex.assert_trees_all_equal(params, jax.device_get(result.params))

    model = models.Transformer(loaded, implementation="reference")
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    found = generate.generate(model, params, prompts, max_new_tokens=4)
    text = jnp.array([[*prompts[1], *found[1]]])
    logits = model.apply({"params": params}, text)
    greedy = np.asarray(logits.argmax(axis=-1))[0, 4:-1]
    np.testing.assert_array_equal(greedy, found[1])

    seen = inspection.measure(loaded, params, np.arange(8)[None], 8)
    self.assertEqual(seen["entropy"].shape, (2, 2))
    self.assertTrue(np.isfinite(seen["entropy"]).all())
    settings = evaluate_config.EvaluateConfig(
        tasks=("mqar",),
        policies=("h2o",),
        budgets=(0.5,),
        num_seeds=1,
        batch_size=2,
        length=16,
        num_pairs=2,
        vocab_size=12,
    )
    evaluate_subject.check(settings, str(folder))
    subject = evaluate_subject.load(settings, str(folder))
    rows = evaluate_grid.measure(settings, subject)["mqar"]
    self.assertContainsSubset({"full", "h2o"}, {row["policy"] for row in rows})
    for row in rows:
      self.assertIsNone(row["failed"])
      self.assertBetween(row["quality"]["mean"], 0, 1)


if __name__ == "__main__":
  absltest.main()
