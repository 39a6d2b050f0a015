import json
import math
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment.trackers import tracker


class MetricStreamTestCase(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.create_tempdir().full_path)
    self.path = folder / "new" / "metrics.jsonl"

  def _open(self, resume_below=None, **options):
    return metric_stream.MetricStream(
        self.path, resume_below=resume_below, **options
    )

  def _write(self, steps, resume_below=None):
    with self._open(resume_below) as stream:
      for step in steps:
        stream.write(step, {"loss": step / 3})


class WriteTest(MetricStreamTestCase):

  def test_rows_are_json_lines(self):
    with self._open() as stream:
      stream.write(0, {"loss": 0.1, "count": 3, "done": False})
      stream.write(1, {"loss": 1e-30}, experiment="fast", layer=2)
    self.assertEqual(
        self.path.read_text(),
        '{"step": 0, "loss": 0.1, "count": 3, "done": false}\n'
        '{"step": 1, "experiment": "fast", "layer": 2, "loss": 1e-30}\n',
    )

  def test_row_is_there_before_the_stream_is_closed(self):
    with self._open() as stream:
      stream.write(0, {"loss": 0.1})
      self.assertLen(metric_stream.read_rows(self.path), 1)

  @parameterized.parameters(
      (np.float32(0.5), 0.5),
      (np.int64(3), 3),
      (np.bool_(True), True),
      (np.ones((1, 1)), 1.0),
      (jnp.float32(0.25), 0.25),
      (jnp.bfloat16(1.5), 1.5),
      (jnp.int32(7), 7),
      (math.nan, None),
      (-math.inf, None),
      (np.float32("nan"), None),
      (jnp.bfloat16(jnp.inf), None),
  )
  def test_number_of_any_library_and_null_for_what_json_lacks(self, value, row):
    with self._open() as stream:
      stream.write(np.int64(5), {"value": value})
    # Python alone would read NaN, so that the text itself is compared.
    self.assertEqual(
        self.path.read_text(), f'{{"step": 5, "value": {json.dumps(row)}}}\n'
    )

  @parameterized.parameters(
      ({"loss": np.ones(2)}, "loss is not one number"),
      ({"loss": "0.5"}, "loss is not one number"),
      ({"step": 3}, "names occur twice"),
      ({"layer": 3}, "names occur twice"),
  )
  def test_value_that_makes_no_row_is_refused(self, values, message):
    with self._open() as stream:
      with self.assertRaisesRegex(ValueError, message):
        stream.write(0, values, layer=1)
    self.assertEqual(self.path.read_bytes(), b"")

  def test_a_file_that_was_removed_is_told(self):
    """Rows would go on to a file that nobody finds."""
    with self._open() as stream:
      stream.write(0, {"loss": 0.1})
      self.path.unlink()
      with self.assertRaisesRegex(errors.UserError, "written: it was removed"):
        stream.write(1, {"loss": 0.1})


class ResumeTest(MetricStreamTestCase):

  def _steps(self):
    return [row["step"] for row in metric_stream.read_rows(self.path)]

  @parameterized.parameters(
      (None, []), (0, []), (1, [0]), (3, [0, 1, 2]), (9, [0, 1, 2, 3, 4])
  )
  def test_rows_below_the_resume_point_stay(self, resume_below, expected):
    self._write(range(5))
    self._write([], resume_below)
    self.assertEqual(self._steps(), expected)

  def test_resumed_file_equals_that_of_one_run(self):
    self._write(range(10))
    whole = self.path.read_bytes()
    self._write(range(7))
    self._write(range(4, 10), resume_below=4)
    self.assertEqual(self.path.read_bytes(), whole)

  @parameterized.parameters(
      b'{"step": 2, "lo', b'{"step": 2', b"{", b"\x00\x00", b"\xff", b"2"
  )
  def test_line_cut_short_is_dropped(self, tail):
    self._write(range(2))
    whole = self.path.read_bytes()
    self.path.write_bytes(whole + tail)
    with self.assertNoLogs():
      self.assertEqual(self._steps(), [0, 1])
    self._write([2], resume_below=2)
    self.assertEqual(self._steps(), [0, 1, 2])
    self.assertStartsWith(self.path.read_bytes(), whole)

  def test_whole_last_row_without_newline_stays_whole(self):
    self._write(range(2))
    self.path.write_bytes(self.path.read_bytes()[:-1])
    self._write([2], resume_below=2)
    self.assertEqual(self._steps(), [0, 1, 2])

  @parameterized.parameters(b"[1]", b"[" * 100_000, b'"\xff"')
  def test_other_lines_are_dropped_with_a_warning(self, other):
    self._write(range(2))
    first, second = self.path.read_bytes().splitlines(keepends=True)
    self.path.write_bytes(first + other + b"\n" + second)
    with self.assertLogs(level="WARNING") as logs:
      self.assertEqual(self._steps(), [0, 1])
    self.assertRegex(logs.output[0], "metrics.jsonl: line 2 is no row")

  def test_file_that_does_not_exist_has_no_rows(self):
    self.assertEqual(metric_stream.read_rows(self.path), [])


class TrackersTest(MetricStreamTestCase):

  def test_numbers_go_there_under_their_tags_and_pictures_alone(self):
    told, image = mock.Mock(), np.eye(3, dtype=np.float32)
    with self._open(resume_below=4, trackers=[told]) as stream:
      stream.write(4, {"loss": 0.5, "bad": math.nan}, experiment="fast")
      stream.draw(np.int32(4), "maps", image)
    told.write.assert_called_once_with(4, {"fast/loss": 0.5})
    told.draw.assert_called_once_with(4, "maps", image)
    told.close.assert_called_once_with()
    with self._open() as stream:
      stream.draw(4, "maps", image)  # Nobody asked.

  def test_of_runs_the_means_go_there_and_the_rows_to_the_file(self):
    told = mock.Mock()
    rows = [
        {"seed": 0, "loss": 0.5, "share": math.nan, "bad": math.nan},
        {"seed": 1, "loss": 1.5, "share": 0.25, "bad": math.inf},
    ]
    with self._open(trackers=[told]) as stream:
      stream.write_runs(3, rows, ["seed"])
    told.write.assert_called_once_with(3, {"loss": 1.0, "share": 0.25})
    written = metric_stream.read_rows(self.path)
    self.assertEqual([row["loss"] for row in written], [0.5, 1.5])
    self.assertEqual([row["seed"] for row in written], [0, 1])

  def test_those_that_are_shown_are_told_by_the_name_of_the_stream(self):
    told, opened = mock.Mock(), mock.Mock(return_value=[])
    opened.return_value = [told]
    folder = self.path.parent
    with (
        mock.patch.object(tracker, "check"),
        mock.patch.object(tracker, "open_all", opened),
    ):
      with tracker.shown(["wandb"], folder, {"lr": 0.5}):
        path = folder / "model" / "metrics.jsonl"
        tags = {"experiment": "a/b", "num_last": 5}
        with metric_stream.MetricStream(
            path, resume_below=7, tags=tags
        ) as stream:
          stream.write(7, {"loss": 0.5})
      opened.assert_called_once_with(
          ("wandb",), folder, {"lr": 0.5}, 7, "model/a_b/num_last=5"
      )
      told.write.assert_called_once_with(7, {"loss": 0.5})
      with self._open():  # Nobody asks any more.
        self.assertEqual(opened.call_args.args[0], ())


if __name__ == "__main__":
  absltest.main()
