import contextlib
import importlib.util
import io
import json
import os
import pathlib
from unittest import mock

from absl.testing import absltest
import jax
import numpy as np

from launch.bench import harness
from scansnap_jax.experiment import errors


class TakeTurnsTest(absltest.TestCase):

  def test_contestants_alternate_and_what_warms_up_does_not_count(self):
    now, order = [0.0], []

    def turn(name, seconds):
      order.append(name)
      # What compiles takes longer, and is not to count.
      now[0] += seconds if len(order) > 4 else 100.0

    turns = {
        "a": lambda: turn("a", 0.08),
        "b": lambda: turn("b", 0.02 * len(order)),
    }
    with mock.patch.object(harness.time, "perf_counter", lambda: now[0]):
      seconds = harness.take_turns(turns, 3, num_warm_ups=2, num_steps=2)
    self.assertEqual(order, ["a", "b"] * 5)
    np.testing.assert_allclose(seconds["a"], [0.04] * 3)
    np.testing.assert_allclose(seconds["b"], [0.05, 0.07, 0.09])

  def test_pauses_are_no_part_of_a_turn(self):
    now = [0.0]
    sleep = lambda s: now.append(now.pop() + s)
    with (
        mock.patch.object(harness.time, "perf_counter", lambda: now[0]),
        mock.patch.object(harness.time, "sleep", sleep),
    ):
      seconds = harness.take_turns({"a": lambda: None}, 2, pause_s=5.0)
    np.testing.assert_array_equal(seconds["a"], [0, 0])
    self.assertEqual(now, [15])


class StatisticsTest(absltest.TestCase):

  def test_a_ratio_is_the_median_of_those_within_a_round(self):
    slow = np.array([2.0, 30.0, 4.0])  # The second round was disturbed.
    self.assertEqual(harness.ratio(slow, np.array([1.0, 15.0, 1.0])), 2)

  def test_quartiles_by_hand(self):
    found = harness.quartiles_ms(np.array([5.0, 1, 4, 2, 3]), "our_")
    self.assertEqual(
        found, {"our_ms": 3000, "our_iqr_ms": 2000, "our_least_ms": 1000}
    )

  def test_calls_are_timed_one_by_one(self):
    times = iter([1.0, 3.0, 4.0])
    with mock.patch.object(harness.time, "perf_counter", lambda: next(times)):
      seconds = harness.seconds_of(lambda: None, 2)
    np.testing.assert_array_equal(seconds, [2, 1])


class CompareTest(absltest.TestCase):

  def test_ratios_are_of_times_a_step(self):
    now = [0.0]

    def lasting(seconds):
      def turn():
        now[0] += seconds

      return turn

    rows = {
        "jax plain": harness.Contestant(1.5, lasting(0.08)),
        "jax all": harness.Contestant(1.5, lasting(0.02)),
        "torch plain": harness.Contestant(1.5, lasting(0.16)),
    }
    with (
        mock.patch.object(harness.time, "perf_counter", lambda: now[0]),
        mock.patch.object(harness.time, "sleep"),
    ):
      beside = ["jax plain", "torch plain"]
      _, row, _ = harness.compare(rows, beside, 3, 2)
    self.assertEqual((row["row"], row["loss"]), ("jax all", 1.5))
    self.assertAlmostEqual(row["step_ms"], 10)
    self.assertAlmostEqual(row["least_ms"], 10)
    self.assertAlmostEqual(row["jax plain over it"], 4)
    self.assertAlmostEqual(row["torch plain over it"], 8)
    self.assertLen(row, 6)


