"""What came of an attack is named rightly; the suites rely on it."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized

from tests.faults import attacks
from tests.faults import scripts

_ROOT = pathlib.Path(__file__).parents[2]


def _ended(status, err="", *, is_late=False):
  return attacks.Ended(status, is_late, 0, 0.0, "", err)


class OutcomeTest(parameterized.TestCase):

  @parameterized.parameters(
      (0, "", attacks.RIGHT),
      (0, "Traceback (most recent call last):\n", attacks.TRACEBACK),
      (0, "remark\nOSError: of a thread\n", attacks.TRACEBACK),
      (2, "remark\nerror: --a=b is wrong.\n", attacks.CLEAR),
      (2, "error: one\nerror: two\nerror: three\n", attacks.TRACEBACK),
      (2, "wrong.\n", attacks.TRACEBACK),
      (1, "", attacks.TRACEBACK),
      (-11, "", attacks.TRACEBACK),
      (-24, "", attacks.CUT),
  )
  def test_status_and_stderr_give_the_outcome(self, status, err, expected):
    self.assertEqual(_ended(status, err).outcome, expected)
    self.assertEqual(_ended(status, err, is_late=True).outcome, attacks.HANG)

  def test_the_table_counts_and_the_failures_say_what_to_do_again(self):
    tally = attacks.Tally()
    tally.add("bits", "seed 1", _ended(0))
    tally.add("bits", "seed 2", _ended(0), attacks.SILENT)
    tally.add("rows", "seed 3", _ended(2, "error: no"))
    head, _, *rows = tally.table().splitlines()
    self.assertEndsWith(head, "clear error | traceback | silent | hang |")
    self.assertEqual(
        rows,
        [
            "| bits | 2 | 1 | 0 | 0 | 1 | 0 |",
            "| rows | 1 | 0 | 1 | 0 | 0 | 0 |",
            "| all | 3 | 1 | 1 | 0 | 1 | 0 |",
        ],
    )
    self.assertLen(tally.failures, 1)
    self.assertStartsWith(tally.failures[0], "silent: bits: seed 2: status 0")


class ScriptsTest(absltest.TestCase):

  def test_who_imports_jax_fixes_what_decides_bits_and_finds_its_devices(self):
    asking = []
    for script in scripts.find():
      path = _ROOT / f"{script.module.replace('.', '/')}.py"
      if path.exists() and "\nimport jax\n" in path.read_text():
        asking.append(script.module)
        self.assertRegex(path.read_text(), r"devices\.set_up\(|harness\.run\(")
    self.assertContainsSubset(["launch.bench.sampling"], asking)


class ZygoteTest(absltest.TestCase):
  """Modules of the standard library stand for scripts."""

  def test_children_end_as_scripts_of_a_shell_do(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    with attacks.Zygote(is_warm=False) as zygote:
      attack = lambda code, **options: zygote.attack(
          "timeit", "-n1", "-r1", code, cwd=folder, **options
      )
      self.assertEqual(zygote.threads, 1)
      self.assertIn("1 loop", attack("pass").out)
      failed = attack("1 / 0")
      self.assertIn("ZeroDivisionError", failed.err)
      self.assertEqual((failed.status, failed.outcome), (1, attacks.TRACEBACK))
      code = "import os; os._exit(os.environ.get('A') != '1' or 7)"
      self.assertEqual(attack(code, env={"A": "1"}).status, 7)
      self.assertEqual(attack("while 1: pass", cpu_s=1).outcome, attacks.CUT)
      late = attack("import time; time.sleep(99)", wall_s=0.3)
      self.assertEqual(late.outcome, attacks.HANG)
      full = attack("pass", streams={"stdout": "/dev/full"})
      self.assertEqual(full.status, 120)  # As the interpreter says it.
      self.assertEqual(attack("pass", streams={"stdout": "closed"}).out, "")
      code = "import sys; sys.stdout.isatty() or 1 / 0; print('x')"
      seen = attack(code, streams={"stdout": "terminal:seen"})
      self.assertEqual((seen.status, seen.err), (0, ""))
      limit = attack("x = bytes(2**34)", limits={"AS": 2**33})
      self.assertIn("MemoryError", limit.err)


if __name__ == "__main__":
  absltest.main()
