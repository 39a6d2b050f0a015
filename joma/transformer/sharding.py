"""Which axis of a mesh splits which axis of which parameter: one table.

A mesh has the axes `data`, `fsdp`, `tensor` and `seq`. Batches are split over
data and fsdp, and their positions over seq
(https://arxiv.org/abs/2310.01889). Parameters, and optimizer moments with them,
are split over fsdp, which saves memory (https://arxiv.org/abs/1910.02054), and
over tensor, which splits heads, hidden units and vocabulary
(https://arxiv.org/abs/1909.08053); over data and seq they are copies.
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
from scansnap_jax.experiment.processes import mesh_config

AnyMesh = Mesh | AbstractMesh

AXES = mesh_config.AXES
BATCH_AXES = ("data", "fsdp")

# The first pattern that the end of a path matches holds. Of two products in a
# row the first is split over tensor by its outputs, the second by its inputs:
# heads and hidden units stay where they are, and one sum follows the pair.
_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"token_embed/embedding", ("tensor", "fsdp")),
    (r"position_embed/embedding", (None, "fsdp")),
    (r"attn/(query|key|value)/kernel", ("fsdp", "tensor", None)),
    (r"attn/(query|key|value)/bias", ("tensor", None)),
    # Of Monarch factors: outputs are split by rows s, inputs by blocks a.
    (r"(attn/(query|key|value)|mlp/(gate|up))/right", (None, "fsdp")),
    (
        r"(attn/(query|key|value)|mlp/(gate|up))/left",
        ("fsdp", None, None, "tensor"),
    ),
    (r"(attn/out|mlp/down)/right", ("tensor", "fsdp")),
    (r"(attn/out|mlp/down)/left", (None, "tensor", None, "fsdp")),
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
    fsdp: int = 1,
    tensor: int = 1,
    seq: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
  """Lays all devices out; what fsdp, tensor and seq leave goes to data.

  Raises:
    UserError: If the devices cannot be so divided.
  """
  devices = jax.devices() if devices is None else list(devices)
  number = len(devices)
  data, rest = divmod(number, fsdp * tensor * seq)
  if rest:
    fitting = mesh_config.divisors(number)
    raise errors.UserError(
        f"fsdp={fsdp} x tensor={tensor} x seq={seq} must divide the"
        f" {number} devices: their product can be"
        f" {mesh_config.listed(fitting)}."
    )
  return Mesh(np.array(devices).reshape(data, fsdp, tensor, seq), AXES)


def mesh_of(sizes: Sequence[int], devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of all devices of these sizes of data, fsdp, tensor and seq.

  Raises:
    UserError: There are more or fewer devices.
  """
  data, fsdp, tensor, seq = sizes
  mesh = make_mesh(fsdp, tensor, seq, devices)
  if mesh.shape["data"] != data:
    raise errors.UserError(
        f"mesh={mesh_config.text_of(sizes)} is of {math.prod(sizes)} devices,"
        f" and there are {mesh.size}: {mesh.shape['data']} of them would go to"
        " data."
    )
  return mesh


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
  """Splits one axis of an array over data and fsdp, the next over seq."""
  axes: list[Any] = [None] * ndim
  axes[batch_axis] = BATCH_AXES
  if batch_axis + 1 < ndim:
    axes[batch_axis + 1] = "seq"
  return NamedSharding(mesh, P(*axes))


def cache_spec(
    shape: Sequence[int], mesh: AnyMesh, batch_size: int, num_kv_heads: int
) -> P:
  """How an array of a KV cache is split: by sequences, and by key heads.

  Slots are chosen by each key head for itself, so that no device needs to know
  what another one keeps.

  Args:
    shape: Its shape; an array whose first axes are not these is not split.
    mesh: The mesh. What it does not divide is not split.
    batch_size: Sequences.
    num_kv_heads: Key heads of the model.
  """
  place = places(mesh, batch_size, num_kv_heads)
  has_batch = len(shape) > 0 and shape[0] == batch_size
  has_heads = len(shape) > 1 and shape[1] == num_kv_heads
  label = ("b" if has_batch else ".") + ("n" if has_heads else ".")
  return place((label + "." * len(shape))[: len(shape)])


def keep_cache(kv_cache: PyTree, batch_size: int, num_kv_heads: int) -> PyTree:
  """Keeps a cache split as `cache_spec` says, under `jax.set_mesh` of a mesh.

  Else XLA may choose anew in each program, and copy what it could write in
  place.
  """
  mesh = current_mesh()
  if mesh is None:
    return kv_cache
  keep = lambda leaf: jax.lax.with_sharding_constraint(
      leaf, cache_spec(leaf.shape, mesh, batch_size, num_kv_heads)
  )
  return jax.tree.map(keep, kv_cache)