class TableTest(absltest.TestCase):

  def test_what_a_row_lacks_is_empty(self):
    columns = {"name": ("kernel", str), "us": ("time us", "{:.1f}".format)}
    found = harness.table(columns, [dict(name="a", us=1.25), dict(us=None)])
    self.assertEqual(
        found.splitlines(),
        ["| kernel | time us |", "| --- | --- |", "| a | 1.2 |", "|  |  |"],
    )

  def test_nothing_is_written_as_nothing_and_zero_as_zero(self):
    columns = {"us": ("us", "{:.1f}".format)}
    found = harness.table(columns, [dict(us=0.0), dict(us=None)])
    self.assertEqual(found.splitlines()[2:], ["| 0.0 |", "|  |"])

  def test_no_name_ends_its_cell(self):
    found = harness.table({"a": ("a", str)}, [dict(a="x|y\nz")])
    self.assertEqual(found.splitlines()[2:], [r"| x\|y z |"])

  def test_facts_are_a_list_and_rows_a_table_with_all_columns(self):
    rows = [{"T": 8, "s": 0.123456}, {"T": 16, "note": "none"}]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
      harness.tell("steps", {"total": 1.5, "rows": rows, "n": 2})
    self.assertEqual(
        [line for line in printed.getvalue().splitlines() if line],
        [
            *("steps", "- total: 1.5", "- n: 2", "steps: rows"),
            *("| T | s | note |", "| --- | --- | --- |"),
            *("| 8 | 0.1235 |  |", "| 16 |  | none |"),
        ],
    )


class ChildTest(absltest.TestCase):

  def test_the_row_is_what_it_prints_last(self):
    with self._module("print('x'); print('{\"a\": 1}')"):
      self.assertEqual(harness.run_child("child", ["--b"]), {"a": 1})

  def test_its_one_line_is_passed_on(self):
    code = "import sys; sys.exit('a remark\\nerror: no such ' + sys.argv[1])"
    with self._module(code), self.assertRaises(errors.UserError) as caught:
      harness.run_child("child", ["size"])
    self.assertEqual(
        str(caught.exception), "the process of child ended with 1: no such size"
    )

  @contextlib.contextmanager
  def _module(self, code):
    """A module `child` that fresh processes find."""
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / "child.py").write_text(code)
    with mock.patch.dict(os.environ, PYTHONPATH=str(folder)):
      yield


class CheckCompilesTest(absltest.TestCase):

  def test_without_compilation_nothing_is_measured(self):
    harness.check_compiles()
    with (
        jax.disable_jit(),
        self.assertRaisesRegex(errors.UserError, "JAX_DISABLE_JIT=1 leaves"),
    ):
      harness.check_compiles()


class WriterTest(absltest.TestCase):

  def test_writes_json_where_it_is_asked_to(self):
    path = pathlib.Path(self.create_tempdir().full_path, "bench.json")
    harness.writer(None)({"not": "written"})
    path = path.parent / "a" / "b" / path.name
    harness.writer(str(path))({"a": [1]})
    self.assertEqual(json.loads(path.read_text()), {"a": [1]})

  def test_the_home_folder_is_found(self):
    root = self.create_tempdir().full_path
    with mock.patch.dict(os.environ, HOME=root):
      harness.writer("~/bench [1], 2.json")({})
    self.assertEqual(os.listdir(root), ["bench [1], 2.json"])

  def test_a_place_that_cannot_be_is_told_before_anything_is_measured(
      self,
  ):
    with self.assertRaisesRegex(errors.UserError, "/dev/null is no folder"):
      harness.writer("/dev/null/at/all/bench.json")


class FactsTest(absltest.TestCase):

  def test_devices_are_named_when_asked_for_alone(self):
    self.assertNotIn("devices", harness.machine_facts())
    facts = harness.machine_facts(names_devices=True)
    self.assertIn("cpu", facts["devices"].lower())
    self.assertGreater(facts["cores"], 0)

  def test_a_missing_package_is_named_with_the_flag_that_goes_on(self):
    harness.require(["json"], "--nojson")
    with mock.patch.object(importlib.util, "find_spec", lambda name: None):
      with self.assertRaisesRegex(
          errors.UserError, "torch is not installed: .* or give --notorch"
      ):
        harness.require(["torch"], "--notorch")


if __name__ == "__main__":
  absltest.main()
