import hashlib
import json
import pathlib
import shutil

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.checkpoints import export
from joma.transformer.hf import own_form
from joma.transformer.hf import pretrained
from joma.transformer.layers import scanning
from joma.transformer.text import tokenizer
from joma.transformer.training import lm_step
from scansnap_jax.experiment import checkpoint
from scansnap_jax.experiment import errors
from scansnap_jax.experiment.saved import leaves

_CONFIG = dict(
    vocab_size=3,
    num_layers=2,
    embed_dim=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    hidden_dim=8,
    max_len=16,
)
_KEY = ".params['layers_0']['attn']['key']['kernel']"
_WORDS = tokenizer.Words(("<unk>", "to", "be"))


def _params(config, step):
  """The parameters of the model one by one, all of them `step`."""
  config = scanning.unrolled(config)
  model = models.Transformer(config, implementation="reference")
  shapes = jax.eval_shape(
      model.init, jax.random.key(0), jnp.zeros((1, 2), int)
  )["params"]
  return jax.tree.map(lambda x: np.full(x.shape, step, np.float32), shapes)


def make_run(workdir, **changed):
  """Writes what `train_lm` leaves behind, with checkpoints of steps 2 and 4."""
  config = configs.TransformerConfig(**_CONFIG | changed)
  with checkpoint.Checkpointer(workdir / "checkpoints" / "lm") as checkpointer:
    for step in (2, 4):
      params = _params(config, step)
      params = scanning.stack(params) if config.scan_layers else params
      moments = jax.tree.map(np.negative, params)
      state = lm_step.TrainState(np.int32(step), params, (moments,))
      tree = {"state": state, "history": {"losses": np.ones((1, 4))}}
      checkpointer.save(step, tree)
  (workdir / "corpus").mkdir()
  (workdir / "corpus" / "words-1.json").write_text(_WORDS.to_json())
  digest = hashlib.sha256(_WORDS.to_json().encode()).hexdigest()
  model = own_form.to_fields(config)
  del model["model_type"]
  settings = {"preset": "default", "lm": {"model": model, "tokenizer": "words"}}
  facts = {"tokenizer_sha256": digest}
  _write(workdir / "config.json", settings)
  _write(workdir / "summary.json", {"steps": [0, 4], "corpus_facts": facts})
  return config


def _write(path, value):
  path.write_text(json.dumps(value))


def _contents(folder):
  files = (path for path in sorted(folder.rglob("*")) if path.is_file())
  return {str(path): path.read_bytes() for path in files}


class ExportTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self._root = pathlib.Path(self.create_tempdir().full_path)
    self._workdir = self._root / "run"
    self._workdir.mkdir()

  @parameterized.parameters(
      (dict(), "llama"),
      (dict(scan_layers=True), "llama"),
      (dict(attention=("sink_logits",)), "joma"),
  )
  @pytest.mark.by_default("tokenizer0")
  def test_a_step_becomes_a_model_with_its_tokenizer(self, changed, family):
    config = make_run(self._workdir, **changed)
    before = _contents(self._workdir)
    for step, asked in ((4, None), (2, 2)):
      out = self._root / f"out{step}"
      found = export.export(self._workdir, out, asked)
      self.assertEqual(found, (step, family))
      read, params = pretrained.load(out)
      self.assertEqual(read.embed_dim, 8)
      chex.assert_trees_all_equal(params, _params(config, step))
      self.assertEqual(tokenizer.from_folder(out).words, _WORDS.words)
    self.assertEqual(_contents(self._workdir), before)
    self.assertLen(list(self._root.iterdir()), 3)

  def test_what_is_no_whole_finished_run_is_one_sentence(self):
    make_run(self._workdir)

    def of(change):
      folder = self._root / "changed"
      shutil.rmtree(folder, ignore_errors=True)
      shutil.copytree(self._workdir, folder)
      change(folder)
      with self.assertRaises(errors.UserError) as caught:
        export.export(folder, self._root / "out")
      names = [path.name for path in self._root.iterdir()]
      self.assertCountEqual(names, ["run", "changed"])
      return str(caught.exception)

    unlink = lambda name: lambda folder: (folder / name).unlink()
    self.assertRegex(of(unlink("config.json")), "config.json cannot be read")
    self.assertRegex(of(unlink("summary.json")), "not finished: .*at step 4")
    self.assertRegex(of(unlink("corpus/words-1.json")), "tokenizer=words of")
    write = lambda name, value: lambda path: _write(path / name, value)
    foreign = write("config.json", {"joma": {}})
    self.assertRegex(of(foreign), "not that of a run of train_lm")
    cut = write("summary.json", {"steps": [0, 4]})
    self.assertRegex(of(cut), "is damaged: no 'corpus_facts'")
    later = {"steps": [0, 6], "corpus_facts": {"tokenizer_sha256": ""}}
    self.assertRegex(of(write("summary.json", later)), "sha256 , is not in")
    gone = lambda path: shutil.rmtree(path / "checkpoints" / "lm" / "4")
    self.assertRegex(of(gone), "lacks step 4")

    def damage(folder):
      # As if other bits had been written: lists of checksums are whole.
      path = folder / "checkpoints" / "lm" / "4" / "digest" / "metadata"
      body = json.loads(path.read_text())["body"]
      (entry,) = (e for e in body["leaves"] if e["name"].endswith(_KEY))
      entry["shards"][0][1] ^= 1
      _write(path, {"crc32": leaves.crc32(body), "body": body})

    self.assertRegex(of(damage), "lm/4 is damaged: the checksum of .*params")
    cut = lambda path: (path / "checkpoints/lm/4/digest/metadata").unlink()
    self.assertRegex(of(cut), "metadata cannot be read")

  @pytest.mark.slow
  def test_nothing_is_written_over(self):
    make_run(self._workdir)
    out = self._root / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    with self.assertRaisesRegex(errors.UserError, "out cannot be written"):
      export.export(self._workdir, out)
    self.assertEqual(_contents(out), {str(out / "mine"): b"kept"})
    with self.assertRaisesRegex(errors.UserError, "step=3; it kept 2, 4"):
      export.export(self._workdir, self._root / "other", 3)
    (out / "mine").unlink()
    export.export(self._workdir, out)
    pretrained.load(out)


if __name__ == "__main__":
  absltest.main()
