import functools
import os
import pathlib
import subprocess
import sys
import textwrap

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scansnap_jax import ensemble

_ROOT = pathlib.Path(__file__).parents[2]


def _power_iteration(member, shared, *, num_steps):
  """Enough arithmetic to show a change of order: a chain of matrix products."""
  vector = jax.random.normal(jax.random.key(member["seed"]), shared.shape[:1])

  def step(vector, _):
    vector = jnp.tanh(shared @ vector) * member["scale"]
    return vector, vector.sum()

  return jax.lax.scan(step, vector, None, num_steps)


def _members(num_members):
  return {
      "seed": np.arange(num_members, dtype=np.int32),
      "scale": np.linspace(0.5, 2, num_members, dtype=np.float32),
  }


class EnsembleTest(parameterized.TestCase):

  def test_one_number_that_is_not_finite_makes_its_member_so(self):
    layout = ensemble.make_ensemble(3)
    weights = np.ones((3, 2))
    weights[1, 0] = np.nan
    found = layout.is_finite({"w": weights, "b": np.array([1, 1, np.inf])})
    np.testing.assert_array_equal(found, [True, False, False])

  @parameterized.product(num_members=(1, 3, 7), group_size=(1, 2, 7))
  @pytest.mark.by_default(0, 2)
  def test_equals_one_call_a_member(self, num_members, group_size):
    matrix = np.random.default_rng(0).normal(size=(8, 8)) / 8
    matrix = matrix.astype(np.float32)
    layout = ensemble.make_ensemble(num_members, group_size=group_size)
    members = _members(num_members)
    mapped = layout.map(_power_iteration, num_steps=5)
    result = layout.gather(mapped(layout.scatter(members), matrix))
    for r in range(num_members):
      member = jax.tree.map(lambda leaf, r=r: jnp.asarray(leaf[r]), members)
      expected = _power_iteration(member, jnp.asarray(matrix), num_steps=5)
      chex.assert_trees_all_close(
          jax.tree.map(lambda leaf, r=r: leaf[r], result), expected, rtol=1e-5
      )

  def test_gather_undoes_scatter(self):
    layout = ensemble.make_ensemble(5, group_size=2)
    members = _members(5)
    chex.assert_trees_all_equal(layout.gather(layout.scatter(members)), members)

  @parameterized.parameters((0, None), (3, 0))
  def test_impossible_layouts_are_refused(self, num_members, group_size):
    with self.assertRaisesRegex(ValueError, "at least 1"):
      ensemble.make_ensemble(num_members, group_size=group_size)

  def test_equal_functions_and_static_arguments_compile_once(self):
    layout = ensemble.make_ensemble(2)
    self.assertIs(
        layout.map(_power_iteration, num_steps=3),
        ensemble.make_ensemble(2).map(_power_iteration, num_steps=3),
    )


def _in_shard_map(layout, members, shared, **static):
  """What `map` computes, by `shard_map` in the place of pmap; leaves [R, ...].

  Where a device takes all of its members at once, that is a `vmap`.
  """
  fn = functools.partial(_power_iteration, **static)
  if layout.members_per_device == layout.group_size > 1:
    on_device = jax.vmap(fn, in_axes=(0, None))
  else:
    on_device = functools.partial(ensemble._map_groups, fn, layout.group_size)
  mesh = jax.sharding.Mesh(np.array(layout.devices), ("devices",))
  per_device = jax.sharding.PartitionSpec("devices")
  mapped = jax.shard_map(
      on_device,
      mesh=mesh,
      in_specs=(per_device, jax.sharding.PartitionSpec()),
      out_specs=per_device,
      check_vma=False,  # As pmap, a member's scan starts from constants.
  )
  rows = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])
  found = jax.jit(mapped)(jax.tree.map(rows, layout.scatter(members)), shared)
  return jax.tree.map(
      lambda leaf: np.asarray(leaf)[: layout.num_members], found
  )


def check_shard_map(num_members, group_size):
  """Asserts that `map` gives the bits of `shard_map`, in a chaotic chain."""
  shared = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
  layout = ensemble.make_ensemble(num_members, group_size=group_size)
  members = _members(num_members)
  mapped = layout.map(_power_iteration, num_steps=50)
  found = layout.gather(mapped(layout.scatter(members), shared))
  expected = _in_shard_map(layout, members, shared, num_steps=50)
  chex.assert_trees_all_equal(found, expected)


class ShardMapTest(absltest.TestCase):
  """pmap is in maintenance mode: what would stand in its place."""

  def test_a_vmap_in_shard_map_has_the_bits_of_pmap(self):
    check_shard_map(4, group_size=4)

  @pytest.mark.slow
  def test_on_three_devices_too(self):
    program = """
    import jax
    jax.config.update("jax_num_cpu_devices", 3)
    from tests.scansnap_jax import ensemble_test
    for group_size in (4, 2, 1):  # All of a device's members; pairs; one.
      ensemble_test.check_shard_map(12, group_size)
    ensemble_test.check_shard_map(11, 4)  # And a copy that is dropped.
    print(len(jax.devices()))
    """
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        check=True,
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    ).stdout
    self.assertEqual(output, "3\n")


_ON_DEVICES = """
import hashlib, pathlib, sys, tempfile
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from scansnap_jax import config, data, train
small = config.ScanSnapConfig(
    data=config.DataConfig(num_next_per_last=2, num_distinct_per_next=4),
    model=config.ModelConfig(zero_init=False),
    num_last=(3,), lr_z=(0.5, 2.0), lr_ratio=(1.0, 5.0), num_seeds=2,
    batch_size=16, num_steps=20, log_every=10)
with tempfile.TemporaryDirectory() as workdir:
  (result,) = train.train_and_evaluate(small, pathlib.Path(workdir))
digest = hashlib.sha256()
for leaf in jax.tree.leaves((result.params, result.history)):
  digest.update(leaf.tobytes())
print(len(jax.devices()), digest.hexdigest())
"""


class DeviceCountTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_a_sweep_is_bitwise_the_same_on_1_and_3_devices(self):
    # Eight runs: alone, and uneven (3 + 3 + 2 and a dropped copy).
    self._check(1, 3)

  @pytest.mark.slow
  def test_a_sweep_is_bitwise_the_same_on_1_and_8_devices(self):
    self._check(1, 8)  # One run a device.

  def _check(self, *numbers):
    digests = {}
    for num_devices in numbers:
      output = subprocess.run(
          [
              sys.executable,
              "-c",
              textwrap.dedent(_ON_DEVICES),
              str(num_devices),
          ],
          check=True,
          capture_output=True,
          text=True,
          cwd=_ROOT,
          env=os.environ | {"JAX_PLATFORMS": "cpu"},
      ).stdout.split()
      self.assertEqual(output[0], str(num_devices))
      digests[num_devices] = output[1]
    self.assertLen(set(digests.values()), 1, digests)


if __name__ == "__main__":
  absltest.main()
