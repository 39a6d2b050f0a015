import contextlib
import logging
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scansnap_jax.experiment import checkpoint
from scansnap_jax.experiment import errors
from scansnap_jax.experiment.saved import noise
from tests.scansnap_jax.experiment import checkpoints


class RoundTripTest(checkpoints.TestCase):

  def test_every_kind_of_leaf_comes_back_equal_and_of_its_kind(self):
    checkpoints.save(self.directory, [1, 2])
    restored = checkpoints.restore(self.directory, checkpoints.tree(0))
    self.assertEqual(restored.step, 2)
    self.assertEqual(restored.metadata, checkpoints.metadata(2))
    found, expected = restored.tree, checkpoints.tree(2)
    self.assertEqual(jax.tree.structure(found), jax.tree.structure(expected))
    leaves = jax.tree.leaves(found), jax.tree.leaves(expected)
    for a, b in zip(*leaves, strict=True):
      self.assertIs(type(a), type(b))
      self.assertEqual(getattr(a, "shape", ()), getattr(b, "shape", ()))
      if isinstance(b, np.ndarray):
        b = b.astype(b.dtype.newbyteorder("="))  # Byte order becomes native.
      if hasattr(b, "dtype"):
        self.assertEqual(a.dtype, b.dtype)
      chex.assert_trees_all_equal(checkpoints.data(a), checkpoints.data(b))

  def test_shapes_alone_restore_numpy_arrays(self):
    checkpoints.save(
        self.directory, [1], lambda step: {"w": jnp.full((3,), step)}
    )
    template = {"w": jax.ShapeDtypeStruct((3,), jnp.int32)}
    w = checkpoints.restore(self.directory, template).tree["w"]
    self.assertIs(type(w), np.ndarray)
    w += 1  # Restored arrays may be written to.
    chex.assert_trees_all_equal(w, np.full((3,), 2, np.int32))

  def test_shapes_with_sharding_restore_jax_arrays(self):
    checkpoints.save(
        self.directory, [1], lambda step: {"w": np.full((3,), step, "f")}
    )
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = {
        "w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding),
    }
    w = checkpoints.restore(self.directory, template).tree["w"]
    self.assertIsInstance(w, jax.Array)
    chex.assert_trees_all_equal(w, jnp.full((3,), 1.0))

  @parameterized.parameters(({},), ({"w": np.zeros((0,))},))
  def test_tree_without_elements(self, tree):
    checkpoints.save(self.directory, [1], lambda step: tree)
    chex.assert_trees_all_equal(
        checkpoints.restore(self.directory, tree).tree, tree
    )

  def test_arrays_may_change_as_soon_as_save_returns(self):
    w = np.ones((1000, 1000))
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      checkpointer.save(1, {"w": w})
      w[:] = 2.0
    restored = checkpoints.restore(self.directory, {"w": w})
    chex.assert_trees_all_equal(restored.tree["w"], np.ones((1000, 1000)))

  def test_empty_directory_restores_nothing(self):
    self.assertIsNone(checkpoints.restore(self.directory, checkpoints.tree(0)))

  def test_newest_steps_are_kept(self):
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      for step in (3, 9, 10, 20):
        self.assertTrue(checkpointer.save(step, {"w": np.ones(3)}))
      checkpointer.wait()
      self.assertEqual(checkpointer.all_steps(), [10, 20])

  def test_step_that_is_there_is_not_written_again(self):
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      self.assertTrue(checkpointer.save(1, {"w": np.ones(3)}))
      self.assertFalse(checkpointer.save(1, {"w": np.zeros(3)}))
      restored = checkpointer.restore_latest({"w": np.zeros(3)})
    chex.assert_trees_all_equal(restored.tree["w"], np.ones(3))

  def test_relative_directory(self):
    with contextlib.chdir(self.create_tempdir().full_path):
      checkpoints.save("steps", [1])
      self.assertRestoredIs(
          checkpoints.restore("steps", checkpoints.tree(0)), 1
      )

  @parameterized.parameters(
      ("text",), (np.array(["text"]),), (np.array([None]),)
  )
  def test_leaf_that_is_no_array_of_numbers_is_named(self, leaf):
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      with self.assertRaisesRegex(TypeError, r"\['w'\] is no array of numbers"):
        checkpointer.save(1, {"w": leaf})


