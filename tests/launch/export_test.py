import pathlib

from absl.testing import absltest
import pytest

from tests.faults import attacks
from tests.faults import scripts


class ExportTest(absltest.TestCase):

  @pytest.mark.slow
  def test_a_run_becomes_what_save_hf_writes_bit_for_bit(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    (root / "text.txt").write_text(scripts.TEXT)
    train = (
        *(*scripts.TRAIN_LM, "--corpus=text.txt", "--num_steps=4"),
        *("--log_every=2", "--eval_every=2", "--checkpoint_every=2"),
        *("--map_steps=2", "--tokenizer=words", "--save_hf", "--workdir=run"),
    )
    with attacks.Zygote() as zygote:

      def run(name, *argv):
        return zygote.attack(
            f"launch.{name}", *argv, cwd=root, hooks=["undrawn"]
        )

      self.assertEqual(run("train_lm", *train).status, 0)
      for step in (2, 4):
        given = ("--workdir=run", f"--out=new/in/out{step}", f"--step={step}")
        ended = run("export", *given)
        self.assertEqual(ended.status, 0, ended.err)
        self.assertIn(f"Step {step} as model_type llama: ", ended.out)
        expected = sorted((root / "run" / "hf" / f"step{step}").iterdir())
        found = sorted((root / "new" / "in" / f"out{step}").iterdir())
        for a, b in zip(found, expected, strict=True):
          self.assertEqual(a.name, b.name)
          self.assertEqual(a.read_bytes(), b.read_bytes(), a.name)
      again = run("export", *given)
      self.assertEqual(again.status, 2)
      self.assertRegex(
          again.err, "^error: --out=new/in/out4 is there: [^\n]*\n$"
      )
      for out, message in (
          ("text.txt/a", "--out=.* cannot be made: .*text.txt is no folder"),
          ("new", "no checkpoint of step=3; it kept 2, 4"),
      ):
        ended = run("export", "--workdir=run", f"--out={out}", "--step=3")
        self.assertEqual(ended.status, 2)
        self.assertRegex(ended.err, f"^error: .*{message}[^\n]*\n$")


if __name__ == "__main__":
  absltest.main()
