"""Joins the forward and the backward of an implementation into one function.

An implementation of attention is a module with two functions:

  forward(inputs, spec) -> AttentionOutput with lse, and col_mass per query
      head if spec asks
  backward(saved, spec) -> cotangents of query, key and value

With P = exp(logits - lse), dP = d_out value^T and delta = rowsum(d_out * out)
- d_lse, the gradient by the logits is P * (dP - delta): the cotangent of lse
costs nothing. A sink is a key whose value is 0, so dP = 0 there.

`where` is a Mask, a Selection or None. `col_mass` is a measurement: no gradient
flows through it.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas import selection as selection_lib

Where = masks.Mask | selection_lib.Selection | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
  """What is known of an attention while it is traced.

  Attributes:
    scale: Factor of the logits.
    logits_soft_cap: c in c tanh(scale q k / c), before the mask; None is off.
    return_col_mass: Whether `forward` sums the weights that each key gets.
    is_out_wide: Whether `forward` should not round `out` to the query's type,
      if it can choose.
    config: Tile sizes of the implementation, None for its own choice.
  """

  scale: float
  logits_soft_cap: float | None = None
  return_col_mass: bool = False
  is_out_wide: bool = False
  config: Any = None


class Inputs(NamedTuple):
  """What the forward pass reads.

  Attributes:
    query: Any float type.
    key: K divides N.
    value: As key.
    where: What may be attended to; None is every key.
    sink_logits: A logit a head that has no value, or None.
    row_weights: Weight of each query in `col_mass`; None is 1.
  """

  query: Float[Array, "B T N H"]
  key: Float[Array, "B S K H"]
  value: Float[Array, "B S K H"]
  where: Where
  sink_logits: Float[Array, "N"] | None
  row_weights: Float[Array, "B N T"] | None


class Saved(NamedTuple):
  """What the backward pass reads.

  Attributes:
    query: As in the forward pass.
    key: As in the forward pass.
    value: As in the forward pass.
    where: As in the forward pass.
    lse: Log of the softmax denominators.
    delta: rowsum(d_out * out) - d_lse.
    d_out: Cotangent of out.
  """

  query: Float[Array, "B T N H"]
  key: Float[Array, "B S K H"]
  value: Float[Array, "B S K H"]
  where: Where
  lse: Float[Array, "B N T"]
  delta: Float[Array, "B N T"]
  d_out: Float[Array, "B T N H"]


Cotangents = tuple[
    Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]
]


class Attention(Protocol):
  """An implementation; see the module's docstring."""

  def forward(
      self, inputs: Inputs, spec: AttentionSpec
  ) -> output.AttentionOutput:
    """Returns out and lse, and col_mass if `spec` asks."""
    ...

  def backward(self, saved: Saved, spec: AttentionSpec) -> Cotangents:
    """Returns the cotangents of query, key and value."""
    ...


def attend(
    implementation: Any, inputs: Inputs, spec: AttentionSpec
) -> output.AttentionOutput:
  """Attention by `implementation`, with its own backward pass.

  A `where` that is known while tracing (NumPy leaves) stays known inside.
  `row_weights` broadcasts to [B, N, T]. An implementation without `backward`
  is differentiated by jax.
  """
  query, key, value, where, sink_logits, row_weights = inputs
  if row_weights is not None:
    batch, num_queries, num_heads = query.shape[:3]
    shape = (batch, num_heads, num_queries)
    row_weights = jax.lax.stop_gradient(jnp.broadcast_to(row_weights, shape))
  if not hasattr(implementation, "backward"):
    return implementation.forward(
        inputs._replace(row_weights=row_weights), spec
    )
  # Arrays that are traced must go through custom_vjp as arguments; those that
  # are known must not, or kernels could not plan by them.
  is_known = not any(
      isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(where)
  )
  known, traced = (where, None) if is_known else (None, where)

  # The gradient by a sink adds up all rows' delta, and their rounding.
  is_wide = sink_logits is not None
  wide_spec = dataclasses.replace(spec, is_out_wide=is_wide)

  @jax.custom_vjp
  def call(query, key, value, sink_logits, row_weights, traced):
    place = known if is_known else traced
    return implementation.forward(
        Inputs(query, key, value, place, sink_logits, row_weights), spec
    )

  def forward(query, key, value, sink_logits, row_weights, traced):
    place = known if is_known else traced
    result = implementation.forward(
        Inputs(query, key, value, place, sink_logits, row_weights), wide_spec
    )
    kept = (query, key, value, sink_logits, traced, result.out, result.lse)
    return result._replace(out=result.out.astype(query.dtype)), kept

  def backward(kept, cotangents):
    query, key, value, sink_logits, traced, out, lse = kept
    d_out, d_lse = cotangents.out, cotangents.lse
    # TPUs would round float32 to bfloat16 first.
    delta = jnp.einsum(
        "BTNH,BTNH->BNT",
        d_out.astype(out.dtype),
        out,
        preferred_element_type=lse.dtype,
        precision="highest",
    )
    # d_lse adds P d_lse to the cotangent of the logits, as -delta does.
    delta = delta - d_lse
    place = known if is_known else traced
    d_query, d_key, d_value = implementation.backward(
        Saved(query, key, value, place, lse, delta, d_out), spec
    )
    d_sink = None
    if sink_logits is not None:
      sink = sink_logits.astype(lse.dtype)[None, :, None]
      # A sink of -inf is none: rows without it and without keys have no lse.
      weight = jnp.exp(sink - jnp.where(jnp.isneginf(lse), 0.0, lse))
      d_sink = -(weight * delta).sum(axis=(0, 2)).astype(sink_logits.dtype)
    return d_query, d_key, d_value, d_sink, None, None

  call.defvjp(forward, backward)
  return call(query, key, value, sink_logits, row_weights, traced)
