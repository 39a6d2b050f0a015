"""`launch.cost_table` as its own process: fast, for it needs no jax."""

import json
import pathlib
import subprocess
import sys

from absl.testing import absltest
import pytest

from scansnap_jax.experiment import workdir

_ROOT = pathlib.Path(__file__).parent.parent.parent


def _run(*arguments, status=0):
  result = subprocess.run(
      [sys.executable, "-m", "launch.cost_table", *arguments],
      capture_output=True,
      text=True,
      cwd=_ROOT,
      check=False,
  )
  assert result.returncode == status, result.stderr
  return result


class CostTableTest(absltest.TestCase):

  def test_needs_no_jax(self):
    code = (
        "import sys; from launch import cost_table;"
        " assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_ROOT)

  def test_prints_rows_and_writes_numbers(self):
    workdir = pathlib.Path(self.create_tempdir().full_path) / "new"
    printed = _run("--kept=0.2", f"--workdir={workdir}").stdout
    row = next(
        line.split()
        for line in printed.splitlines()
        if line.split()[:3] == ["8,192", "8", "h2o"]
    )
    self.assertEqual(row[3:7], ["20", "%", "1.74", "16.8"])
    self.assertEqual(
        row[-7:], ["10.2", "1.41x", "6.1", "1.41x", "5.0", "1.41x", "pays"]
    )
    self.assertIn("does not fit", printed)
    self.assertIn("batch x length = 122,532", printed)
    written = json.loads((workdir / "cost_table.json").read_text())
    self.assertLen(written["rows"], 12)
    self.assertEqual(written["model"]["parameters"], 8_030_261_248)

  @pytest.mark.slow
  def test_a_name_is_printed_as_it_is_and_a_folder_locked(self):
    """No colour, no smile; and no second run beside the first."""
    folder = (
        pathlib.Path(self.create_tempdir().full_path) / "x[/]y[red] :smile:"
    )
    flags = ("--chips=v5e", f"--workdir={folder}")
    self.assertIn(
        f"All numbers: {folder}/cost_table.json\n", _run(*flags).stdout
    )
    with workdir.lock(folder):
      refused = _run(*flags, status=2)
    self.assertIn("error: another run is at work", refused.stderr)

  @pytest.mark.slow
  def test_reads_the_config_of_a_folder(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    fields = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    printed = _run(f"--model={folder}", "--chips=h100").stdout
    # 2 layers, 2 heads, keys and values of 4 numbers of 2 bytes.
    self.assertIn("0.0625 KiB", printed)
    both = _run(f"--model={folder}", "--preset=opt_30b", status=2)
    self.assertIn("error: --model and --preset", both.stderr)


if __name__ == "__main__":
  absltest.main()
