"""Checkpoints that survive kills and notice damage.

Orbax (https://orbax.readthedocs.io) writes a step in the background and renames
it into place when it is whole, so that a killed process leaves the step before
it. It restores flipped bits without notice, though. Every step therefore
carries its number, the crc32 of each shard of each array (`digest`) and the
crc32 of that list; all are compared at restore. A damaged step is reported in
one line and renamed aside (`40` becomes `40.corrupt`), never deleted, and the
step before it is used.

Orbax's v1 API is used here and in `saved/leaves`, nowhere else; it still lies
below `experimental`. It restores what handlers of v0 have written, and the
files of a step have the names and contents that they had.
"""

from collections.abc import Generator, Mapping
import contextlib
import errno
import gc
import json
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir
from scansnap_jax.experiment.processes import digest
from scansnap_jax.experiment.saved import digest_handler
from scansnap_jax.experiment.saved import leaves as leaves_lib
from scansnap_jax.experiment.saved import noise

_RESUMES = "resumes.jsonl"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class Restored(NamedTuple):
  """What a checkpoint held.

  Attributes:
    step: The step it was saved at.
    tree: The leaves, in the structure and of the kinds of the template.
    metadata: The dict given to `save`.
  """

  step: int
  tree: PyTree
  metadata: dict[str, Any]


class Checkpointer:
  """Saves and restores the state of a run below one directory.

  Leaves may be jax arrays (sharded or not, typed PRNG keys too), numpy arrays
  and Python numbers, empty ones included. All processes of a run make the same
  calls, and hold equal numpy leaves.
  """

  def __init__(
      self, directory: str | os.PathLike[str], *, max_to_keep: int | None = 2
  ):
    """Creates the directory if need be.

    Args:
      directory: Where the steps lie, one folder each.
      max_to_keep: How many steps remain; the oldest go first. None keeps all.
        With 1, nothing lies behind a damaged step.

    Raises:
      UserError: It cannot be made.
    """
    self._directory = pathlib.Path(os.path.abspath(directory))
    workdir.make_folder(self._directory)  # Orbax would log a traceback.
    self._noise = noise.OrbaxNoise()
    self._noise.attach()
    self._has_failed = False
    try:
      with self._writing(), self._noise.silenced():
        self._manager = _open_manager(self._directory, max_to_keep)
    except BaseException:
      self._noise.detach()
      raise

  def save(
      self, step: int, tree: PyTree, metadata: Mapping[str, Any] | None = None
  ) -> bool:
    """Starts to write a step; `tree` may change as soon as this returns.

    Args:
      step: Its number.
      tree: Pytree of arrays.
      metadata: Plain JSON values, such as the data position.

    Returns:
      False if the step is there already; nothing is written then.

    Raises:
      TypeError: A leaf is not an array of numbers.
      UserError: Processes hold different values where they must be equal; or
        this step, or the one before it in the background, cannot be
        written (for one, the disk is full). Finished steps stay intact.
    """
    if step in self.all_steps():
      return False
    body = {
        "step": int(step),
        "metadata": json.loads(json.dumps(dict(metadata or {}))),
        "leaves": digest.digest(tree),
    }
    arrays = [digest.to_array(leaf) for leaf in jax.tree.leaves(tree)]
    with self._writing():
      if not self._directory.is_dir():  # Orbax would make it anew.
        raise FileNotFoundError(self._directory)
      self._manager.save_checkpointables_async(
          step,
          {
              "arrays": _numbered(arrays),
              "digest": {"crc32": leaves_lib.crc32(body), "body": body},
          },
          force=True,
      )
    return True

  def restore_latest(
      self, template: PyTree, *others: PyTree
  ) -> Restored | None:
    """Restores the newest step that is whole.

    Args:
      template: The tree to restore into, of arrays or `jax.ShapeDtypeStruct`.
        A leaf with a sharding becomes a jax array so sharded, a Python number
        a Python number, any other a numpy array.
      *others: Trees that a step may hold instead.

    Returns:
      The step, or None if there is none. Damaged steps are reported and renamed
      aside; if all are damaged the result is None too.

    Raises:
      UserError: The newest whole step holds none of these trees.
    """
    templates = (template, *others)
    self.wait()
    for step in reversed(self.all_steps()):
      restored, problem = None, None
      with self._noise.silenced():
        try:
          restored = self._restore(step, templates)
        except (errors.UserError, MemoryError, PermissionError):
          raise
        except Exception as error:  # Damage shows in any type of exception.
          problem = _shorten(error)
        if problem:
          time.sleep(0.02)  # Reads that are under way end, and complain, here.
          gc.collect()
      if _all_agree(problem is None):
        self._tell(step)
        return restored
      self._set_aside(step, problem or "another process cannot restore it")
    return None

  def all_steps(self) -> list[int]:
    """Returns the steps, oldest first, with the one that is being written."""
    return sorted(c.step for c in self._manager.checkpoints)

  def wait(self) -> None:
    """Waits until the last step is on disk; raises UserError if it cannot."""
    with self._writing():
      self._manager.wait()

  def close(self) -> None:
    """Waits as `wait` does and stops the background threads."""
    with self._writing():
      self._manager.close()
    # After a failure threads may log, later, what was raised.
    if not self._has_failed:
      self._noise.detach()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  @contextlib.contextmanager
  def _writing(self) -> Generator[None, None, None]:
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      self._has_failed = True
      self._noise.keep_dropping()
      is_there = self._directory.is_dir()
      reason = _shorten(error) if is_there else "the folder is gone"
      raise errors.UserError(
          f"cannot write a checkpoint to {self._directory}: {reason}"
      ) from error

  def _restore(self, step: int, templates: tuple[PyTree, ...]) -> Restored:
    """Restores one step; raises UserError if it is whole but of another tree.

    Every other exception is damage.
    """
    saved = self._manager.load_checkpointables(step, {"digest": None})["digest"]
    body = leaves_lib.body_of(saved, step)
    mismatches = [
        digest.find_mismatch(body["leaves"], digest.describe(template))
        for template in templates
    ]
    if all(mismatches):
      raise errors.UserError(
          f"checkpoint {step} in {self._directory} is of another config:"
          f" {mismatches[0]}. Give another --workdir, or the settings of that"
          " run."
      )
    template = templates[mismatches.index(None)]
    targets = jax.tree.leaves(template)
    values = self._restore_arrays(step, [digest.to_array(t) for t in targets])
    leaves = []
    for target, value, entry in zip(
        targets, values, body["leaves"], strict=True
    ):
      if not digest.is_intact(value, entry):
        raise OSError(f"the checksum of {entry['name']} does not match")
      leaves.append(_like(target, value, entry["key_impl"]))
    tree = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return Restored(step, tree, body["metadata"])

  def _restore_arrays(
      self, step: int, targets: list[digest.Plain]
  ) -> list[np.ndarray | jax.Array]:
    numbered = _numbered(targets)
    arrays = self._manager.load_checkpointables(
        step, {"arrays": jax.tree.map(_abstract, numbered)}
    )["arrays"]
    return [
        arrays[leaves_lib.NAME % i]
        if target.size
        else np.zeros(target.shape, target.dtype)
        for i, target in enumerate(targets)
    ]

  def _tell(self, step: int) -> None:
    """Says and records from which step a run goes on.

    What a run ends with cannot show it: work that is done again gives the same
    bits.
    """
    if jax.process_index() == 0:
      name = self._directory.name
      print(f"{name} goes on from step {step}.", file=sys.stderr)
      row = json.dumps({"step": step, "time": time.time()})
      with self._writing(), open(self._directory / _RESUMES, "a") as file:
        file.write(row + "\n")

  def _set_aside(self, step: int, problem: str) -> None:
    """Renames a step, so that it is neither used nor in the way."""
    path = self._directory / str(step)
    count = 1
    while _aside(path, count).exists():
      count += 1
    if jax.process_count() > 1:  # One name for all, whoever renames it first.
      count = int(multihost_utils.broadcast_one_to_all(np.asarray(count)))
    aside = _aside(path, count)
    logging.warning(
        "DAMAGED CHECKPOINT: step %d in %s cannot be used (%s). It is now"
        " called %s; trying the step before it.",
        *(step, self._directory, problem, aside.name),
    )
    if jax.process_index() == 0:
      path.rename(aside)
    _all_agree(True)  # The others wait for the new name.
    self._manager.reload()


