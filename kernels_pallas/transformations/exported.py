"""Programs of `jax.export`: for a platform that is not here, of any batch.

An op chooses and plans its kernel while it is traced, for the platform that is
then known: jax's default one, or that of `hardware.described`. What it is
lowered for, jax says only afterwards. So a choice leaves a mark in the program,
which refuses to be lowered for a platform where another one is right.

The batch may be symbolic (`jax.export.symbolic_shape`): it is an axis of the
grid. What is planned by it is planned as if it were known not to be small.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.experimental import pallas as pl
from jax.extend import core
from jax.interpreters import ad
from jax.interpreters import batching
from jax.interpreters import mlir

from kernels_pallas import implementations
from kernels_pallas.hardware import described

_ResultT = TypeVar("_ResultT")

# A chip of each platform that has kernels; which one does not matter for what
# is right there.
_CHIP_OF = {"tpu": "v5e", "gpu": "h100"}


def is_known(size: Any) -> bool:
  """Whether a size is a number, not one of `jax.export.symbolic_shape`."""
  return not jax.export.is_symbolic_dim(size)


def known(size: Any, instead: int) -> int:
  """A size, or what to plan by where it is symbolic."""
  return size if is_known(size) else instead


def abstract(tree: _ResultT) -> _ResultT:
  """Shapes and types of jax's arrays in a tree, of which a program may remain.

  NumPy arrays, which are known while tracing, stay as they are.
  """
  return jax.tree.map(
      lambda x: (
          jax.ShapeDtypeStruct(x.shape, x.dtype)
          if isinstance(x, jax.Array)
          else x
      ),
      tree,
  )


def estimate(**work: Any) -> pl.CostEstimate | None:
  """What XLA is told of a kernel; nothing where the batch is symbolic."""
  if not all(map(is_known, work.values())):
    return None
  return pl.CostEstimate(**work)


def chosen(
    op: str,
    implementation: implementations.Implementation | None,
    choose: Callable[..., implementations.Implementation],
    first: tuple[str, jax.Array],
    *rest: tuple[str, jax.Array],
) -> tuple[implementations.Implementation, jax.Array]:
  """The implementation of a call, and its first array, marked, see `marked`.

  Args:
    op: Its name, for errors.
    implementation: What the user asked for.
    choose: The choice, of what was asked for or of nothing.
    first: An array with the letters of its axes, see `check_axes`.
    *rest: More of them.

  Raises:
    ValueError: If an axis is symbolic that cannot be.
  """
  found = choose(implementation)
  if found == "reference":
    return found, first[1]
  for axes, array in (first, *rest):
    check_axes(op, axes, array, found)
  return found, marked(op, first[1], implementation, choose)


def check_axes(
    op: str,
    axes: str,
    array: Any,
    implementation: implementations.Implementation,
) -> None:
  """Raises ValueError if an axis is symbolic that cannot be.

  Args:
    op: Its name.
    axes: A letter an axis; "B" and "R", rows of the batch, may be symbolic.
    array: Whose axes they are.
    implementation: Which was chosen.
  """
  for axis, size in zip(axes, array.shape, strict=True):
    if not is_known(size) and axis not in "BR":
      raise ValueError(
          f"{op} has an axis {axis} of the symbolic size {size}; of an exported"
          " program only the batch may be symbolic: export it once for each"
          f" {axis}, or use implementation='reference'"
      )
  if implementation == "pallas_gpu":
    check_batch(op, array)


def check_batch(op: str, array: Any) -> None:
  """Raises ValueError if the batch is symbolic, of a kernel that cannot be so.

  Mosaic GPU has no grid of unknown size, and a TPU no array of unknown size
  that stays in HBM, such as a cache that is written in place.
  """
  if not is_known(array.shape[0]):
    raise ValueError(
        f"{op} by kernels needs a batch that is known, not the symbolic size"
        f" {array.shape[0]}: export it once for each batch, or use"
        " implementation='xla'"
    )


def by_sequence(function: Callable[[Any], _ResultT], tree: Any) -> _ResultT:
  """function(tree), of one sequence after the other.

  Args:
    function: Of arrays whose batch is 1, and so are those of its result.
    tree: Of arrays; those whose first axis is symbolic have a batch.
  """
  leaves, shape = jax.tree.flatten(tree)
  own = [leaf for leaf in leaves if not is_known((*leaf.shape, 1)[0])]

  def visit(one: list[jax.Array]) -> _ResultT:
    rest = iter(one)
    found = [
        leaf if is_known((*leaf.shape, 1)[0]) else next(rest)[None]
        for leaf in leaves
    ]
    result = function(jax.tree.unflatten(shape, found))
    return jax.tree.map(lambda x: x[0], result)

  return jax.lax.map(visit, own)


def marked(
    op: str,
    x: jax.Array,
    implementation: implementations.Implementation | None,
    choose: Callable[[], implementations.Implementation],
) -> jax.Array:
  """An array that cannot be lowered where `choose` would choose another.

  Args:
    op: Its name, for the error.
    x: Any argument of the op.
    implementation: What the user asked for: a named one is right everywhere.
    choose: The choice for the platform that programs are traced for.
  """
  if implementation is not None:
    return x
  platform = implementations.current_platform()
  return _mark.bind(x, op=op, platform=platform, choose=choose)


def _check(
    op: str,
    traced_for: str,
    lowered_for: str,
    choose: Callable[[], implementations.Implementation],
) -> None:
  """Raises ValueError if what was traced is not what is right there."""
  # Within `traced_for` the context may be another one by now.
  chosen = _chosen(traced_for, choose)
  right = _chosen(lowered_for, choose)
  if chosen == right:
    return
  chip = _CHIP_OF.get(lowered_for)
  within = (
      f"within kernels_pallas.hardware.described.traced_for({chip!r})"
      if chip
      else "outside of kernels_pallas.hardware.described.traced_for"
  )
  raise ValueError(
      f"{op} was traced for {traced_for}, by {chosen!r}, but the program is"
      f" lowered for {lowered_for}, where {right!r} is right: trace it"
      f" {within}, or ask for implementation={chosen!r}"
  )


def _chosen(
    platform: str, choose: Callable[[], implementations.Implementation]
) -> implementations.Implementation:
  chip = _CHIP_OF.get(platform)
  if chip is None:
    return "xla"
  with described.traced_for(chip):
    return choose()


def _lower(
    ctx: Any, x: Any, *, op: str, platform: str, choose: Callable[[], Any]
) -> list[Any]:
  for lowered_for in ctx.module_context.platforms:
    name = {"cuda": "gpu", "rocm": "gpu"}.get(lowered_for, lowered_for)
    if name != platform:
      _check(op, platform, name, choose)
  return [x]


def _batch(args: Any, axes: Any, **options: Any) -> tuple[Any, Any]:
  return _mark.bind(*args, **options), axes[0]


def _differentiate(primals: Any, tangents: Any, **options: Any) -> Any:
  return _mark.bind(*primals, **options), tangents[0]


_mark = core.Primitive("kernels_for")
_mark.def_abstract_eval(lambda x, **options: x)
_mark.def_impl(lambda x, **options: x)
mlir.register_lowering(_mark, _lower)
batching.primitive_batchers[_mark] = _batch
ad.primitive_jvps[_mark] = _differentiate
