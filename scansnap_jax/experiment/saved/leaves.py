"""Arrays of a checkpoint by their names, for readers who have no config.

`checkpoint` restores a run that goes on, into the tree of its config, and sets
aside what is damaged. Here a finished run is read and nothing is written.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any
import zlib

import jax
from jaxtyping import PyTree
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment.processes import digest
from scansnap_jax.experiment.saved import noise

# Of a leaf by its place in the list of checksums.
NAME = "leaf_%05d"
# The file of the list, in the folder `digest` of a step.
DIGEST = "metadata"


def steps(directory: pathlib.Path) -> list[int]:
  """The steps that lie whole in a folder of checkpoints, oldest first."""
  names = (path.name for path in directory.glob("*") if path.is_dir())
  return sorted(int(name) for name in names if name.isdecimal())


def read(
    directory: pathlib.Path, step: int, template: PyTree, prefix: str
) -> PyTree:
  """Reads a part of a step's tree, every bit of it checked.

  Args:
    directory: That of the checkpoints.
    step: One of `steps`.
    template: Shapes of the part.
    prefix: What the names of the part begin with, as `['state'].params`.

  Returns:
    The part, of numpy arrays.

  Raises:
    UserError: It is damaged, or of other shapes than the template.
  """
  path = directory.absolute() / str(step)  # Orbax takes no other.
  filtered = noise.OrbaxNoise()
  filtered.attach()
  try:
    with filtered.silenced():
      return _read(path, step, template, prefix)
  except (errors.UserError, MemoryError, PermissionError):
    raise
  except Exception as error:  # Damage shows in any type of exception.
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise errors.UserError(
        f"checkpoint {path} is damaged: {reason}."
    ) from error
  finally:
    filtered.detach()


def _read(
    path: pathlib.Path, step: int, template: PyTree, prefix: str
) -> PyTree:
  body = body_of(json_file.read_object(path / "digest" / DIGEST), step)
  asked = [
      entry | {"name": prefix + entry["name"]}
      for entry in digest.describe(template)
  ]
  numbers = {entry["name"]: n for n, entry in enumerate(body["leaves"])}
  there = [e for e in body["leaves"] if e["name"].startswith(prefix)]
  if mismatch := digest.find_mismatch(there, asked):
    raise errors.UserError(
        f"checkpoint {path} is not of this config: {mismatch}."
    )
  names = [NAME % numbers[entry["name"]] for entry in asked]
  arrays = _arrays(path, names)
  found = [np.asarray(arrays[name]) for name in names]
  for array, entry in zip(found, there, strict=True):
    if not digest.is_intact(array, entry):
      raise OSError(f"the checksum of {entry['name']} does not match")
  return jax.tree.unflatten(jax.tree.structure(template), found)


def _arrays(path: pathlib.Path, names: list[str]) -> dict[str, np.ndarray]:
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  asked = {"arrays": dict.fromkeys(names, np.ndarray)}
  with context:
    return ocp.load_checkpointables(str(path), asked)["arrays"]


def body_of(saved: Mapping[str, Any], step: int) -> dict[str, Any]:
  """Returns a step's list of checksums, which is itself checked.

  A folder may have been copied or linked under another step's name; what was
  written before steps had their number inside is taken at its name.

  Args:
    saved: What lies beside the arrays.
    step: That the folder's name says.

  Raises:
    OSError: The list is damaged, or of another step.
  """
  body = saved["body"]
  if crc32(body) != saved["crc32"]:
    raise OSError("the checksum of the list of checksums does not match")
  if body.get("step", step) != step:
    raise OSError(f"it holds step {body['step']}")
  return body


def crc32(body: Mapping[str, Any]) -> int:
  """The checksum of a list of checksums."""
  return zlib.crc32(json.dumps(body, sort_keys=True).encode())
