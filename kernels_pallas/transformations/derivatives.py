"""What a kernel cannot be differentiated by is said in one sentence.

Ops have a derivative of their own, in reverse mode and once. jax differentiates
XLA's implementations a second time; kernels it cannot.
"""

from collections.abc import Callable
import functools
import types
from typing import Any, TypeVar

import jax
from jax.extend import core
from jax.interpreters import ad
from jax.interpreters import batching
from jax.interpreters import mlir
import numpy as np

from kernels_pallas.transformations import manual_axes
from kernels_pallas.transformations import partitions

_ResultT = TypeVar("_ResultT")

_KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
_KERNELS |= {name: name for name in _KERNELS.values()}


def run(
    op: str,
    implementation: types.ModuleType | object,
    function: Callable[..., _ResultT],
    *args: Any,
    is_by_jax: bool = True,
    labels: partitions.Labels | None = None,
) -> _ResultT:
  """function(*args), also inside `shard_map`, see `manual_axes.isolated`.

  Args:
    op: Its name, for the error.
    implementation: The module that `function` calls. Where it is one of
      kernels, the derivative of this call is refused.
    function: Of arrays and trees of them.
    *args: All become traced, if anything is.
    is_by_jax: Whether jax can differentiate `function` where it is XLA's: a
      loop whose length is known when it runs it cannot.
    labels: How a program of several devices may split it, see `partitions`.
  """
  kernel = _kernel_of(implementation)
  if kernel is None and is_by_jax and not manual_axes.are_varying(args):
    return manual_axes.isolated(function, *args, labels=labels)

  by = f"implementation={kernel or 'xla'!r}"
  reason = (
      f"{op} has no such derivative by {by}, for these arguments only a"
      " gradient of first order, if any; use implementation='reference'"
  )

  @jax.custom_jvp
  def call(*args: Any) -> _ResultT:
    if kernel is not None or not is_by_jax:
      args = jax.tree.map(functools.partial(_guard, reason), args)
    if kernel is None:
      return manual_axes.isolated(function, *args, labels=labels)
    # Chips have no 64-bit types: with jax_enable_x64 each Python number of a
    # kernel would be one.
    args = jax.tree.map(_narrow, args)
    options = {"is_narrow": True, "labels": labels}
    return manual_axes.isolated(function, *args, **options)

  @call.defjvp
  def refuse(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise ValueError(reason)

  return call(*args)


def reverse_only(
    op: str, call: Callable[..., _ResultT], *args: Any
) -> _ResultT:
  """call(*args) of a `jax.custom_vjp`.

  Raises:
    ValueError: In forward mode.
  """
  try:
    return call(*args)
  except TypeError as error:
    if "forward-mode" not in str(error):
      raise
    raise ValueError(
        f"{op} has no derivative in forward mode (jvp, jacfwd, linearize);"
        " use reverse mode (vjp, grad), or implementation='reference'"
    ) from error


def _guard(reason: str, array: jax.Array) -> jax.Array:
  """The same array, which has no derivative.

  Where a loop is differentiated twice jax forgets the rule of what is called.
  """
  is_float = jax.numpy.issubdtype(array.dtype, jax.numpy.floating)
  return _guarded.bind(array, reason=reason) if is_float else array


def _refuse(primals: Any, tangents: Any, *, reason: str) -> Any:
  del primals, tangents
  raise ValueError(reason)


def _batch(args: Any, axes: Any, **reason: str) -> tuple[Any, Any]:
  return _guarded.bind(*args, **reason), axes[0]


def _narrow(array: jax.Array) -> jax.Array:
  """int32 for int64; kernels refuse wide floats themselves."""
  is_wide = array.dtype in (np.int64, np.uint64)
  return array.astype(np.int32) if is_wide else array


def _kernel_of(implementation: types.ModuleType | object) -> str | None:
  """The implementation's name, if it is one of kernels."""
  parts = getattr(implementation, "__name__", "").split(".")
  found = [_KERNELS[part] for part in parts if part in _KERNELS]
  return found[0] if found else None


_guarded = core.Primitive("has_no_derivative")
_guarded.def_abstract_eval(lambda x, **reason: x)
_guarded.def_impl(lambda x, **reason: x)
mlir.register_lowering(_guarded, lambda ctx, x, **reason: [x])
batching.primitive_batchers[_guarded] = _batch
ad.primitive_jvps[_guarded] = _refuse