def keep_split(
    next_fun: Callable[..., PyTree],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> PyTree:
  """Keeps the outputs [B, T, D] of modules split by sequences and positions.

  For `nn.intercept_methods`, under `jax.set_mesh` of a mesh of this module: XLA
  may else gather activations where it should gather parameters.
  """
  output = next_fun(*args, **kwargs)
  if context.method_name != "__call__":
    return output
  return jax.tree.map(kept_split, output)


def kept_split(leaf: Array) -> Array:
  """An array [B, T, D], split by sequences and positions under such a mesh.

  Any other one is as it was: of heads and their like XLA knows best.
  """
  mesh = current_mesh()
  if mesh is None or leaf.ndim != 3 or leaf.shape[0] % num_batch_parts(mesh):
    return leaf
  free = P.UNCONSTRAINED
  positions = free if leaf.shape[1] % mesh.shape["seq"] else "seq"
  return jax.lax.with_sharding_constraint(leaf, P(BATCH_AXES, positions, free))


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
  mesh = current_mesh()
  if mesh is None:
    return attend(query, key, value, where, *extra)
  place = places(mesh, len(query), key.shape[2])
  arrays = place("b.n.")
  split = jax.tree.map(lambda _: place("n"), extra)
  in_parts = lambda attend, *places: jax.shard_map(
      attend,
      in_specs=(arrays, arrays, arrays, *places, *split),
      out_specs=arrays,
      # Kernels do not say over which axes of the mesh their outputs vary.
      check_vma=False,
  )
  if is_known(where):  # Tiles can then be left out.
    alike = lambda query, key, value, *extra: attend(
        query, key, value, where, *extra
    )
    return in_parts(alike)(query, key, value, *extra)
  of_where = where_specs(where, place)
  return in_parts(attend, of_where)(query, key, value, where, *extra)


def is_known(where: masks.Mask | selection.Selection) -> bool:
  """Whether it is a mask that is known while tracing, one for all sequences."""
  leaves = jax.tree.leaves(where)
  is_numpy = all(isinstance(leaf, np.ndarray) for leaf in leaves)
  return isinstance(where, masks.Mask) and is_numpy and where.starts.ndim == 2


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
  mesh = current_mesh()
  if mesh is None:
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


def current_mesh() -> AnyMesh | None:
  """The mesh of `jax.set_mesh`, where XLA may split over all of its axes."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if set(AXES) <= set(mesh.auto_axes) else None


def places(
    mesh: AnyMesh, batch_size: int, num_kv_heads: int, splits_seq: bool = False
) -> Callable[[str], P]:
  """Returns how an array of attention lies, by a letter an axis.

  "b" are sequences, "n" heads, "t" positions; "." is any other axis. An axis
  that the mesh does not divide is not split.

  Args:
    mesh: The mesh.
    batch_size: Sequences.
    num_kv_heads: Query heads go with the key head that they share.
    splits_seq: Whether positions are split.
  """
  axes = {
      "b": None if batch_size % num_batch_parts(mesh) else BATCH_AXES,
      "n": None if num_kv_heads % mesh.shape["tensor"] else "tensor",
      "t": "seq" if splits_seq else None,
  }
  return lambda label: P(*(axes.get(letter) for letter in label))


def where_specs(
    where: masks.Mask | selection.Selection, place: Callable[[str], P]
) -> PyTree:
  """How a mask or a selection lies: `place` is that of `places`."""
  if isinstance(where, selection.Selection):
    return _selection_specs(where, place)

  def own(leaf: Any, rank: int) -> P | None:
    # An axis of sequences may be absent; spans have an axis of their own.
    if leaf is None:
      return None
    label = ("b" if len(leaf) > 1 else ".") + "." * (rank - 2) + "t"
    return place(label[rank - leaf.ndim :])

  return masks.Mask(
      own(where.starts, 3),
      own(where.stops, 3),
      own(where.query_ids, 2),
      own(where.key_ids, 2),
  )


def _selection_specs(
    where: selection.Selection, place: Callable[[str], P]
) -> selection.Selection:
  """Splits tables by sequences and heads, unless those share one."""
  rows, columns = where.num_valid.shape[:2]
  own = place(("b" if rows > 1 else ".") + ("n" if columns > 1 else "."))
  mask = where.mask
  return dataclasses.replace(
      where,
      block_table=own,
      num_valid=own,
      mask=None if mask is None else where_specs(mask, place),
  )


def num_batch_parts(mesh: AnyMesh) -> int:
  """How many parts a batch is split into."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
