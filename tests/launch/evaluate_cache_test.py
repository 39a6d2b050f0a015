"""`launch.evaluate_cache` as its own process."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

from absl.testing import absltest
import pytest

from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer
from tests.faults import scripts
from tests.joma.transformer import applied

_ROOT = pathlib.Path(__file__).parent.parent.parent
_TINY = (
    "--train_steps=2",
    "--train_batch=4",
    "--batch_size=2",
    "--num_seeds=3",
    "--length=16",
    "--num_pairs=2",
    "--vocab_size=12",
    "--budgets=0.25,0.5",
    "--policies=h2o,streaming_llm:num_sinks=1",
)


def _run(*arguments):
  # Compilation is most of it, and what is compiled hardly runs.
  env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_backend_optimization_level=0",
  }
  return subprocess.run(
      [sys.executable, "-m", "launch.evaluate_cache", *arguments],
      capture_output=True,
      text=True,
      cwd=_ROOT,
      check=False,
      env=env,
  )


class EvaluateCacheTest(absltest.TestCase):

  def test_flags_do_not_wait_for_jax(self):
    code = (
        "import sys; from launch import evaluate_cache;"
        " assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_ROOT)

  @pytest.mark.slow
  def test_a_policy_that_is_none_costs_no_training(self):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "new"
    result = _run(f"--workdir={workdir}", "--policies=h3o")
    self.assertEqual(result.returncode, 2)
    self.assertIn("error: policy='h3o' is unknown; there are", result.stderr)
    self.assertFalse(workdir.exists())

  @pytest.mark.slow  # A dozen compilations.
  def test_trains_reads_and_reports(self):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "new"
    result = _run(f"--workdir={workdir}", "--explore", *_TINY)
    self.assertEqual(result.returncode, 0, result.stderr)
    summary = json.loads((workdir / "summary.json").read_text())
    self.assertIn(summary["finding"][0], result.stdout)
    rows = summary["tasks"]["mqar"]
    self.assertLen(rows, 1 + 4 * 2)
    for row in rows:
      self.assertEqual(row["num_texts"], 6)
      # Random eviction is another program for each draw.
      expected = 3 if row["policy"] == "random" else 1
      self.assertEqual(row["compilations"], expected)
    report = (workdir / "report.html").read_text()
    self.assertEqual(report.count("data:image/png;base64"), 1)
    self.assertIn('<a href="explore.html">explore.html</a>', report)
    # Four slots are a quarter of sixteen tokens.
    page = (workdir / "explore.html").read_text()
    self.assertRegex(page, '"label": "H2O", "slots": 4, "num_kv_heads": 1')

  @pytest.mark.slow  # A dozen compilations.
  def test_a_run_of_ruler_that_is_killed_goes_on_from_its_rows(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    shape = dataclasses.replace(scripts._MODEL, max_len=1024)
    model = models.Transformer(shape, implementation="reference")
    (folder / "model").mkdir()
    pretrained.save(folder / "model", shape, applied.params(model))
    tokenizer.save(tokenizer.Bytes(), folder / "model")
    workdir = folder / "run"
    command = (
        *(f"--model={folder / 'model'}", f"--workdir={workdir}"),
        *("--tasks=ruler", "--ruler.names=niah_single_1,qa_1"),
        *("--ruler.passes=0", "--length=700", "--batch_size=2"),
        *("--num_seeds=1", "--policies=h2o", "--ruler.budgets=0.5"),
        *("--ruler.answer_tokens=3", "--protocol=agnostic"),
    )
    rows = workdir / "rows.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.evaluate_cache", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=_ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    while process.poll() is None and not rows.exists():
      time.sleep(0.1)
    process.kill()
    process.wait()
    kept = rows.read_text().splitlines()[:1]
    result = _run(*command)
    self.assertEqual(result.returncode, 0, result.stderr)
    lines = rows.read_text().splitlines()
    self.assertEqual(lines[:1], kept)
    self.assertLen(lines, 2 * (1 + 3))
    self.assertIn(
        "| policy | kept | mean | niah_single_1 | qa_1 |", result.stdout
    )
    # What was there is not measured again, and what is measured is said.
    self.assertNotIn("niah_single_1, full: ", result.stderr)
    self.assertIn("qa_1, H2O".lower(), result.stderr.lower())
    report = (workdir / "report.html").read_text()
    self.assertEqual(report.count("data:image/png;base64"), 1)

  def test_ruler_stands_alone_and_wants_a_model(self):
    for flags, message in (
        (("--tasks=ruler,mqar",), "tasks=ruler stands alone"),
        (
            ("--tasks=ruler", "--protocol=decoding", "--ruler.scope=model"),
            "ruler.scope=model with protocol=decoding",
        ),
        (("--tasks=ruler", "--explore"), "--explore shows no text of"),
        (("--tasks=ruler",), "tasks=ruler reads texts: give --model"),
    ):
      result = _run("--workdir=unused", *flags)
      self.assertEqual(result.returncode, 2)
      self.assertIn(message, result.stderr)


if __name__ == "__main__":
  absltest.main()
