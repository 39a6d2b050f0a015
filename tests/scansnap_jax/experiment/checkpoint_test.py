import contextlib
import functools
import gc
import json
import logging
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from scansnap_jax.experiment import checkpoint
from scansnap_jax.experiment import errors


def _file_of(step, item):
  return (step / item / "metadata").read_bytes()


def setUpModule():
  # What was imported need not be looked through after every damaged step.
  gc.freeze()


def tearDownModule():
  gc.unfreeze()


@functools.cache
def _tree(step):
  """One leaf of every kind, different at every step."""
  return {
      "params": {
          "w": jnp.full((2, 3), step + 0.1),
          "bf16": jnp.full((3,), step, jnp.bfloat16),
          "scalar": jnp.float32(step),
          "empty": jnp.zeros((0, 4)),
      },
      "host": [
          # Larger than the 1 KiB below which orbax stores arrays inline.
          np.random.default_rng(step).normal(size=(50, 7)),
          np.asfortranarray(np.arange(6).reshape(2, 3) + step),
          np.arange(20, dtype=np.int8)[::2] + np.int8(step),
          np.array([step > 1, False]),
          np.full((2,), step + 1j, np.complex64),
          (np.arange(3) + step).astype(">f4"),
          np.array(step),
          np.zeros((0,), np.uint32),
      ],
      "keys": (
          jax.random.key(step),
          jax.random.split(jax.random.key(step, impl="rbg"), 3),
          jax.random.PRNGKey(step),
      ),
      "numbers": {"int": step, "float": step / 3, "bool": step > 1},
      "generic": np.float32(step),
      "none": None,
  }


def _metadata(step):
  return {"position": step * 10, "losses": [step / 3, 1e-30], "name": "ä"}


def _data(tree):
  """Replaces PRNG keys, which chex cannot compare, by their data."""
  is_key = lambda x: jnp.issubdtype(
      getattr(x, "dtype", None), jax.dtypes.prng_key
  )
  return jax.tree.map(
      lambda x: jax.random.key_data(x) if is_key(x) else x, tree
  )


def _save(directory, steps, tree=_tree):
  with checkpoint.Checkpointer(directory) as checkpointer:
    for step in steps:
      checkpointer.save(step, tree(step), _metadata(step))


def _restore(directory, template):
  with checkpoint.Checkpointer(directory) as checkpointer:
    return checkpointer.restore_latest(template)


def _files(folder):
  return sorted(p for p in folder.rglob("*") if p.is_file())


def _flip(content, position, bit):
  changed = bytearray(content)
  changed[position] ^= 1 << bit
  return bytes(changed)


