"""Ops of arrays that `jax.jit` has sharded: each device computes its own heads.

A kernel says nothing of how it could be split, so that XLA would gather what it
is given. Sequences are independent, and so are key heads with their query
heads: where batch or heads are sharded, the function is called on each device
with what the device has, and plans for those sizes.

Labels say which axes of an array these are: a letter an axis, "b" batch, "n"
query heads, "k" key heads, "." any other, which is not split.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
from jax.experimental import custom_partitioning
import jax.numpy as jnp

from kernels_pallas import implementations
from kernels_pallas import interpret
from kernels_pallas import masks
from kernels_pallas import selection as selection_lib

# Mesh axes that an axis of an array is split by.
_Split = tuple[str, ...]
# Sizes of batch, query heads and key heads.
Sizes = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
  """Of the leaves of the arguments and of the results, in their order.

  Attributes:
    arguments: A label each.
    results: A label each.
    are_sums: Whether results of a key head are sums over its query heads: then
      these may be split though they share one key head.
  """

  arguments: Sequence[str]
  results: Sequence[str]
  are_sums: bool = True

  @classmethod
  def of(cls, arguments: Any, results: Any, are_sums: bool = True) -> "Labels":
    """From trees as those of arguments and results, with labels as leaves."""
    leaves = jax.tree.leaves
    return cls(leaves(arguments), leaves(results), are_sums)


def of_where(where: Any, sizes: Sizes) -> list[str] | None:
  """Labels of the traced arrays of a mask or a selection.

  Args:
    where: A `masks.Mask`, a `selection.Selection` or None.
    sizes: Batch, query heads, key heads.

  Returns:
    None where an array that is known has an axis that would be split: it is
    part of the program, which is one for all devices.
  """
  mask = where.mask if isinstance(where, selection_lib.Selection) else where
  found = []
  if isinstance(where, selection_lib.Selection):
    for array in (where.block_table, where.num_valid):
      found.append((array, _of_table(array.shape, sizes)))
  if isinstance(mask, masks.Mask):
    ranks = {"starts": 3, "stops": 3, "query_ids": 2, "key_ids": 2}
    for name, rank in ranks.items():
      array = getattr(mask, name)
      if array is None:
        continue
      is_own = array.ndim == rank and array.shape[0] == sizes[0] != 1
      found.append((array, "b" * is_own + "." * (array.ndim - is_own)))
  if any(
      set(label) - {"."} for x, label in found if not isinstance(x, jax.Array)
  ):
    return None
  return [label for x, label in found if isinstance(x, jax.Array)]


def _of_table(shape: tuple[int, ...], sizes: Sizes) -> str:
  batch, num_heads, num_kv_heads = sizes
  own = "b" if shape[0] == batch != 1 else "."
  heads = "n" if shape[1] == num_heads != 1 else "."
  if heads == "." and shape[1] == num_kv_heads != 1:
    heads = "k"
  return own + heads + "." * (len(shape) - 2)


def are_possible() -> bool:
  """Whether a program may be one of several devices, and may be split here.

  libtpu knows no calls that are split while a program is compiled.
  """
  if implementations.current_platform() == "tpu":
    return False
  mesh = jax.sharding.get_abstract_mesh()
  # Over explicit axes jax splits by the types of arrays, not XLA.
  if jax.sharding.AxisType.Explicit in mesh.axis_types:
    return False
  return mesh.size > 1 or (mesh.empty and jax.device_count() > 1)


def call(
    function: Callable[..., Sequence[jax.Array]],
    whole: Callable[..., Sequence[jax.Array]],
    labels: Labels,
    *args: jax.Array,
) -> list[jax.Array]:
  """function(*args), split by how XLA shards the arguments.

  Args:
    function: Of arrays of any batch and heads.
    whole: The same of arrays as large as `args`, as one primitive.
    labels: Of arguments and results.
    *args: Whole.
  """
  sizes = _sizes(labels, [x.shape for x in args])
  mode, mesh = interpret.mode(), jax.sharding.get_abstract_mesh()

  def own(added: _Split, *args: jax.Array) -> tuple[jax.Array, ...]:
    # XLA asks for this when it compiles, where other contexts are gone.
    with interpret.interpreted(mode), jax.sharding.use_abstract_mesh(mesh):
      found = function(*args)
    pairs = zip(found, labels.results, strict=True)
    return tuple(_added(x, added) if "k" in label else x for x, label in pairs)

  def partition(mesh: Any, arguments: Any, results: Any) -> Any:
    del results
    splits = _splits(mesh, labels, arguments, sizes)
    added = splits.get("n", ()) if "k" not in splits else ()
    place = lambda label: jax.sharding.NamedSharding(
        mesh, jax.P(*(splits.get(axis) for axis in label))
    )
    return (
        mesh,
        functools.partial(own, added),
        tuple(place(label) for label in labels.results),
        tuple(place(label) for label in labels.arguments),
    )

  split = custom_partitioning.custom_partitioning(
      lambda *args: tuple(whole(*args))
  )
  rule, fixed = _rule(labels, sizes)
  group = {"g": sizes[1] // sizes[2]} if "(k g)" in rule else {}
  split.def_partition(
      partition=partition,
      sharding_rule=rule,
      need_replication_factors=fixed,
      **group,
  )
  return list(split(*args))


def _sizes(labels: Labels, shapes: Sequence[tuple[int, ...]]) -> Sizes:
  """Batch, query heads and key heads, 1 where no array has them."""
  found = {"b": 1, "n": 1, "k": 1}
  for label, shape in zip(labels.arguments, shapes, strict=True):
    found |= dict(zip(label, shape, strict=True))
  return found["b"], found["n"], found["k"]


def _splits(
    mesh: Any, labels: Labels, arguments: Sequence[Any], sizes: Sizes
) -> dict[str, _Split]:
  """Mesh axes by label: those of the first array that is split there."""
  found: dict[str, _Split] = {}
  for label, array in zip(labels.arguments, arguments, strict=True):
    spec = getattr(array.sharding, "spec", ())
    for axis, names in zip(label, spec, strict=False):
      if axis != "." and names is not None:
        names = names if isinstance(names, tuple) else (names,)
        found.setdefault("b" if axis == "b" else "n", names)
  # Query heads go with their key heads, so that these must be divisible.
  is_shared = sizes[2] == 1 and labels.are_sums
  heads = sizes[1] if is_shared else sizes[2]
  for axis, size in (("b", sizes[0]), ("n", heads)):
    devices = math.prod(mesh.shape[name] for name in found.get(axis, ()))
    if size % devices:
      del found[axis]
  if set(found.get("b", ())) & set(found.get("n", ())):
    del found["n"]
  if "n" in found and not is_shared:
    found["k"] = found["n"]
  return found


def _added(x: jax.Array, names: _Split) -> jax.Array:
  """Adds up what devices found for query heads that share a key head."""
  if not names:
    return x
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return jax.lax.psum(wide, names).astype(x.dtype)


def _rule(labels: Labels, sizes: Sizes) -> tuple[str, tuple[str, ...]]:
  """How shardings spread from array to array, and what is not split."""
  numbers = itertools.count()
  fixed: list[str] = []
  names_of = {"b": "b", "n": "(k g)", "k": "k"}
  if sizes[1] == sizes[2]:
    names_of["n"] = "k"
  elif sizes[2] == 1:
    # One key head, which all have; its query heads are split or are not.
    names_of = {"b": "b", "n": "g"} if labels.are_sums else {"b": "b"}

  def of(label: str) -> str:
    names = []
    for axis in label:
      if axis not in names_of:
        fixed.append(f"x{next(numbers)}")
      names.append(names_of.get(axis) or fixed[-1])
    return " ".join(names)

  sides = (
      ", ".join(of(label) for label in side)
      for side in (labels.arguments, labels.results)
  )
  return " -> ".join(sides), tuple(fixed)
