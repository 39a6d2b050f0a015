"""Checkpoints for tests: one leaf of every kind, different at every step."""

import functools
import pathlib

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from scansnap_jax.experiment import checkpoint


def file_of(step, item):
  return (step / item / "metadata").read_bytes()


@functools.cache
def tree(step):
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


def metadata(step):
  return {"position": step * 10, "losses": [step / 3, 1e-30], "name": "ä"}


def data(tree):
  """Replaces PRNG keys, which chex cannot compare, by their data."""
  is_key = lambda x: jnp.issubdtype(
      getattr(x, "dtype", None), jax.dtypes.prng_key
  )
  return jax.tree.map(
      lambda x: jax.random.key_data(x) if is_key(x) else x, tree
  )


def save(directory, steps, tree=tree):
  with checkpoint.Checkpointer(directory) as checkpointer:
    for step in steps:
      checkpointer.save(step, tree(step), metadata(step))


def restore(directory, template):
  with checkpoint.Checkpointer(directory) as checkpointer:
    return checkpointer.restore_latest(template)


def files(folder):
  return sorted(p for p in folder.rglob("*") if p.is_file())


def flip(content, position, bit):
  changed = bytearray(content)
  changed[position] ^= 1 << bit
  return bytes(changed)


class TestCase(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(self.create_tempdir().full_path) / "steps"

  def assertRestoredIs(self, restored, step):
    self.assertEqual(restored.step, step)
    self.assertEqual(restored.metadata, metadata(step))
    chex.assert_trees_all_equal(data(restored.tree), data(tree(step)))
