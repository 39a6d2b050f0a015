"""What a tree of arrays is, in JSON: names, shapes, dtypes and crc32s.

A digest is a list with one entry a leaf, in the order of `jax.tree.leaves`:

  name      the path of the leaf, as `jax.tree_util.keystr` writes it
  shape     of the leaf; that of the keys for typed PRNG keys
  dtype     likewise
  key_impl  of typed PRNG keys (`threefry2x32`), otherwise null
  shards    [index, crc32] of every distinct shard; an index is a list of
            [start, stop], one an axis

Leaves are jax arrays, numpy arrays or Python numbers. `to_array` gives the
plain array that stands for one: the uint32 data of PRNG keys, a 0-d array for
a number.
"""

from collections.abc import Sequence
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
from jaxtyping import Bool, PyTree, UInt32
import numpy as np

from scansnap_jax.experiment import errors

_Index = tuple[tuple[int, int], ...]
# Plain arrays, or shape and dtype of one.
Plain = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct


def is_key(leaf: object) -> bool:
  """Whether a leaf, or a `jax.ShapeDtypeStruct`, is of typed PRNG keys."""
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def to_array(leaf: Any) -> Plain:
  """Returns the plain array (or its shape and dtype) that stands for a leaf."""
  if not hasattr(leaf, "dtype"):
    return np.asarray(leaf)
  if not is_key(leaf):
    # Checksums are of bytes: the same numbers must have the same ones.
    swapped = isinstance(leaf, np.ndarray) and not leaf.dtype.isnative
    return leaf.astype(leaf.dtype.newbyteorder("=")) if swapped else leaf
  if isinstance(leaf, jax.Array):
    return jax.random.key_data(leaf)
  return jax.eval_shape(jax.random.key_data, leaf)


def describe(tree: PyTree) -> list[dict[str, Any]]:
  """Returns name, shape and dtype of every leaf.

  Args:
    tree: Pytree of arrays or of `jax.ShapeDtypeStruct`.

  Raises:
    TypeError: A leaf is not an array of numbers.
  """
  entries = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path) or "the root"
    dtype = to_array(leaf).dtype
    if not (dtype == np.bool_ or jax.dtypes.issubdtype(dtype, np.number)):
      raise TypeError(f"{name} is no array of numbers: {leaf!r}")
    if is_key(leaf):
      dtype = leaf.dtype
    shape = [int(size) for size in np.shape(leaf)]
    entries.append({"name": name, "shape": shape, "dtype": str(dtype)})
  return entries


def digest(tree: PyTree) -> list[dict[str, Any]]:
  """Returns the digest of a tree of arrays, of all processes together.

  Raises:
    TypeError: A leaf is not an array of numbers.
    UserError: Processes hold different values of one shard: of a replicated
      array, or of a numpy array, which all are to have alike.
  """
  entries = describe(tree)
  arrays = []
  for entry, leaf in zip(entries, jax.tree.leaves(tree), strict=True):
    entry["key_impl"] = str(jax.random.key_impl(leaf)) if is_key(leaf) else None
    arrays.append(to_array(leaf))
  indices = [_all_indices(array) for array in arrays]
  # One exchange for all leaves, in the order that all processes have alike: a
  # collective a leaf would cost a round trip each.
  names = [
      entry["name"]
      for entry, shards in zip(entries, indices, strict=True)
      for _ in shards
  ]
  mine = [
      crc
      for array, shards in zip(arrays, indices, strict=True)
      for crc in _checksums(array, shards)
  ]
  checksums = iter(_gather(names, mine))
  for entry, shards in zip(entries, indices, strict=True):
    entry["shards"] = [[index, next(checksums)] for index in shards]
  return entries


