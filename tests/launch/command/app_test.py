import pathlib
import shlex
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized

from launch.command import app

_SCRIPT = '''
"""Example script."""
import dataclasses
import errno
import sys
from launch.command import app, flag_config
from scansnap_jax.experiment import errors

@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Optimizer.

  Attributes:
    learning_rate: Step size.
  """
  learning_rate: float = 0.5

@dataclasses.dataclass(frozen=True)
class Config:
  """Config.

  Attributes:
    num_steps: How many.
    optimizer: Which.
  """
  num_steps: int = 3
  optimizer: Optimizer = Optimizer()

build = flag_config.define(Config())

def main(argv):
  config = build()
  if config.num_steps == 0:
    raise errors.UserError("num_steps is 0")
  if config.num_steps == -2:
    raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
  if config.num_steps == -3:
    raise MemoryError("Unable to allocate 6.00 GiB")
  if config.num_steps == -4:
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\\nallocating 8 bytes")
  if config.num_steps == -5:
    raise OSError(errno.EMFILE, "Too many open files", "shakespeare.txt")
  if config.num_steps < 0:
    raise ValueError("a bug")
  print(config.num_steps)
  if config.num_steps == 8:
    print("2 ± 1, \\udcff")
  print("a remark", file=sys.stderr)
  if config.num_steps > 99:
    print("much\\n" * 100_000)
    return 0
  return 7

app.run(main)
'''


class RunTest(parameterized.TestCase):

  def _run(self, *args):
    script = self.create_tempfile("script.py", content=_SCRIPT).full_path
    root = pathlib.Path(app.__file__).parents[2]
    return subprocess.run(
        [sys.executable, script, *args],
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )  # pyformat: disable

  def test_main_gets_the_parsed_flags_and_gives_the_exit_status(self):
    result = self._run("--num_steps=5")
    self.assertEqual(result.stdout, "5\n")
    self.assertEqual(result.stderr, "a remark\n")
    self.assertEqual(result.returncode, 7)

  @parameterized.parameters(
      ("--num_steps=0", "num_steps is 0"),
      ("--num_steps=a\nb", "flag --num_steps=a b: expected an int, such as 3"),
      ("--num_steps=x", "flag --num_steps=x: expected an int, such as 3"),
      ("--num_stpes=3", "unknown flag --num_stpes; did you mean --num_steps?"),
      (
          "--learning_rate=3",
          (
              "unknown flag --learning_rate; did you mean"
              " --optimizer.learning_rate?"
          ),
      ),
      ("--zzz", "unknown flag --zzz; --help lists them"),
      (
          "--flagfile=/no/file",
          (
              "Unable to open flagfile: [Errno 2] No such file or directory:"
              " '/no/file'"
          ),
      ),
      (
          "num_steps=3",
          "unexpected ['num_steps=3']; flags are written --name=value",
      ),
  )
  def test_user_error_is_one_line_and_status_2(self, arg, message):
    result = self._run(arg)
    self.assertEqual(result.stderr, f"error: {message}\n")
    self.assertEqual(result.stdout, "")
    self.assertEqual(result.returncode, 2)

  def test_bug_keeps_its_traceback(self):
    result = self._run("--num_steps=-1")
    self.assertStartsWith(result.stderr, "Traceback")
    self.assertIn("ValueError: a bug", result.stderr)
    self.assertEqual(result.returncode, 1)

  @parameterized.parameters(
      (-2, "metrics.jsonl: No space left on device."),
      (-3, r"not enough memory \(Unable to allocate 6.00 GiB\)"),
      (-4, r"not enough memory \(Out of memory allocating 8 bytes\)"),
      (-5, "no more: Too many open files. Raise its limits"),
  )
  def test_what_the_machine_lacks_is_one_line(self, number, message):
    result = self._run(f"--num_steps={number}")
    self.assertRegex(result.stderr, f"^error: .*{message}.*\n$")
    self.assertEqual(result.returncode, 2)

  def test_help_lists_the_flags_of_the_script(self):
    result = self._run("--help")
    self.assertIn("--num_steps: How many.", result.stdout)
    self.assertIn("--optimizer.learning_rate: Step size.", result.stdout)


class SuggestTest(parameterized.TestCase):

  @parameterized.parameters(
      ("num_stpes", "num_steps"),
      ("rate", "optimizer.rate"),
      ("optimizer.rat", "optimizer.rate"),
      ("completely_else", None),
  )
  def test_nearest_flag_or_none(self, name, expected):
    known = ["num_steps", "optimizer.rate", "model.width"]
    self.assertEqual(app.suggest(name, known), expected)


class StreamsTest(absltest.TestCase):
  """What a shell does with the streams of a script."""

  def test_what_an_encoding_lacks_is_escaped(self):
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for env, text in ((plain, r"2 \xb1 1"), ({"PYTHONUTF8": "1"}, "2 ± 1")):
      result = self._shell("", "--num_steps=8", **env)
      self.assertEqual(
          (result.returncode, result.stdout), (7, f"8\n{text}, \\udcff\n")
      )

  def _shell(self, tail, *args, **env):
    script = self.create_tempfile("script.py", content=_SCRIPT).full_path
    command = shlex.join([sys.executable, script, *args])
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} {tail}"],
        env={"PYTHONPATH": str(pathlib.Path(app.__file__).parents[2]), **env},
        encoding="utf-8",
        capture_output=True,
        check=False,
    )

  def test_a_reader_that_goes_away_ends_it_quietly(self):
    result = self._shell("| head -c 3", "--num_steps=100")
    self.assertEqual(result.returncode, 141)
    self.assertEqual(result.stdout, "100")
    self.assertEqual(result.stderr, "a remark\n")

  def test_a_full_stdout_is_one_line_however_little_is_written(self):
    for num_steps in (3, 100):
      result = self._shell("> /dev/full", f"--num_steps={num_steps}")
      self.assertEqual(result.returncode, 2)
      self.assertRegex(
          result.stderr,
          "^a remark\nerror: stdout cannot be written: No space left[^\n]*\n$",
      )

  def test_what_nobody_reads_changes_no_status_and_no_result(self):
    for tail in ("2> /dev/full", "2> >(:)"):
      self.assertEqual(self._shell(tail, "--num_steps=0").returncode, 2)
      result = self._shell(tail)
      self.assertEqual((result.returncode, result.stdout), (7, "3\n"))

  def test_a_stdout_that_may_not_be_written_is_one_line(self):
    result = self._shell("> >(:) 1< /dev/null")
    self.assertEqual(result.returncode, 2)
    self.assertIn("error: stdout cannot be written: Bad file", result.stderr)

  def test_remarks_never_get_into_the_results(self):
    result = self._shell("2>&-")
    self.assertEqual((result.returncode, result.stdout), (7, "3\n"))

  def test_help_is_no_failure_and_has_the_statuses_of_any_output(self):
    ends = {"> /dev/null": 0, "| exec 0<&-": 141, "> /dev/full": 2, ">&-": 0}
    for tail, status in ends.items():
      result = self._shell(tail, "--help")
      self.assertEqual(result.returncode, status, tail)
      self.assertNotIn("Traceback", result.stderr)

  def test_a_closed_stdout_leaves_remarks_and_status(self):
    result = self._shell(">&-")
    self.assertEqual((result.returncode, result.stderr), (7, "a remark\n"))


if __name__ == "__main__":
  absltest.main()
