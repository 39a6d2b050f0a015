import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
import numpy as np
import pytest

from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer
from tests.faults import attacks

_TINY = (
    "--model.num_layers=1",
    "--model.embed_dim=8",
    "--model.num_heads=1",
    "--model.num_kv_heads=1",
    "--model.head_dim=8",
    "--model.hidden_dim=8",
    "--batch_size=2",
    "--seq_len=8",
    "--num_steps=4",
    "--log_every=2",
    "--eval_every=2",
    "--map_steps=0,4",
)


class TrackersTest(absltest.TestCase):

  def test_the_flag_of_before_names_one(self):
    code = (
        "from absl import flags; from launch import train_lm;"
        " from launch.command import trackers;"
        " flags.FLAGS(['_', '--workdir=w', '--trackers=wandb',"
        " '--tensorboard']); print(trackers.names())"
    )
    printed = subprocess.check_output(
        [sys.executable, "-c", code],
        cwd=pathlib.Path(__file__).parents[2],
        text=True,
    )
    self.assertEqual(printed.strip(), "['wandb', 'tensorboard']")


class TrainLmTest(absltest.TestCase):

  def _run(self, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "launch.train_lm", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )

  @pytest.mark.slow
  def test_monarch_matrices_are_trained_and_saved(self):
    text = self.create_tempfile("text.txt", "to be or not to be\n" * 99)
    workdir = pathlib.Path(self.create_tempdir().full_path)
    done = self._run(
        f"--workdir={workdir}",
        f"--corpus={text.full_path}",
        *_TINY,
        "--model.projection=monarch:blocks=2:rank=2",
        "--lr=0.02",
        "--num_steps=60",
        "--log_every=20",
        "--eval_every=60",
        "--map_steps=60",
        "--save_own",
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    summary = json.loads((workdir / "summary.json").read_text())
    # Bytes at random cost log 256 = 5.5.
    self.assertLess(summary["final_valid_loss"], 2.5)
    config, params = pretrained.load(workdir / "own" / "step60")
    self.assertEqual(config.projection, "monarch:blocks=2:rank=2")
    query = params["layers_0"]["attn"]["query"]
    self.assertContainsSubset(["right", "left"], query)

  def test_from_flags_to_report_and_a_folder_for_others(self):
    text = self.create_tempfile("text.txt", "to be or not to be\n" * 99)
    workdir = pathlib.Path(self.create_tempdir().full_path)
    done = self._run(
        f"--workdir={workdir}",
        f"--corpus={text.full_path}",
        *_TINY,
        "--save_hf",
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertRegex(done.stdout, r"sha256 [0-9a-f]{12}.* by bytes.* tokens")
    summary = json.loads((workdir / "summary.json").read_text())
    self.assertEqual(summary["steps"], [0, 2, 4])
    self.assertEqual(summary["corpus_facts"]["tokenizer"], "bytes")
    self.assertLess(summary["final_valid_loss"], 8)
    self.assertIn("report.html", [path.name for path in workdir.iterdir()])
    maps = np.load(workdir / "attn_maps.npz")
    self.assertEqual(maps["maps"].shape, (2, 1, 1, 8, 8))
    self.assertEqual(maps["steps"].tolist(), [0, 4])
    config, _ = pretrained.load(workdir / "hf" / "step4")
    self.assertEqual(config.embed_dim, 8)
    self.assertEqual(
        tokenizer.from_folder(workdir / "hf" / "step4").vocab_size, 256
    )
    flags = (workdir / "flags.txt").read_text()
    self.assertIn("--model.embed_dim=8\n", flags)

  @pytest.mark.slow
  def test_a_run_on_a_mesh_goes_on_on_another_and_from_its_flagfile(self):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "run"
    given = (f"--workdir={workdir}", *_TINY)
    first = self._run(*given, "--mesh=1,1,1,2", "--profile=2:4")
    self.assertEqual(first.returncode, 0, first.stderr)
    self.assertLen(list((workdir / "profile").rglob("*.xplane.pb")), 1)
    again = self._run(*given, "--mesh=1,2,1")
    self.assertEqual(again.returncode, 0, again.stderr)
    other = workdir.with_name("other")
    flagfile = f"--flagfile={workdir}/flags.txt"
    third = self._run(flagfile, f"--workdir={other}")
    self.assertEqual(third.returncode, 0, third.stderr)
    of = lambda done: done.stdout.split("Validation loss ")[1].split()[0]
    self.assertEqual(of(first), of(again))
    self.assertEqual(of(first), of(third))
    bad = self._run(*given, "--mesh=2,1,1,3")
    self.assertEqual(bad.returncode, 2)
    self.assertIn("1, 2, 4, 8 would do", bad.stderr)

  @pytest.mark.slow
  def test_a_run_that_is_done_writes_its_end(self):
    text = self.create_tempfile("text.txt", "to be or not to be\n" * 99)
    workdir = pathlib.Path(self.create_tempdir().full_path)
    flags = (f"--workdir={workdir}", f"--corpus={text.full_path}", *_TINY)
    flags = (*flags, "--map_steps=0,2")
    for more in ((), ("--save_hf",)):
      done = self._run(*flags, *more)
      self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual([p.name for p in (workdir / "hf").iterdir()], ["step4"])
    pretrained.load(workdir / "hf" / "step4")

  @pytest.mark.slow
  def test_the_vocabulary_is_the_tokenizers_where_it_is_not_given(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    (root / "text.txt").write_text("to be or not to be\n" * 400)
    flags = (*_TINY, "--corpus=text.txt", "--tokenizer=words")
    with attacks.Zygote() as zygote:
      run = lambda *more: zygote.attack(
          "launch.train_lm", *flags, *more, cwd=root, hooks=["undrawn"]
      )
      # The number of old, as a run began with it that goes on today.
      for more, number in (((), 5), (("--model.vocab_size=256",), 256)):
        for given in (more, ()):
          done = run(f"--workdir={number}", *given)
          self.assertEqual(done.status, 0, done.err)
        self.assertIn("lm goes on from step 4.", done.err)
        recorded = json.loads((root / str(number) / "config.json").read_text())
        self.assertEqual(recorded["lm"]["model"]["vocab_size"], number)
        line = f"--model.vocab_size={number}\n"
        self.assertIn(line, (root / str(number) / "flags.txt").read_text())
      done = run("--model.vocab_size=4", "--workdir=new")
      self.assertEqual(done.status, 2)
      self.assertIn("vocab_size=4 is less than the 5 tokens", done.err)

  @pytest.mark.slow
  def test_what_would_fail_at_the_end_fails_at_once(self):
    workdir = self.create_tempdir().full_path
    for arguments, message in (
        (["--preset=joma_figure6", "--save_hf"], "cannot say|describe"),
        (["--reference_csv=nowhere.csv"], "nowhere.csv cannot be read"),
        (
            ["--preset=joma_figure6", "--data_dir=/nowhere"],
            "--corpus=wikitext2",
        ),
    ):
      done = self._run(f"--workdir={workdir}/new", *arguments)
      self.assertEqual(done.returncode, 2, done.stderr)
      self.assertRegex(done.stderr, message)


if __name__ == "__main__":
  absltest.main()
