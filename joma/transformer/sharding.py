"""Which axis of a mesh splits which axis of which parameter: one table.

A mesh has the axes `data`, `fsdp` and `tensor`. Batches are split over data and
fsdp. Parameters, and optimizer moments with them, are split over fsdp, which
saves memory (https://arxiv.org/abs/1910.02054), and over tensor, which splits
heads, hidden units and vocabulary (https://arxiv.org/abs/1909.08053); over data
they are copies.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
import re
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree
import numpy as np

from joma.systems import names
from joma.transformer.layers import scanning
from kernels_pallas import masks
from kernels_pallas import selection
from scansnap_jax.experiment import errors

AnyMesh = Mesh | AbstractMesh

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# The first pattern that the end of a path matches holds. Of two products in a
# row the first is split over tensor by its outputs, the second by its inputs:
# heads and hidden units stay where they are, and one sum follows the pair.
_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"token_embed/embedding", ("tensor", "fsdp")),
    (r"position_embed/embedding", (None, "fsdp")),
    (r"attn/(query|key|value)/kernel", ("fsdp", "tensor", None)),
    (r"attn/(query|key|value)/bias", ("tensor", None)),
    (r"attn/out/kernel", ("tensor", None, "fsdp")),
    (r"mlp/(gate|up)/kernel", ("fsdp", "tensor")),
    (r"mlp/(gate|up)/bias", ("tensor",)),
    (r"mlp/down/kernel", ("tensor", "fsdp")),
    (r"output/kernel", ("fsdp", "tensor")),
    (r"output/bias", ("tensor",)),
    (r"(embed_proj|output_proj)/kernel", ("fsdp", None)),
    (r".*", ()),  # Norms, the remaining biases, counters.
)


def make_mesh(
    fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """Lays all devices out; what fsdp and tensor leave goes to data.

  Raises:
    UserError: If the devices cannot be so divided.
  """
  devices = jax.devices() if devices is None else list(devices)
  data, rest = divmod(len(devices), fsdp * tensor)
  if rest:
    raise errors.UserError(
        f"fsdp={fsdp} x tensor={tensor} must divide the {len(devices)} devices."
    )
  return Mesh(np.array(devices).reshape(data, fsdp, tensor), AXES)


def partition_spec(path: str, shape: Sequence[int], mesh: AnyMesh) -> P:
  """How a parameter, or what the optimizer keeps of it, is split.

  Args:
    path: Names from the root, such as `params/layers_0/mlp/up/kernel`.
    shape: Its shape. An axis that the mesh does not divide is not split.
    mesh: The mesh.
  """
  if f"{scanning.STACKED}/" in path:  # The layers' own axis stays whole.
    one = path.replace(f"{scanning.STACKED}/", f"{scanning.STACKED}_0/")
    return P(None, *partition_spec(one, shape[1:], mesh))
  axes = _system_axes(path)
  if axes is None:
    axes = next(axes for rule, axes in _RULES if re.search(rule + "$", path))
  if len(axes) > len(shape):
    return P()
  whole = [
      axis if axis is not None and size % mesh.shape[axis] == 0 else None
      for axis, size in zip(axes, shape, strict=False)
  ]
  return P(*whole)


def _system_axes(path: str) -> tuple[str | None, ...] | None:
  """What an attention system says of its own parameters."""
  found = re.search(r"attn/(\w+)/(\w+)$", path)
  if found is None or found[1] not in names.SYSTEMS:
    return None
  return names.load(found[1]).axes[found[2]]


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
  """A sharding for each array, or its shape, of a state."""

  def sharding(
      path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct | Array
  ) -> NamedSharding:
    keys = (jax.tree_util.keystr((key,), simple=True) for key in path)
    spec = partition_spec("/".join(keys), leaf.shape, mesh)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh, ndim: int, batch_axis: int) -> NamedSharding:
  """Splits one axis of an array over data and fsdp."""
  axes: list[Any] = [None] * ndim
  axes[batch_axis] = BATCH_AXES
  return NamedSharding(mesh, P(*axes))


def keep_split(
    next_fun: Callable[..., PyTree],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> PyTree:
  """Keeps the outputs [B, ...] of modules split by sequences.

  For `nn.intercept_methods`, under `jax.set_mesh` of a mesh of this module: XLA
  may else gather activations where it should gather parameters.
  """
  output = next_fun(*args, **kwargs)
  mesh = jax.sharding.get_abstract_mesh()
  if context.method_name != "__call__" or not set(AXES) <= set(mesh.auto_axes):
    return output
  num_parts = num_batch_parts(mesh)

  def keep(leaf: Array) -> Array:
    # Streams [B, T, D] alone: of heads and their like XLA knows best.
    if leaf.ndim != 3 or leaf.shape[0] % num_parts:
      return leaf
    free = (P.UNCONSTRAINED,) * (leaf.ndim - 1)
    return jax.lax.with_sharding_constraint(leaf, P(BATCH_AXES, *free))

  return jax.tree.map(keep, output)


def per_part(
    attend: Callable[..., Array],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K J"],
    where: masks.Mask | selection.Selection,
    of_heads: PyTree = None,
) -> Float[Array, "B T _ J"]:
  """Attends in parts of batch and heads, as kernels cannot be split by XLA.

  Under `jax.set_mesh` of a mesh of this module each device calls `attend` with
  the sequences and heads that are its own, or with all of an axis that the mesh
  does not divide. Without one it is `attend(query, key, value, where)`; where
  `of_heads`, arrays whose first axes are heads, is given, it comes after those.
  """
  extra = () if of_heads is None else (of_heads,)
  mesh = jax.sharding.get_abstract_mesh()
  if not set(AXES) <= set(mesh.auto_axes):
    return attend(query, key, value, where, *extra)
  num_parts = num_batch_parts(mesh)
  batch = BATCH_AXES if query.shape[0] % num_parts == 0 else None
  # By key heads: query heads go with the key head that they share.
  heads = None if key.shape[2] % mesh.shape["tensor"] else "tensor"
  arrays = P(batch, None, heads, None)
  split = jax.tree.map(lambda _: P(heads), extra)
  in_parts = lambda attend, *places: jax.shard_map(
      attend,
      in_specs=(arrays, arrays, arrays, *places, *split),
      out_specs=arrays,
      # Kernels do not say over which axes of the mesh their outputs vary.
      check_vma=False,
  )
  if isinstance(where, selection.Selection):
    place = _selection_specs(where, batch, heads)
  else:
    leaves = jax.tree.leaves(where)
    is_known = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    if is_known and where.starts.ndim == 2:  # Tiles can then be left out.
      alike = lambda query, key, value, *extra: attend(
          query, key, value, where, *extra
      )
      return in_parts(alike)(query, key, value, *extra)
    place = _mask_specs(where, batch)
  return in_parts(attend, place)(query, key, value, where, *extra)


def per_head(
    function: Callable[..., PyTree],
    arrays: Sequence[Array],
    labels: Sequence[str],
    results: PyTree,
) -> PyTree:
  """Calls what keeps sequences and heads apart, in parts of both.

  As `per_part`, for functions of other arrays than queries, keys and values.

  Args:
    function: Of `arrays`; each of its results has sequences or heads, too.
    arrays: The first one has an axis of each.
    labels: A letter an axis, of each array: "b" sequences, "n" heads, "." any
      other.
    results: Labels of what `function` returns, in its structure.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not set(AXES) <= set(mesh.auto_axes):
    return function(*arrays)
  sizes = dict(zip(labels[0], arrays[0].shape, strict=True))
  axes = {
      "b": BATCH_AXES if sizes["b"] % num_batch_parts(mesh) == 0 else None,
      "n": "tensor" if sizes["n"] % mesh.shape["tensor"] == 0 else None,
  }
  place = lambda label: P(*(axes.get(axis) for axis in label))
  return jax.shard_map(
      function,
      in_specs=tuple(map(place, labels)),
      out_specs=jax.tree.map(place, results),
      # Kernels do not say over which axes of the mesh their outputs vary.
      check_vma=False,
  )(*arrays)


def _mask_specs(mask: masks.Mask, batch: Any) -> masks.Mask:
  """Splits what a mask has for each sequence."""
  split = lambda leaf, rank: P(batch) if leaf.ndim == rank else P()
  return masks.Mask(
      split(mask.starts, 3),
      split(mask.stops, 3),
      None if mask.query_ids is None else split(mask.query_ids, 2),
      None if mask.key_ids is None else split(mask.key_ids, 2),
  )


def _selection_specs(
    where: selection.Selection, batch: Any, heads: Any
) -> selection.Selection:
  """Splits tables by sequences and heads, unless those share one."""
  rows, columns = where.num_valid.shape[:2]
  place = P(batch if rows > 1 else None, heads if columns > 1 else None)
  return dataclasses.replace(
      where,
      block_table=place,
      num_valid=place,
      mask=None if where.mask is None else _mask_specs(where.mask, batch),
  )


def num_batch_parts(mesh: AnyMesh) -> int:
  """How many parts a batch is split into."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