def find_mismatch(
    there: list[dict[str, Any]], here: list[dict[str, Any]]
) -> str | None:
  """Says in which leaf two trees differ in name, shape or dtype.

  Args:
    there: The digest that was saved.
    here: `describe` of the tree to restore into.

  Returns:
    Such as `['w'] is float32[3] there, float32[4] here`, or None.
  """

  def show(entry: dict[str, Any] | None) -> str:
    return f"{entry['dtype']}{entry['shape']}" if entry else "absent"

  found = {entry["name"]: entry for entry in there}
  asked = {entry["name"]: entry for entry in here}
  for name in found | asked:
    a, b = show(found.get(name)), show(asked.get(name))
    if a != b:
      return f"{name} is {a} there, {b} here"
  if list(found) != list(asked):
    return "the leaves are in another order"
  return None


def is_intact(array: Plain, entry: dict[str, Any]) -> bool:
  """Whether the shards of a plain array have the checksums of its entry.

  Shards that this process cannot see pass; its peers check them.
  """
  saved = {_to_index(index): crc for index, crc in entry["shards"]}
  # Of the shards that were saved, however the array lies today.
  found = _checksums(array, list(saved))
  pairs = zip(found, saved.values(), strict=True)
  return all(crc is None or crc == expected for crc, expected in pairs)


def _to_index(index: Sequence[Sequence[int]]) -> _Index:
  return tuple((int(start), int(stop)) for start, stop in index)


def _from_slices(slices: tuple[slice, ...], shape: tuple[int, ...]) -> _Index:
  bounds = [s.indices(size) for s, size in zip(slices, shape, strict=True)]
  return tuple((start, stop) for start, stop, _ in bounds)


def _all_indices(array: Plain) -> list[_Index]:
  """Returns the distinct shards of the array over all processes, in order."""
  if not isinstance(array, jax.Array):
    return [tuple((0, size) for size in array.shape)]
  # As a set: replicated shards are one shard, checked once.
  slices = array.sharding.devices_indices_map(array.shape).values()
  return sorted({_from_slices(s, array.shape) for s in slices})


def _checksums(array: Plain, indices: list[_Index]) -> list[int | None]:
  """Returns the crc32 of each shard, None where this process has no copy."""
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    local = {
        _from_slices(shard.index, array.shape): shard.data
        for shard in array.addressable_shards
    }
    return [_crc32(local[i]) if i in local else None for i in indices]
  whole = np.asarray(array)
  return [_crc32(whole[tuple(slice(*axis) for axis in i)]) for i in indices]


def _crc32(array: Plain) -> int:
  # As bytes, because bfloat16 has no buffer protocol.
  flat = np.ascontiguousarray(array).reshape(-1)
  return zlib.crc32(flat.view(np.uint8).data) if flat.size else 0


def _gather(names: list[str], checksums: list[int | None]) -> list[int]:
  """Fills in what the other processes hold, who must agree on copies.

  Args:
    names: Of the leaf that each shard is of.
    checksums: None where this process has no copy.

  Raises:
    UserError: Two processes have copies that differ.
  """
  mine = np.asarray([crc or 0 for crc in checksums], np.uint32)
  if jax.process_count() == 1:
    return mine.tolist()
  is_held = np.asarray([crc is not None for crc in checksums])
  return merge_checksums(
      names,
      multihost_utils.process_allgather(mine),
      multihost_utils.process_allgather(is_held),
  )


def merge_checksums(
    names: list[str],
    checksums: UInt32[np.ndarray, "P S"],
    is_held: Bool[np.ndarray, "P S"],
) -> list[int]:
  """Joins the checksums of P processes, of S shards each.

  Args:
    names: Of the leaf that each shard is of.
    checksums: Anything where a process has no copy.
    is_held: Whether a process has a copy.

  Raises:
    UserError: Two processes have copies that differ.
  """
  first = np.take_along_axis(checksums, is_held.argmax(axis=0)[None], 0)[0]
  differs = (is_held & (checksums != first[None])).any(axis=0)
  if differs.any():
    shard = int(differs.argmax())
    process = int((is_held & (checksums != first[None]))[:, shard].argmax())
    raise errors.UserError(
        f"{names[shard]} must be equal on all processes, and process {process}"
        " holds other values than the first that has it: nothing is saved."
    )
  return first.tolist()
