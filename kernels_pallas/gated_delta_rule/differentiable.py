"""The gated delta rule with its own derivative, on any number of devices."""

import functools
import types

import jax
from jaxtyping import Array, Float

from kernels_pallas import implementations
from kernels_pallas.gated_delta_rule import operands as operands_lib
from kernels_pallas.transformations import derivatives
from kernels_pallas.transformations import manual_axes
from kernels_pallas.transformations import partitions

_OP = "gated_delta_rule"
# Axes of the operands, and of out and the last state.
_ARRAYS = ("b.k.", "b.k.", "b.n.", "b.n.", "b.n", "bn..")
_RESULTS = ("b.n.", "bn..")


def attend(
    implementation: types.ModuleType | operands_lib.Implementation,
    operands: operands_lib.Operands,
    scale: float,
    config: implementations.Config,
) -> operands_lib.Results:
  """The op by `implementation`, forward and backward."""
  call = jax.custom_vjp(_forward, nondiff_argnums=(0, 1, 2))
  call.defvjp(_forward_and_kept, _backward)
  given = (implementation, scale, config, manual_axes.align(operands))
  return derivatives.reverse_only(_OP, call, *given)


def _forward(
    implementation: operands_lib.Implementation,
    scale: float,
    config: implementations.Config,
    operands: operands_lib.Operands,
) -> operands_lib.Results:
  run = functools.partial(implementation.forward, scale=scale, config=config)
  labels = partitions.Labels.of((_ARRAYS,), _RESULTS)
  return derivatives.run(_OP, implementation, run, operands, labels=labels)


def _forward_and_kept(
    implementation: operands_lib.Implementation,
    scale: float,
    config: implementations.Config,
    operands: operands_lib.Operands,
) -> tuple[operands_lib.Results, operands_lib.Operands]:
  return _forward(implementation, scale, config, operands), operands


def _backward(
    implementation: operands_lib.Implementation,
    scale: float,
    config: implementations.Config,
    operands: operands_lib.Operands,
    cotangents: operands_lib.Results,
) -> tuple[operands_lib.Operands]:
  def run(
      operands: operands_lib.Operands, cotangents: operands_lib.Results
  ) -> operands_lib.Operands:
    found = implementation.backward(operands, cotangents, scale, config)
    return found._replace(
        query=_sum_groups(found.query, operands.query),
        key=_sum_groups(found.key, operands.key),
    )

  labels = partitions.Labels.of((_ARRAYS, _RESULTS), _ARRAYS)
  arguments = (operands, cotangents)
  return (derivatives.run(_OP, implementation, run, *arguments, labels=labels),)


def _sum_groups(
    x: Float[Array, "B T N H"], like: Float[Array, "B T K H"]
) -> Float[Array, "B T K H"]:
  """Adds up the value heads that share a key head."""
  batch, length, num_key_heads, size = like.shape
  grouped = x.reshape(batch, length, num_key_heads, -1, size)
  return grouped.sum(axis=3).astype(like.dtype)