def _aside(path: pathlib.Path, count: int) -> pathlib.Path:
  return path.with_suffix(f".corrupt{count if count > 1 else ''}")


def _open_manager(
    directory: pathlib.Path, max_to_keep: int | None
) -> ocp.training.Checkpointer:
  policies = ocp.training.preservation_policies
  handlers = ocp.handlers.local_registry(include_global_registry=False)
  handlers.add(ocp.handlers.PyTreeHandler, checkpointable_name="arrays")
  handlers.add(digest_handler.DigestHandler, checkpointable_name="digest")
  context = ocp.Context()
  context.checkpointables.registry = handlers
  # Trained floats hardly compress: zstd would only cost time.
  context.array.saving.use_compression = False
  kept = (
      policies.PreserveAll()
      if max_to_keep is None
      else policies.LatestN(max_to_keep)
  )
  return ocp.training.Checkpointer(
      str(directory),
      context=context,
      # Orbax types its own policies as of other infos than it asks for.
      preservation_policy=kept,  # pyrefly: ignore[bad-argument-type]
      cleanup_tmp_directories=True,
  )


def _numbered(arrays: list[digest.Plain]) -> dict[str, digest.Plain]:
  """Names the arrays by position; orbax refuses empty ones and empty trees."""
  named: dict[str, digest.Plain] = {}
  for i, array in enumerate(arrays):
    if array.size:
      # A numpy scalar has no handler; an array without dimensions has.
      is_scalar = isinstance(array, np.generic)
      named[leaves_lib.NAME % i] = np.asarray(array) if is_scalar else array
  return named or {"nothing": np.zeros(1, np.uint8)}


def _abstract(target: digest.Plain) -> jax.ShapeDtypeStruct | np.ndarray:
  sharding = getattr(target, "sharding", None)
  if sharding is None:
    return np.empty(target.shape, target.dtype)
  return jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=sharding)


def _like(
    target: Any, value: np.ndarray | jax.Array, key_impl: str | None
) -> Any:
  """Makes a restored plain array what the template has in its place."""
  if key_impl is not None:
    value = jax.random.wrap_key_data(jnp.asarray(value), impl=key_impl)
  sharding = getattr(target, "sharding", None)
  if sharding is not None:
    return jax.device_put(value, sharding)
  if isinstance(target, (bool, int, float, complex)):
    return type(target)(value.item())
  return value[()] if isinstance(target, np.generic) else value


def _shorten(error: Exception) -> str:
  text = " ".join(str(error).split()) or type(error).__name__
  for number in _DISK:  # What matters of a page of tensorstore's.
    if os.strerror(number) in text:
      return os.strerror(number)
  return text if len(text) <= 200 else text[:200] + "..."


def _all_agree(is_good: bool) -> bool:
  """Whether it is good for every process; they all wait for the answer."""
  if jax.process_count() == 1:
    return is_good
  return bool(multihost_utils.process_allgather(np.asarray(is_good)).all())
