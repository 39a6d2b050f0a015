"""Steps of before orbax's v1 API, written and read by its handlers of v0."""

from absl.testing import absltest
import chex
import jax
import numpy as np
import orbax.checkpoint as ocp

from scansnap_jax.experiment import checkpoint
from scansnap_jax.experiment.processes import digest
from scansnap_jax.experiment.saved import leaves
from tests.scansnap_jax.experiment import checkpoints


def _manager(directory):
  return ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(create=True),
      item_handlers={
          "arrays": ocp.PyTreeCheckpointHandler(use_compression=False),
          "digest": ocp.JsonCheckpointHandler(),
      },
  )


def _plain(step):
  return [digest.to_array(x) for x in jax.tree.leaves(checkpoints.tree(step))]


def _save(directory, step):
  """As `Checkpointer.save` did."""
  tree = checkpoints.tree(step)
  body = {
      "step": step,
      "metadata": checkpoints.metadata(step),
      "leaves": digest.digest(tree),
  }
  named = {f"leaf_{i:05d}": x for i, x in enumerate(_plain(step)) if x.size}
  with _manager(directory) as manager:
    manager.save(
        step,
        args=ocp.args.Composite(
            arrays=ocp.args.PyTreeSave(named),
            digest=ocp.args.JsonSave(
                {"crc32": leaves.crc32(body), "body": body}
            ),
        ),
    )


class OlderTest(checkpoints.TestCase):

  def test_a_step_of_v0_is_restored(self):
    _save(self.directory, 3)
    self.assertRestoredIs(
        checkpoints.restore(self.directory, checkpoints.tree(0)), 3
    )

  def test_a_part_of_it_is_read_by_name(self):
    _save(self.directory, 3)
    part = checkpoints.tree(3)["numbers"]
    found = leaves.read(self.directory, 3, part, "['numbers']")
    chex.assert_trees_all_equal(found, jax.tree.map(np.asarray, part))

  def test_damage_of_it_is_noticed(self):
    for step in (1, 2):
      _save(self.directory, step)
    file = max(
        checkpoints.files(self.directory / "2"), key=lambda f: f.stat().st_size
    )
    content = file.read_bytes()
    start = content.index(checkpoints.tree(2)["host"][0].tobytes())
    file.write_bytes(checkpoints.flip(content, start, 0))
    self.assertRestoredIs(
        checkpoints.restore(self.directory, checkpoints.tree(0)), 1
    )

  def test_a_run_of_v0_goes_on_and_keeps_the_newest(self):
    for step in (1, 2):
      _save(self.directory, step)
    with checkpoint.Checkpointer(self.directory) as checkpointer:
      checkpointer.save(3, checkpoints.tree(3), checkpoints.metadata(3))
      checkpointer.wait()
      self.assertEqual(checkpointer.all_steps(), [2, 3])

  def test_v0_reads_what_v1_writes(self):
    checkpoints.save(self.directory, [2])
    with _manager(self.directory) as manager:
      found = manager.restore(
          2,
          args=ocp.args.Composite(
              arrays=ocp.args.PyTreeRestore(
                  restore_args={
                      f"leaf_{i:05d}": ocp.RestoreArgs(restore_type=np.ndarray)
                      for i, x in enumerate(_plain(2))
                      if x.size
                  }
              ),
              digest=ocp.args.JsonRestore(),
          ),
      )
    leaves.body_of(found["digest"], 2)
    for i, expected in enumerate(_plain(2)):
      if expected.size:
        np.testing.assert_array_equal(
            found["arrays"][f"leaf_{i:05d}"], expected
        )


if __name__ == "__main__":
  absltest.main()
