"""`launch.generate` as its own process, on a model of random numbers."""

import contextlib
import dataclasses
import io
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import flagsaver
import pytest

from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer
from launch import generate
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

_ROOT = pathlib.Path(__file__).parent.parent.parent
_CONFIG = configs.TransformerConfig(
    vocab_size=256,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    hidden_dim=16,
    max_len=32,
)


def save_model(folder: pathlib.Path) -> None:
  model = models.Transformer(_CONFIG, implementation="reference")
  pretrained.save(folder, _CONFIG, applied.params(model))
  tokenizer.save(tokenizer.Bytes(), folder)


def _run(*args):
  return subprocess.run(
      [sys.executable, "-m", "launch.generate", *args],
      capture_output=True,
      text=True,
      cwd=_ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      check=False,
  )


class GenerateTest(absltest.TestCase):

  @pytest.mark.slow
  def test_a_batch_and_one_prompt_give_the_same_text(self):
    folder = self.create_tempdir().full_path
    save_model(pathlib.Path(folder))
    options = (f"--model={folder}", "--max_new_tokens=8", "--prompt=To be")
    many = _run(*options, "--prompt=or not to")
    one = _run(*options)
    self.assertEqual(many.returncode, 0, many.stderr)
    self.assertTrue(many.stdout.startswith("To be"), many.stdout)
    self.assertIn("or not to", many.stdout)
    self.assertTrue(many.stdout.startswith(one.stdout.rstrip("\n")))
    self.assertGreater(len(one.stdout), len("To be\n"))
    self.assertRegex(one.stderr, r"\d tokens/s after")

  @pytest.mark.slow
  def test_a_bounded_cache_of_room_enough_changes_nothing(self):
    folder = self.create_tempdir().full_path
    save_model(pathlib.Path(folder))
    options = (f"--model={folder}", "--max_new_tokens=8", "--prompt=To be")
    full = _run(*options)
    bounded = _run(*options, "--policy=h2o", "--capacity=32")
    small = _run(*options, "--policy=streaming_llm", "--capacity=6")
    self.assertEqual(bounded.stdout, full.stdout, bounded.stderr)
    self.assertEqual(small.returncode, 0, small.stderr)

  def test_bad_input_is_one_line(self):
    self._check_bad_input(
        ((), "give --prompt=TEXT or --prompt_file=FILE"),
        (("--prompt=a", "--policy=h3o"), "policy='h3o' is unknown"),
    )

  @pytest.mark.slow
  def test_more_bad_input_is_one_line(self):
    self._check_bad_input(
        (("--prompt=a", "--top_p=2"), r"top_p must lie in \(0, 1\], got 2.0"),
        (("--prompt_file=absent",), "--prompt_file: absent cannot"),
        (("--prompt=a", "--policy=h2o"), "--policy=h2o needs --capacity"),
        (("--prompt=a", "--capacity=9"), "--capacity=9 has no effect"),
    )

  def _check_bad_input(self, *cases):
    for args, message in cases:
      result = _run("--model=unused", *args)
      self.assertEqual(result.returncode, 2)
      self.assertRegex(result.stderr, f"(?m)^error: {message}[^\n]*\n\\Z")

  def test_a_line_of_a_prompt_file_ends_at_line_feeds_alone(self):
    path = pathlib.Path(self.create_tempdir().full_path) / "prompts.txt"
    path.write_bytes(
        b"\xef\xbb\xbfone\r\n"
        + "two\u2028\x0cand a\rhalf\x85\u2029\nthree".encode()
    )
    with flagsaver.flagsaver(prompt_file=str(path)):
      self.assertEqual(
          generate._read_prompts(),
          ["one", "two\u2028\x0cand a\rhalf\x85\u2029", "three"],
      )
    path.write_bytes(b"caf\xe9\n")
    with flagsaver.flagsaver(prompt_file=str(path)):
      with self.assertRaisesRegex(
          errors.UserError, "--prompt_file: .*is not UTF-8"
      ):
        generate._read_prompts()

  def test_a_prompt_of_a_million_tokens_is_told_before_the_work(self):
    shown, learned = io.StringIO(), dataclasses.replace(
        _CONFIG, positions="learned"
    )
    with flagsaver.flagsaver(max_new_tokens=5):
      with contextlib.redirect_stderr(shown):
        generate._check_sizes(_CONFIG, [10**6], True)
        generate._check_sizes(_CONFIG, [10**6, 3], False)
      with self.assertRaisesRegex(errors.UserError, "asked for 1000004"):
        generate._check_sizes(learned, [10**6], True)
      for keeps_all in (True, False):
        with self.assertRaisesRegex(errors.UserError, "GB of memory"):
          generate._check_sizes(_CONFIG, [10**6] * 10**5, keeps_all)
    self.assertEqual(shown.getvalue().count("warning: up to 1000005"), 2)
    self.assertIn("reading 1,000,000 tokens takes about 3", shown.getvalue())
    self.assertIn("reading 1,000,003 tokens takes about 3", shown.getvalue())

  def test_flags_do_not_wait_for_jax(self):
    code = (
        "import sys; from launch import generate;"
        " assert not {'jax', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_ROOT)
