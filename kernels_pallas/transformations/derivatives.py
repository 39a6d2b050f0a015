"""What a kernel cannot be differentiated by is said in one sentence.

Ops have a derivative of their own, in reverse mode and once. jax differentiates
XLA's implementations a second time; kernels it cannot.
"""

from collections.abc import Callable
import types
from typing import Any, TypeVar

import jax
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

  @jax.custom_jvp
  def call(*args: Any) -> _ResultT:
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
    by = f"implementation={kernel or 'xla'!r}"
    raise ValueError(
        f"{op} has no such derivative by {by}, for these arguments only a"
        " gradient of first order, if any; use implementation='reference'"
    )

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


def _narrow(array: jax.Array) -> jax.Array:
  """int32 for int64; kernels refuse wide floats themselves."""
  is_wide = array.dtype in (np.int64, np.uint64)
  return array.astype(np.int32) if is_wide else array


def _kernel_of(implementation: types.ModuleType | object) -> str | None:
  """The implementation's name, if it is one of kernels."""
  parts = getattr(implementation, "__name__", "").split(".")
  found = [_KERNELS[part] for part in parts if part in _KERNELS]
  return found[0] if found else None