class CheckpointerTestCase(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(self.create_tempdir().full_path) / "steps"

  def assertRestoredIs(self, restored, step):
    self.assertEqual(restored.step, step)
    self.assertEqual(restored.metadata, _metadata(step))
    chex.assert_trees_all_equal(_data(restored.tree), _data(_tree(step)))


class RoundTripTest(CheckpointerTestCase):

  def test_every_kind_of_leaf_comes_back_equal_and_of_its_kind(self):
    _save(self.directory, [1, 2])
    restored = _restore(self.directory, _tree(0))
    self.assertEqual(restored.step, 2)
    self.assertEqual(restored.metadata, _metadata(2))
    found, expected = restored.tree, _tree(2)
    self.assertEqual(jax.tree.structure(found), jax.tree.structure(expected))
    leaves = jax.tree.leaves(found), jax.tree.leaves(expected)
    for a, b in zip(*leaves, strict=True):
      self.assertIs(type(a), type(b))
      self.assertEqual(getattr(a, "shape", ()), getattr(b, "shape", ()))
      if isinstance(b, np.ndarray):
        b = b.astype(b.dtype.newbyteorder("="))  # Byte order becomes native.
      if hasattr(b, "dtype"):
        self.assertEqual(a.dtype, b.dtype)
      chex.assert_trees_all_equal(_data(a), _data(b))

  def test_shapes_alone_restore_numpy_arrays(self):
    _save(self.directory, [1], lambda step: {"w": jnp.full((3,), step)})
    template = {"w": jax.ShapeDtypeStruct((3,), jnp.int32)}
    w = _restore(self.directory, template).tree["w"]
    self.assertIs(type(w), np.ndarray)
    w += 1  # Restored arrays may be written to.
    chex.assert_trees_all_equal(w, np.full((3,), 2, np.int32))

  def test_shapes_with_sharding_restore_jax_arrays(self):
    _save(self.directory, [1], lambda step: {"w": np.full((3,), step, "f")})
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = {
        "w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding),
    }
    w = _restore(self.directory, template).tree["w"]
    self.assertIsInstance(w, jax.Array)
    chex.assert_trees_all_equal(w, jnp.full((3,), 1.0))

  @parameterized.parameters(({},), ({"w": np.zeros((0,))},))
  def test_tree_without_elements(self, tree):
    _save(self.directory, [1], lambda step: tree)
    chex.assert_trees_all_equal(_restore(self.directory, tree).tree, tree)

  def test_arrays_may_change_as_soon_as_save_returns(self):
    w = np.ones((1000, 1000))
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      checkpointer.save(1, {"w": w})
      w[:] = 2.0
    restored = _restore(self.directory, {"w": w})
    chex.assert_trees_all_equal(restored.tree["w"], np.ones((1000, 1000)))

  def test_empty_directory_restores_nothing(self):
    self.assertIsNone(_restore(self.directory, _tree(0)))

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
      _save("steps", [1])
      self.assertRestoredIs(_restore("steps", _tree(0)), 1)

  @parameterized.parameters(
      ("text",), (np.array(["text"]),), (np.array([None]),)
  )
  def test_leaf_that_is_no_array_of_numbers_is_named(self, leaf):
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      with self.assertRaisesRegex(TypeError, r"\['w'\] is no array of numbers"):
        checkpointer.save(1, {"w": leaf})


class DamageTest(CheckpointerTestCase):
  """Whatever happens to the newest step, no wrong value is restored."""

  def setUp(self):
    super().setUp()
    self.good = self.directory.with_name("good")
    _save(self.good, [1, 2])

  def _restore_damaged(self, file, damage):
    """Restores a copy in which `damage` maps the bytes of one file."""
    shutil.rmtree(self.directory, ignore_errors=True)
    shutil.copytree(self.good, self.directory)
    target = self.directory / file.relative_to(self.good)
    content = damage(target.read_bytes())
    target.unlink()
    if content is not None:
      target.write_bytes(content)
    return _restore(self.directory, _tree(0))

  def assertNewestOrPrevious(self, restored):
    self.assertIsNotNone(restored)
    self.assertIn(restored.step, (1, 2))
    self.assertRestoredIs(restored, restored.step)
    self.assertEqual((self.directory / "2").exists(), restored.step == 2)

  @parameterized.product(where=("first", "middle", "last", "any", "any other"))
  def test_flipped_bit_in_any_file(self, where):
    generator = np.random.default_rng(len(where))
    for file in _files(self.good / "2"):
      size = file.stat().st_size
      anywhere = int(generator.integers(size))
      known = {"first": 0, "middle": size // 2, "last": size - 1}
      flip = functools.partial(
          _flip,
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
  def test_damaged_file(self, damage):
    for file in _files(self.good / "2"):
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
      self.assertRestoredIs(_restore(self.directory, _tree(0)), 1)
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
      _save(self.directory, [3])
    self.assertNotIn(b'"step"', _file_of(self.directory / "3", "digest"))
    self.assertRestoredIs(_restore(self.directory, _tree(0)), 3)

  def test_flipped_bits_in_array_data_are_noticed(self):
    # Orbax restores these without a word. The largest file holds `host/0`.
    file = max(_files(self.good / "2"), key=lambda f: f.stat().st_size)
    data = _tree(2)["host"][0].tobytes()
    start = file.read_bytes().index(data)
    for offset in (0, len(data) // 2, len(data) - 1):
      flip = functools.partial(_flip, position=start + offset, bit=0)
      self.assertRestoredIs(self._restore_damaged(file, flip), 1)

  def test_damage_is_one_line_and_the_step_is_kept_aside(self):
    file = max(_files(self.good / "2"), key=lambda f: f.stat().st_size)
    with self.assertLogs(level="DEBUG") as logs:
      self._restore_damaged(file, lambda content: None)
    self.assertLen(logs.records, 1)
    self.assertEqual(logs.records[0].levelno, logging.WARNING)
    self.assertRegex(
        logs.output[0], r"DAMAGED CHECKPOINT: step 2 .* now called 2\.corrupt"
    )
    self.assertNotEmpty(_files(self.directory / "2.corrupt"))

  def test_step_damaged_twice_gets_another_name(self):
    for _ in range(3):
      _save(self.directory, [1, 2])
      for step in ("1", "2"):
        (self.directory / step / "digest" / "metadata").write_bytes(b"{}")
      self.assertIsNone(_restore(self.directory, _tree(0)))
    names = sorted(path.name for path in self.directory.iterdir())
    ending = ("corrupt", "corrupt2", "corrupt3")
    self.assertEqual(names, [f"{n}.{e}" for n in (1, 2) for e in ending])

  def test_training_goes_on_after_damage(self):
    with checkpoint.Checkpointer(self.good) as checkpointer:
      (self.good / "2" / "digest" / "metadata").unlink()
      self.assertRestoredIs(checkpointer.restore_latest(_tree(0)), 1)
      self.assertTrue(checkpointer.save(2, _tree(2), _metadata(2)))
      self.assertRestoredIs(checkpointer.restore_latest(_tree(0)), 2)


class OtherTreeTest(CheckpointerTestCase):

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
    _save(self.directory, [1], lambda step: {"w": np.ones((3,), "f")})
    with self.assertRaisesRegex(errors.UserError, message):
      _restore(self.directory, template)
    self.assertTrue((self.directory / "1").exists())

  def test_key_of_another_generator(self):
    _save(self.directory, [1], lambda step: jax.random.key(1))
    with self.assertRaisesRegex(
        errors.UserError, r"the root is key<fry>\[\] there, key<rbg>\[\] here"
    ):
      _restore(self.directory, jax.random.key(1, impl="rbg"))


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


class FaultTest(CheckpointerTestCase):

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
    restored = _restore(self.directory, {"w": jnp.zeros_like(expected)})
    self.assertEqual(restored.step, 1)
    chex.assert_trees_all_equal(restored.tree["w"], expected)
    self.assertEqual([p.name for p in self.directory.iterdir()], ["1"])

  def test_failed_write_is_the_users_error_and_leaves_the_step_before(self):
    _save(self.directory, [1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer = checkpoint.Checkpointer(self.directory)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
      with self.assertRaisesRegex(
          errors.UserError, "cannot write a checkpoint"
      ):
        checkpointer.save(2, {"w": np.ones(2**20)})
        checkpointer.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    self.assertRestoredIs(checkpointer.restore_latest(_tree(0)), 1)
    checkpointer.close()

  def test_directory_that_cannot_be_made_is_the_users_error(self):
    file = self.create_tempfile().full_path
    filters = list(logging.getLogger("absl").filters)
    with self.assertRaises(errors.UserError):
      checkpoint.Checkpointer(f"{file}/steps")
    self.assertEqual(logging.getLogger("absl").filters, filters)


if __name__ == "__main__":
  absltest.main()
