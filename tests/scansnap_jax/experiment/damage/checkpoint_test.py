import functools
import gc
import json
import logging
import shutil
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from scansnap_jax.experiment import checkpoint
from tests.scansnap_jax.experiment import checkpoints


def setUpModule():
  # What was imported need not be looked through after every damaged step.
  gc.freeze()


def tearDownModule():
  gc.unfreeze()


class DamageTest(checkpoints.TestCase):
  """Whatever happens to the newest step, no wrong value is restored."""

  def setUp(self):
    super().setUp()
    self.good = self.directory.with_name("good")
    checkpoints.save(self.good, [1, 2])

  def _restore_damaged(self, file, damage):
    """Restores a copy in which `damage` maps the bytes of one file."""
    shutil.rmtree(self.directory, ignore_errors=True)
    shutil.copytree(self.good, self.directory)
    target = self.directory / file.relative_to(self.good)
    content = damage(target.read_bytes())
    target.unlink()
    if content is not None:
      target.write_bytes(content)
    return checkpoints.restore(self.directory, checkpoints.tree(0))

  def assertNewestOrPrevious(self, restored):
    self.assertIsNotNone(restored)
    self.assertIn(restored.step, (1, 2))
    self.assertRestoredIs(restored, restored.step)
    self.assertEqual((self.directory / "2").exists(), restored.step == 2)

  @parameterized.product(where=("first", "middle", "last", "any", "any other"))
  @pytest.mark.by_default(1)
  def test_flipped_bit_in_any_file(self, where):
    generator = np.random.default_rng(len(where))
    for file in checkpoints.files(self.good / "2"):
      size = file.stat().st_size
      anywhere = int(generator.integers(size))
      known = {"first": 0, "middle": size // 2, "last": size - 1}
      flip = functools.partial(
          checkpoints.flip,
          position=known.get(where, anywhere),
          bit=int(generator.integers(8)),
      )
      self.assertNewestOrPrevious(self._restore_damaged(file, flip))

  def test_changed_metadata_is_noticed(self):
    # Still JSON, and of the right form.
    file = self.good / "2" / "digest" / "metadata"
    self.assertIn(b'"position": 20', file.read_bytes())
    change = lambda content: content.replace(b": 20", b": 30")
    self.assertRestoredIs(self._restore_damaged(file, change), 1)

  @parameterized.named_parameters(
      ("deleted", lambda content: None),
      ("empty", lambda content: b""),
      ("cut_in_half", lambda content: content[: len(content) // 2]),
      ("zeroed", lambda content: bytes(len(content))),
  )
  @pytest.mark.by_default("zeroed")
  def test_damaged_file(self, damage):
    for file in checkpoints.files(self.good / "2"):
      self.assertNewestOrPrevious(self._restore_damaged(file, damage))

  @parameterized.parameters("copied", "linked")
  def test_a_step_under_the_name_of_another_is_set_aside(self, how):
    shutil.copytree(self.good, self.directory)
    shutil.rmtree(self.directory / "2")
    if how == "copied":
      shutil.copytree(self.directory / "1", self.directory / "2")
    else:
      (self.directory / "2").symlink_to("1", target_is_directory=True)
    # And one behind the last step.
    shutil.copytree(self.directory / "1", self.directory / "9")
    with self.assertLogs(level="WARNING") as logs:
      self.assertRestoredIs(
          checkpoints.restore(self.directory, checkpoints.tree(0)), 1
      )
    self.assertLen(logs.output, 2)
    self.assertIn("step 9 in", logs.output[0])
    self.assertIn("it holds step 1", logs.output[0])

  def test_a_step_of_before_its_number_was_inside_is_restored(self):
    write = json.dumps

    def without_step(value, **options):
      is_body = isinstance(value, dict) and "leaves" in value
      if is_body:
        value.pop("step", None)
      return write(value, **options)

    with mock.patch.object(checkpoint.json, "dumps", without_step):
      checkpoints.save(self.directory, [3])
    self.assertNotIn(
        b'"step"', checkpoints.file_of(self.directory / "3", "digest")
    )
    self.assertRestoredIs(
        checkpoints.restore(self.directory, checkpoints.tree(0)), 3
    )

  def test_flipped_bits_in_array_data_are_noticed(self):
    # Orbax restores these without a word. The largest file holds `host/0`.
    file = max(
        checkpoints.files(self.good / "2"), key=lambda f: f.stat().st_size
    )
    data = checkpoints.tree(2)["host"][0].tobytes()
    start = file.read_bytes().index(data)
    for offset in (0, len(data) // 2, len(data) - 1):
      flip = functools.partial(checkpoints.flip, position=start + offset, bit=0)
      self.assertRestoredIs(self._restore_damaged(file, flip), 1)

  def test_damage_is_one_line_and_the_step_is_kept_aside(self):
    file = max(
        checkpoints.files(self.good / "2"), key=lambda f: f.stat().st_size
    )
    with self.assertLogs(level="DEBUG") as logs:
      self._restore_damaged(file, lambda content: None)
    # Orbax may tell, below what scripts print, that it waited for its threads.
    (record,) = (
        record
        for record in logs.records
        if record.levelno > logging.INFO or "orbax" not in record.pathname
    )
    self.assertEqual(record.levelno, logging.WARNING)
    self.assertRegex(
        record.getMessage(),
        r"DAMAGED CHECKPOINT: step 2 .* now called 2\.corrupt",
    )
    self.assertNotEmpty(checkpoints.files(self.directory / "2.corrupt"))

  def test_step_damaged_twice_gets_another_name(self):
    for _ in range(3):
      checkpoints.save(self.directory, [1, 2])
      for step in ("1", "2"):
        (self.directory / step / "digest" / "metadata").write_bytes(b"{}")
      self.assertIsNone(
          checkpoints.restore(self.directory, checkpoints.tree(0))
      )
    names = sorted(path.name for path in self.directory.iterdir())
    ending = ("corrupt", "corrupt2", "corrupt3")
    self.assertEqual(names, [f"{n}.{e}" for n in (1, 2) for e in ending])

  def test_training_goes_on_after_damage(self):
    with checkpoint.Checkpointer(self.good) as checkpointer:
      (self.good / "2" / "digest" / "metadata").unlink()
      self.assertRestoredIs(checkpointer.restore_latest(checkpoints.tree(0)), 1)
      self.assertTrue(
          checkpointer.save(2, checkpoints.tree(2), checkpoints.metadata(2))
      )
      self.assertRestoredIs(checkpointer.restore_latest(checkpoints.tree(0)), 2)


if __name__ == "__main__":
  absltest.main()