class OtherTreeTest(checkpoints.TestCase):

  @parameterized.parameters(
      (
          {"w": np.zeros((4,), "f")},
          r"\['w'\] is float32\[3\] there, float32\[4\]",
      ),
      (
          {"w": np.zeros((3, 1), "f")},
          r"float32\[3\] there, float32\[3, 1\] here",
      ),
      ({"w": np.zeros((3,))}, r"float32\[3\] there, float64\[3\] here"),
      ({"w": np.zeros((0,), "f")}, r"float32\[3\] there, float32\[0\] here"),
      (
          {"v": np.zeros((3,), "f")},
          r"\['w'\] is float32\[3\] there, absent here",
      ),
      ({}, r"\['w'\] is float32\[3\] there, absent here"),
  )
  def test_other_shape_is_the_users_error_and_no_damage(
      self, template, message
  ):
    checkpoints.save(
        self.directory, [1], lambda step: {"w": np.ones((3,), "f")}
    )
    with self.assertRaisesRegex(errors.UserError, message):
      checkpoints.restore(self.directory, template)
    self.assertTrue((self.directory / "1").exists())

  def test_key_of_another_generator(self):
    checkpoints.save(self.directory, [1], lambda step: jax.random.key(1))
    with self.assertRaisesRegex(
        errors.UserError, r"the root is key<fry>\[\] there, key<rbg>\[\] here"
    ):
      checkpoints.restore(self.directory, jax.random.key(1, impl="rbg"))


_KILLED = """
import os, pathlib, signal, sys, time
import jax, numpy as np
from scansnap_jax.experiment import checkpoint

mesh = jax.sharding.Mesh(jax.devices(), "x")
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
w = jax.device_put(np.arange(8 * 2**20, dtype=np.float32), sharding)
assert len(w.addressable_shards) == 4
checkpointer = checkpoint.Checkpointer(sys.argv[1])
checkpointer.save(1, {"w": w})
checkpointer.wait()
checkpointer.save(2, {"w": w + 1})
# Its folder may be made in the background.
unfinished = pathlib.Path(sys.argv[1], "2.orbax-checkpoint-tmp")
deadline = time.monotonic() + 10
while not unfinished.exists() and time.monotonic() < deadline:
  time.sleep(1e-4)
os.kill(os.getpid(), signal.SIGKILL)
"""


