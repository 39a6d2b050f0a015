"""Trackers: what their libraries are told, and what they then have on disk."""

import json
import os
import pathlib
import sys
import types
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from scansnap_jax.experiment import errors
from scansnap_jax.experiment.trackers import tracker

_IMAGE = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)


class NamesTest(parameterized.TestCase):

  @parameterized.parameters(
      (["mlflow"], "trackers=mlflow is none of tensorboard, wandb"),
      (["wandb"], r"trackers=wandb needs wandb: pip install .*\[wandb\]"),
      (["tensorboard"], r"needs tensorboardX: pip install .*\[log\]"),
  )
  def test_what_cannot_be_had_is_a_sentence(self, names, words):
    absent = {"tensorboardX": None, "wandb": None}
    with mock.patch.dict(sys.modules, absent):
      with self.assertRaisesRegex(errors.UserError, words):
        tracker.check(names)

  def test_twice_is_too_often(self):
    with mock.patch.dict(sys.modules, {"wandb": types.ModuleType("wandb")}):
      with self.assertRaisesRegex(errors.UserError, "has a name twice"):
        tracker.check(["wandb", "wandb"])


class LibrariesTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)

  def _run(self, name, steps, resume_below=0, stream=""):
    options = (self.workdir, {"lr": 0.5}, resume_below, stream)
    (found,) = tracker.open_all([name], *options)
    for step in steps:
      found.write(step, {"loss": 1.0 / (step + 1), "eval/acc": 0.25})
    found.draw(steps[-1], "maps", _IMAGE)
    found.close()

  def test_tensorboard_is_told_everything(self):
    writer = mock.Mock()
    package = mock.Mock()
    package.SummaryWriter.return_value = writer
    with mock.patch.dict(sys.modules, {"tensorboardX": package}):
      self._run("tensorboard", [3], resume_below=3)
    package.SummaryWriter.assert_called_once_with(
        str(self.workdir / "tensorboard"), purge_step=3
    )
    with mock.patch.dict(sys.modules, {"tensorboardX": package}):
      self._run("tensorboard", [3], stream="fast/part=1")
    self.assertEqual(
        package.SummaryWriter.call_args.args[0],
        str(self.workdir / "tensorboard" / "fast" / "part=1"),
    )
    writer.add_scalar.assert_has_calls(
        [mock.call("loss", 0.25, 3), mock.call("eval/acc", 0.25, 3)]
    )
    writer.add_image.assert_called_with("maps", _IMAGE, 3, dataformats="HW")
    self.assertEqual(writer.close.call_count, 2)

  def test_wandb_is_told_everything_as_one_run(self):
    package = mock.Mock(errors=types.SimpleNamespace(Error=ValueError))
    with mock.patch.dict(sys.modules, {"wandb": package}):
      self._run("wandb", [3])
      self._run("wandb", [4], resume_below=4)
      first, second = (c.kwargs for c in package.init.call_args_list)
      self.assertEqual(first["id"], second["id"])
      self.assertEqual(first["config"], {"lr": 0.5})
      self.assertEqual(
          (first["name"], first["group"]), (self.workdir.name, None)
      )
      # Steps of another stream begin anew, which one run would not take.
      self._run("wandb", [0], stream="fast/part=1")
      self._run("wandb", [1], stream="fast/part=1")
      other, again = (c.kwargs for c in package.init.call_args_list[2:])
      self.assertNotEqual(other["id"], first["id"])
      self.assertEqual(other["id"], again["id"])
      self.assertEqual(other["name"], f"{self.workdir.name}/fast/part=1")
      self.assertEqual(other["group"], self.workdir.name)
      self.assertEqual(first["dir"], str(self.workdir))
      run = package.init.return_value
      run.log.assert_any_call({"loss": 0.25, "eval/acc": 0.25}, step=3)
      np.testing.assert_array_equal(
          package.Image.call_args.args[0][0], [0, 23, 46, 70]
      )
      package.init.side_effect = ValueError("no key\nsecond line")
      with self.assertRaisesRegex(errors.UserError, r"\(no key\): log in"):
        self._run("wandb", [5])

  @pytest.mark.slow
  @pytest.mark.filterwarnings("ignore")
  def test_wandb_itself_offline(self):
    pytest.importorskip("wandb")
    with mock.patch.dict(os.environ, {"WANDB_MODE": "offline"}):
      self._run("wandb", [0, 1, 2])
      self._run("wandb", [3], resume_below=3)
    rows = {row["_step"]: row["loss"] for row in _history(self.workdir)}
    self.assertEqual(rows, {0: 1.0, 1: 0.5, 2: 1 / 3, 3: 0.25})

  @pytest.mark.slow
  @pytest.mark.filterwarnings("ignore")
  def test_tensorboard_itself(self):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    self._run("tensorboard", [0, 1])
    (path,) = (self.workdir / "tensorboard").iterdir()
    found = {}
    for record in _records(path.read_bytes()):
      event = event_pb2.Event.FromString(record)
      for value in event.summary.value:
        if value.WhichOneof("value") == "simple_value":
          found[value.tag, event.step] = value.simple_value
    self.assertEqual(found["loss", 0], 1.0)
    self.assertEqual(found["loss", 1], 0.5)


def _history(workdir):
  """Rows that wandb would send, of all its files."""
  from wandb.proto import wandb_internal_pb2

  for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
    for data in _log_records(path.read_bytes()):
      record = wandb_internal_pb2.Record.FromString(data)
      if record.WhichOneof("record_type") == "history":
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        if "loss" in row:
          yield row


def _log_records(content):
  """Records of a log in blocks of 32 KiB, as LevelDB's, behind 7 bytes."""
  at, parts = 7, b""
  while at + 7 <= len(content):
    left = 2**15 - at % 2**15
    if left < 7:  # No header fits: the block's end is empty.
      at += left
      continue
    size = int.from_bytes(content[at + 4 : at + 6], "little")
    kind = content[at + 6]
    parts += content[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # Whole, or the last piece.
      yield parts
      parts = b""


def _records(content):
  """Records of an event file: length, its checksum, data, their checksum."""
  at = 0
  while at < len(content):
    size = int.from_bytes(content[at : at + 8], "little")
    yield content[at + 12 : at + 12 + size]
    at += 16 + size


if __name__ == "__main__":
  absltest.main()
