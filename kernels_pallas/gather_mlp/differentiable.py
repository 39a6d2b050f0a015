"""A gathered MLP with a backward pass of its own.

An implementation is a module with two functions:

  forward(given, spec) -> y [B, D], in the type of the sums
  backward(given, d_out, spec) -> d_x, in the type of the sums, and
      the cotangents of the weights, 0 where no sequence chose a block

Nothing but the arguments is kept for the backward pass: it reads each block
once, and what the neurons were is made from that again.
"""

import types

import jax
from jaxtyping import Array, Float

from kernels_pallas.gather_mlp import parts
from kernels_pallas.transformations import derivatives
from kernels_pallas.transformations import manual_axes

_Kept = tuple[jax.Array, parts.Weights, parts.Plan]


def apply(
    implementation: types.ModuleType,
    x: Float[Array, "B D"],
    weights: parts.Weights,
    plan: parts.Plan,
    spec: parts.Spec,
) -> Float[Array, "B D"]:
  """The op by `implementation`, in the type of the sums."""
  if not hasattr(implementation, "backward"):
    return implementation.forward(parts.Given(x, weights, plan), spec)
  x, weights, plan = manual_axes.align((x, weights, plan))
  call = jax.custom_vjp(_forward, nondiff_argnums=(0, 1))
  call.defvjp(_forward_and_kept, _backward)
  given = (implementation, spec, x, weights, plan)
  return derivatives.reverse_only("gather_mlp", call, *given)


def _forward(
    implementation: types.ModuleType,
    spec: parts.Spec,
    x: jax.Array,
    weights: parts.Weights,
    plan: parts.Plan,
) -> jax.Array:
  run = lambda *given: implementation.forward(parts.Given(*given), spec)
  return derivatives.run(
      "gather_mlp", implementation, run, x, weights, plan, is_by_jax=False
  )


def _forward_and_kept(
    implementation: types.ModuleType,
    spec: parts.Spec,
    x: jax.Array,
    weights: parts.Weights,
    plan: parts.Plan,
) -> tuple[jax.Array, _Kept]:
  kept = (x, weights, plan)
  return _forward(implementation, spec, *kept), kept


def _backward(
    implementation: types.ModuleType,
    spec: parts.Spec,
    kept: _Kept,
    d_out: jax.Array,
) -> tuple[jax.Array, parts.Weights, None]:
  x, weights, _ = kept
  back = lambda kept, d_out: implementation.backward(
      parts.Given(*kept), d_out, spec
  )
  d_x, d_weights = derivatives.run(
      "gather_mlp", implementation, back, kept, d_out, is_by_jax=False
  )
  # Sums are wide; cotangents have the type of what they belong to.
  d_weights = jax.tree.map(lambda d, w: d.astype(w.dtype), d_weights, weights)
  return d_x.astype(x.dtype), d_weights, None
