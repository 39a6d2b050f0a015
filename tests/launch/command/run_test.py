import contextlib
import io
import json
import pathlib
from unittest import mock

from absl.testing import absltest

from launch.command import run
from launch.command import trackers
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment import workdir as workdir_lib
from scansnap_jax.experiment.processes import devices
from scansnap_jax.experiment.processes import preemption
from scansnap_jax.experiment.trackers import tracker


class RunTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    # Devices are chosen before the first computation of a process, and tests
    # of other files may have computed in this one.
    self.enterContext(mock.patch.object(devices, "set_up", return_value=None))
    self.path = pathlib.Path(self.create_tempdir().full_path) / "new"
    # The environment of whoever runs the tests is no part of them.
    self.chosen = {}
    self.enterContext(
        mock.patch.object(devices, "number_settings", lambda: self.chosen)
    )
    self.folder = lambda: run.Folder(str(self.path), {"a": 1}, "--a=1\n")
    self.reported = []

  def start(self, measure, **kwargs):
    """Runs; returns what stdout and stderr say."""
    self.out, self.complaints = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(self.out),
        contextlib.redirect_stderr(self.complaints),
    ):
      run.run(
          "script",
          kwargs.pop("folder", self.folder),
          measure=measure,
          report=self.report,
          **kwargs,
      )
    return self.out.getvalue(), self.complaints.getvalue()

  def report(self, this, measured):
    self.reported.append((this, measured))
    return this.workdir and this.workdir / "report.html"

  def test_measures_in_a_claimed_and_locked_folder_then_reports(self):
    def measure(this):
      self.assertEqual(this.folder, self.path)
      self.assertEqual(
          json.loads((self.path / "config.json").read_text()), {"a": 1}
      )
      self.assertEqual((self.path / "flags.txt").read_text(), "--a=1\n")
      with self.assertRaisesRegex(errors.UserError, "another run is at work"):
        with workdir_lib.lock(self.path):
          pass
      return 3

    out, _ = self.start(measure)
    ((this, measured),) = self.reported
    self.assertEqual(measured, 3)
    self.assertStartsWith(this.facts["command"], "python -m launch.script")
    self.assertRegex(this.facts["devices"], r"\d+ x .+")
    self.assertRegex(out, rf"^\d+\.\d s\. Report: {self.path}/report.html\n$")
    with workdir_lib.lock(self.path):  # The run has let go of it.
      pass

  def test_what_a_run_measures_is_shown_with_its_settings(self):
    names = mock.patch.object(trackers, "names", lambda: ["tensorboard"])
    library = mock.patch.object(tracker, "library")
    opened = mock.patch.object(tracker, "open_all", return_value=[])
    with names, library, opened as told:

      def measure(this):
        path = this.folder / "metrics.jsonl"
        metric_stream.MetricStream(path, resume_below=None).close()

      self.start(measure)
    told.assert_called_once_with(("tensorboard",), self.path, {"a": 1}, 0, "")

  def test_a_tracker_that_there_is_not_claims_no_folder(self):
    with mock.patch.object(trackers, "names", lambda: ["mlflow"]):
      with self.assertRaisesRegex(errors.UserError, "trackers=mlflow is none"):
        self.start(lambda this: None)
    self.assertFalse(self.path.exists())

  def test_a_stop_is_told_and_reports_nothing(self):
    def measure(_):
      raise preemption.Stopped("training, step 7")

    with self.assertRaises(SystemExit) as exits:
      self.start(measure)
    self.assertEqual(exits.exception.code, 143)
    self.assertEqual(self.out.getvalue(), "")
    self.assertEqual(
        self.complaints.getvalue(),
        "Stopped in training, step 7. The same command continues.\n",
    )
    self.assertEmpty(self.reported)

  def test_other_settings_are_refused_before_anything_is_measured(self):
    self.start(lambda this: None)
    other = run.Folder(str(self.path), {"a": 2}, "")
    with self.assertRaisesRegex(errors.UserError, "a: 1 there, 2 here"):
      self.start(self.fail, folder=lambda: other)

  def test_other_number_settings_are_refused_by_their_name(self):
    name = "JAX_DEFAULT_MATMUL_PRECISION"
    self.chosen = {name: "highest"}
    self.start(lambda this: None)
    self.start(lambda this: None)
    self.chosen = {}
    message = (
        f'environment.{name}: "highest" there, absent here. Give another'
        " --workdir, or the settings there to resume it"
    )
    with self.assertRaisesRegex(errors.UserError, message):
      self.start(self.fail)

  def test_what_the_check_refuses_leaves_no_folder(self):
    def check():
      raise errors.UserError("wrong")

    with self.assertRaisesRegex(errors.UserError, "wrong"):
      self.start(self.fail, check=check)
    self.assertFalse(self.path.exists())

  def test_without_a_folder_nothing_is_written(self):
    out, _ = self.start(lambda this: this.workdir, folder=None)
    self.assertRegex(out, r"^\d+\.\d s\.\n$")
    ((this, measured),) = self.reported
    self.assertIsNone(measured)
    with self.assertRaisesRegex(ValueError, "writes no file"):
      _ = this.folder


if __name__ == "__main__":
  absltest.main()