class FaultTest(checkpoints.TestCase):

  @pytest.mark.slow
  def test_kill_while_saving_leaves_the_step_before_on_other_devices_too(self):
    root = pathlib.Path(checkpoint.__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "-c", _KILLED, str(self.directory)],
        cwd=root,
        capture_output=True,
        text=True,
        env={
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_PLATFORMS": "cpu",
        },
    )  # pyformat: disable
    self.assertEqual(process.returncode, -signal.SIGKILL, process.stderr)
    names = [path.name for path in self.directory.iterdir()]
    # Otherwise the kill came too late to test anything.
    self.assertIn("2.orbax-checkpoint-tmp", names)
    expected = np.arange(8 * 2**20, dtype=np.float32)
    restored = checkpoints.restore(
        self.directory, {"w": jnp.zeros_like(expected)}
    )
    self.assertEqual(restored.step, 1)
    chex.assert_trees_all_equal(restored.tree["w"], expected)
    kept = {path.name for path in self.directory.iterdir()}
    self.assertEqual(kept, {"1", "resumes.jsonl"})

  @pytest.mark.slow
  @pytest.mark.timeout(1800)
  def test_200_flips_and_cuts_are_found_or_harmless(self):
    """Of any file of the newest step; the one before is whole."""
    intact = self.create_tempdir().full_path
    shutil.rmtree(intact)
    rng = np.random.default_rng(3)
    trees = {
        step: {
            "w": rng.standard_normal((40, 50)).astype(np.float32),
            "b": jnp.asarray(rng.standard_normal(300), jnp.bfloat16),
            "key": jax.random.key(step),
            "count": np.int32(step),
        }
        for step in (1, 2)
    }
    with checkpoint.Checkpointer(pathlib.Path(intact)) as checkpointer:
      for step, tree in trees.items():
        checkpointer.save(step, tree)
      checkpointer.wait()
    files = sorted(p for p in pathlib.Path(intact, "2").rglob("*"))
    names = [str(p.relative_to(intact)) for p in files if p.is_file()]
    self.assertGreater(len(names), 5)
    sizes = np.array([pathlib.Path(intact, x).stat().st_size for x in names])
    restored = []
    for count in range(200):
      directory = self.directory.with_name(f"damaged{count}")
      shutil.copytree(intact, directory)
      # Files are cut alike, whatever they hold; of bits each is as likely, for
      # data files have names that are new each time, and so has their order.
      shares = sizes / sizes.sum() if count % 2 else None
      name = str(rng.choice(names, p=shares))
      file = directory / name
      data = bytearray(file.read_bytes())
      where = int(rng.integers(max(len(data), 1)))
      if count % 2 and data:
        data[where] ^= 1 << int(rng.integers(8))
      file.write_bytes(data if count % 2 else data[:where])
      found = checkpoints.restore(directory, trees[1])
      self.assertIsNotNone(found, name)
      restored.append(found.step)
      chex.assert_trees_all_equal(found.tree, trees[found.step])
      shutil.rmtree(directory)
    # Of the arrays' files every damage is found, of others some are harmless.
    self.assertBetween(restored.count(1), 60, 199)
    print(f"of 200 damages {restored.count(1)} cost a step")

  def test_what_a_failed_write_left_says_nothing_at_the_exit(self):
    fails = """
import gc, sys
from scansnap_jax.experiment.saved import noise
noise.OrbaxNoise().keep_dropping()
class PlainHandler:
  async def write(self): pass
async def other(): pass
PlainHandler().write()
gc.collect()
kept = other()
other()
sys.stderr.write("leaves\\n")
"""
    ended = subprocess.run(
        [sys.executable, "-c", fails], capture_output=True, text=True
    )
    first, last = ended.stderr.split("leaves\n")
    self.assertIn("coroutine 'other' was never awaited", first)
    self.assertNotIn("PlainHandler", first)
    self.assertEqual(last, "")  # Of `kept` the interpreter would tell.

  def test_failed_write_is_the_users_error_and_leaves_the_step_before(self):
    checkpoints.save(self.directory, [1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer = checkpoint.Checkpointer(self.directory)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
      with self.assertRaisesRegex(
          errors.UserError, "cannot write a checkpoint to .*: File too large$"
      ):
        checkpointer.save(2, {"w": np.ones(2**20)})
        checkpointer.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    self.assertRestoredIs(checkpointer.restore_latest(checkpoints.tree(0)), 1)
    checkpointer.close()

  def test_orbax_logs_no_page_of_what_it_raises_too(self):
    filtered = noise.OrbaxNoise()
    for level, path, is_shown in (
        (logging.ERROR, "/x/orbax/checkpoint/future.py", False),
        (logging.WARNING, "/x/orbax/checkpoint/future.py", True),
        (logging.INFO, "/x/orbax/checkpoint/future.py", False),
        (logging.ERROR, "/x/ours.py", True),
    ):
      record = logging.LogRecord("absl", level, path, 1, "text", (), None)
      self.assertEqual(filtered.filter(record), is_shown)

  def test_after_a_failure_its_threads_stay_silent(self):
    logger = logging.getLogger("absl")
    before = list(logger.filters)
    checkpointer = checkpoint.Checkpointer(self.directory)
    shutil.rmtree(self.directory)
    with self.assertRaises(errors.UserError):
      checkpointer.save(1, checkpoints.tree(1))
    checkpointer.close()
    late = logging.LogRecord(
        "absl", logging.ERROR, "/x/orbax/future.py", 1, "text", (), None
    )
    self.assertFalse(logger.filter(late))
    logger.filters = before
    checkpoint.Checkpointer(self.create_tempdir().full_path).close()
    self.assertEqual(logger.filters, before)

  def test_directory_that_was_removed_is_not_made_anew(self):
    checkpointer = checkpoint.Checkpointer(self.directory)
    shutil.rmtree(self.directory)
    with self.assertRaisesRegex(errors.UserError, "the folder is gone$"):
      checkpointer.save(1, checkpoints.tree(1))
    checkpointer.close()
    self.assertFalse(self.directory.exists())

  @parameterized.parameters("", "/steps")
  def test_directory_that_cannot_be_made_is_the_users_error(self, below):
    file = self.create_tempfile().full_path
    filters = list(logging.getLogger("absl").filters)
    with self.assertNoLogs(), self.assertRaises(errors.UserError):
      checkpoint.Checkpointer(file + below)
    self.assertEqual(logging.getLogger("absl").filters, filters)


if __name__ == "__main__":
  absltest.main()
