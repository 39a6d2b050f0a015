"""Ops inside `jax.shard_map` as jax has it by default, with `check_vma=True`.

There each array says over which axes of the mesh it differs ("varies"), and
loops want their carry to say the same before and after. An op of this package
communicates with no other device: it is traced as if there were no such axes,
and all of its results vary over all axes that an argument varies over.
"""

from collections.abc import Callable, Iterator
import contextlib
from typing import Any, TypeVar

import jax
from jax.extend import core
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad
from jax.interpreters import batching
from jax.interpreters import mlir
import numpy as np

from kernels_pallas.transformations import partitions

_TreeT = TypeVar("_TreeT")


def struct(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.ShapeDtypeStruct:
  """A result of a kernel, which is `isolated` and so varies over no axis."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=_none())


def align(tree: _TreeT) -> _TreeT:
  """Lets all of jax's arrays vary over what one of them varies over.

  Its derivative adds up what the devices found of an array that they share.
  NumPy arrays, which are known while tracing, stay as they are.
  """
  axes = _axes(jax.tree.leaves(tree))

  def spread(leaf: Any) -> Any:
    missing = axes - _axes([leaf])
    if not missing or not isinstance(leaf, jax.Array):
      return leaf
    return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying")

  return jax.tree.map(spread, tree) if axes else tree


def are_varying(tree: Any) -> bool:
  """Whether any array differs between devices of a manual axis."""
  return bool(_axes(jax.tree.leaves(tree)))


def isolated(
    function: Callable[..., _TreeT],
    *args: Any,
    is_narrow: bool = False,
    labels: partitions.Labels | None = None,
) -> _TreeT:
  """function(*args), traced as if outside of `shard_map`.

  Args:
    function: Of arrays and trees of them; calls no collectives. Without manual
      axes it is called as it is. It is not differentiated: who calls has its
      own rule.
    *args: From `align`.
    is_narrow: Whether it is traced and compiled as without `jax_enable_x64`.
      No argument may have a 64-bit type that it uses.
    labels: How a program of several devices may split it, see `partitions`.

  Raises:
    ValueError: If arrays are sharded over explicit axes of a mesh, or a kernel
      is called where there are any.
  """
  leaves, tree = jax.tree.flatten(align(args))
  _check_explicit(leaves, is_kernel=is_narrow)
  is_narrow = is_narrow and jax.config.read("jax_enable_x64")
  if _axes(leaves) or not partitions.are_possible():
    labels = None
  if not _axes(leaves) and not is_narrow and labels is None:
    return function(*args)
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
  flat = lambda *leaves: function(*jax.tree.unflatten(tree, leaves))
  with _numbers(is_narrow):
    jaxpr, shape = jax.make_jaxpr(flat, return_shape=True)(*shapes)
  arrays = align([jax.numpy.asarray(x) for x in leaves])
  split = None
  if labels is not None:

    def own(*leaves: jax.Array) -> list[Any]:
      with _numbers(is_narrow):
        return jax.tree.leaves(flat(*leaves))

    options = {"of": jaxpr, "is_narrow": is_narrow, "split": None}
    whole = lambda *leaves: _call.bind(*leaves, **options)
    # Traced here: jax looks for such a call before it lowers a program.
    call = lambda *leaves: partitions.call(own, whole, labels, *leaves)
    split = jax.make_jaxpr(call)(*shapes)
  results = _call.bind(*arrays, of=jaxpr, is_narrow=is_narrow, split=split)
  return jax.tree.unflatten(jax.tree.structure(shape), results)


def _check_explicit(leaves: list[Any], is_kernel: bool) -> None:
  """Refuses what would fail deep in jax, see `isolated`."""
  kinds = [jax.typeof(x).sharding for x in leaves if isinstance(x, jax.Array)]
  used = {name for kind in kinds for name in _names(kind.spec)}
  meshes = [kind.mesh for kind in kinds]
  if is_kernel:
    meshes.append(jax.sharding.get_abstract_mesh())
  explicit = {
      name
      for mesh in meshes
      for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
      if kind == jax.sharding.AxisType.Explicit and (is_kernel or name in used)
  }
  if explicit:
    raise ValueError(
        f"the mesh has explicit axes ({', '.join(sorted(map(str, explicit)))}),"
        " over which this op cannot be split; make it with axis_types=(jax."
        "sharding.AxisType.Auto,) for each axis, or call the op in"
        " jax.shard_map"
    )


def _names(spec: jax.P) -> Iterator[Any]:
  """Mesh axes that an array is sharded over."""
  for names in spec:
    yield from names if isinstance(names, tuple) else (names,)


def _numbers(is_narrow: bool) -> contextlib.AbstractContextManager[Any]:
  return jax.enable_x64(False) if is_narrow else contextlib.nullcontext()


def _axes(leaves: list[Any]) -> frozenset[Any]:
  """The axes that an array of them varies over."""
  arrays = (leaf for leaf in leaves if isinstance(leaf, jax.Array))
  none = frozenset()
  return none.union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def _none() -> Any:
  """The type of what varies over no axis, which jax has no public name for."""
  return jax.typeof(np.int32(0)).manual_axis_type


def _results(*args: Any, of: core.ClosedJaxpr, **options: Any) -> list[Any]:
  del options
  axes, mesh = args[0].manual_axis_type, args[0].sharding.mesh
  # Kernels may have said nothing of a mesh.
  whole = lambda aval: jax.sharding.NamedSharding(
      mesh, jax.P(*[None] * aval.ndim)
  )
  return [
      aval.update(manual_axis_type=axes, sharding=whole(aval))
      for aval in of.out_avals
  ]


def _lower(
    ctx: Any, *args: Any, of: core.ClosedJaxpr, is_narrow: bool, split: Any
) -> Any:
  without = lambda avals: [x.update(manual_axis_type=_none()) for x in avals]
  ctx = ctx.replace(
      avals_in=without(ctx.avals_in), avals_out=without(ctx.avals_out)
  )
  if is_narrow and ctx.dim_var_values:
    # What was lowered for symbolic sizes of 64 bits is not for those of 32.
    ctx = ctx.replace(
        dim_var_values=[_int32(x) for x in ctx.dim_var_values],
        module_context=ctx.module_context.replace(lowering_cache={}),
    )
  call = core.jaxpr_as_fun(split or of)
  with _numbers(is_narrow):
    return mlir.lower_fun(call, multiple_results=True)(ctx, *args)


def _int32(size: ir.Value) -> ir.Value:
  """A symbolic size, which has 64 bits with jax_enable_x64, as without."""
  kind = ir.RankedTensorType.get([], ir.IntegerType.get_signless(32))
  return stablehlo.convert(kind, size)


def _batch(
    args: Any,
    axes: Any,
    *,
    of: core.ClosedJaxpr,
    is_narrow: bool,
    split: Any,
) -> Any:
  del split  # Of arrays with one axis less.
  several = jax.vmap(core.jaxpr_as_fun(of), axes)
  results = isolated(several, *args, is_narrow=is_narrow)
  return results, [0] * len(results)


def _differentiate(
    primals: Any, tangents: Any, *, of: core.ClosedJaxpr, **options: Any
) -> Any:
  """By jax: only XLA's implementations come here, see `derivatives.run`."""
  del options
  tangents = [ad.instantiate_zeros(x) for x in tangents]
  return jax.jvp(core.jaxpr_as_fun(of), list(primals), tangents)


_call = core.Primitive("isolated")
_call.multiple_results = True
# jax 0.12 translates parts of its programs before it compiles them: it does so
# where `_lower` traces them once more.
_call.is_high = lambda *_, **__: False
_call.def_abstract_eval(_results)
_call.def_impl(
    lambda *args, **of: jax.jit(lambda *x: _call.bind(*x, **of))(*args)
)
mlir.register_lowering(_call, _lower)
batching.primitive_batchers[_call] = _batch
ad.primitive_jvps[_call] = _differentiate
