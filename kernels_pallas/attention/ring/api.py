"""Attention of a text whose positions lie on several devices.

Context parallelism by ring attention (https://arxiv.org/abs/2310.01889): each
device keeps its queries while keys and values go round. It is the op of
`attention.api`, value and gradient, in memory that does not grow with the text
of other devices but for the mask's few integers.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import arguments
from kernels_pallas import implementations
from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas.attention import api
from kernels_pallas.attention import differentiable
from kernels_pallas.attention.ring import order
from kernels_pallas.attention.ring import passes
from kernels_pallas.transformations import derivatives
from kernels_pallas.transformations import manual_axes


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    ring: order.Ring,
    where: differentiable.Where = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[Array, "N"] | None = None,
    row_weights: Float[Array, "#B #N #T"] | None = None,
    return_lse: bool = False,
    return_col_mass: bool = False,
    col_mass_heads: Literal["query", "kv"] = "query",
    implementation: implementations.Implementation | None = None,
    config: implementations.Config = None,
) -> output.AttentionOutput:
  """Attends to the keys of all devices; inside `jax.shard_map` only.

  Each device gives, and gets back, its part of the positions: of D parts of a
  text the one of its number. What is not said here is as in `api.attention`.

  Args:
    query: This device's.
    key: This device's.
    value: This device's, of the size of the keys' heads.
    ring: From `order.plan`, of the whole text's mask.
    where: Rows of this device's queries, and ids of its keys. Spans count keys
      from the beginning of the whole text. None allows every key, and a
      selection is refused.
    scale: Factor of the logits; None is H ** -0.5.
    logits_soft_cap: As there.
    sink_logits: As there.
    row_weights: Of this device's queries.
    return_lse: As there.
    return_col_mass: As there, summed over the queries of all devices. Costs a
      second way round, with half the products of the first.
    col_mass_heads: As there.
    implementation: As there, but for `reference`.
    config: As there.

  Raises:
    ValueError: As there, or if a part has no two halves where the ring is
      balanced.
  """
  arguments.check_arrays(query, key, value)
  arguments.check_where(where, query, key)
  arguments.check_options(
      query, scale, logits_soft_cap, sink_logits, row_weights, return_col_mass
  )
  _check(query, key, where, ring)
  if where is None:
    where = masks.full(query.shape[1], key.shape[1] * ring.num_devices)
  chosen = implementations.choose_for(
      implementation, api.module_of, query, where
  )
  if chosen == "reference":
    raise ValueError(
        "implementation='reference' knows no ring; it must be xla, a kernel of"
        " the platform, or None"
    )
  arguments.check_config(config, chosen, api.module_of(chosen))
  spec = differentiable.AttentionSpec(
      scale=query.shape[-1] ** -0.5 if scale is None else scale,
      logits_soft_cap=logits_soft_cap,
      return_col_mass=return_col_mass,
      config=config,
  )
  if row_weights is not None:
    shape = query.shape[0], query.shape[2], query.shape[1]
    row_weights = jnp.broadcast_to(row_weights, shape)
    row_weights = jax.lax.stop_gradient(row_weights)
  inputs = differentiable.Inputs(
      query, key, value, where, sink_logits, row_weights
  )
  inputs = _enter(ring, manual_axes.align(inputs))
  result: Any = _attend(api.module_of(chosen), inputs, ring, spec)
  result = output.AttentionOutput(
      ring.leave(result.out, 1),
      ring.leave(result.lse, 2),
      None if result.col_mass is None else ring.leave(result.col_mass, 2),
  )
  return output.finish(result, key.shape[2], return_lse, col_mass_heads)


def _check(
    query: jax.Array, key: jax.Array, where: Any, ring: order.Ring
) -> None:
  """Raises ValueError unless parts can be cut into the ring's pieces."""
  if where is not None and not isinstance(where, masks.Mask):
    raise ValueError(
        f"where is a {type(where).__name__}; on a ring it must be a"
        " kernels_pallas.masks.Mask or None"
    )
  for name, array in (("queries", query), ("keys", key)):
    if array.shape[1] % ring.num_pieces:
      raise ValueError(
          f"a device has {array.shape[1]} {name}; a balanced ring wants two"
          " halves of them: pad the text to a multiple of"
          f" {ring.multiple} positions"
      )


def _enter(
    ring: order.Ring, inputs: differentiable.Inputs
) -> differentiable.Inputs:
  """Puts all that has positions into the order of the ring."""
  where: Any = inputs.where
  last = lambda x: (
      None if x is None else ring.enter(jnp.asarray(x), x.ndim - 1)
  )
  weights = inputs.row_weights
  return inputs._replace(
      query=ring.enter(inputs.query, 1),
      key=ring.enter(inputs.key, 1),
      value=ring.enter(inputs.value, 1),
      where=masks.Mask(
          last(where.starts),
          last(where.stops),
          last(where.query_ids),
          last(where.key_ids),
      ),
      row_weights=None if weights is None else ring.enter(weights, 2),
  )


def _attend(
    module: Any,
    inputs: differentiable.Inputs,
    ring: order.Ring,
    spec: differentiable.AttentionSpec,
) -> output.AttentionOutput:
  """Attention in the ring's order, with its backward pass."""

  @jax.custom_vjp
  def call(given: differentiable.Inputs) -> output.AttentionOutput:
    return forward(given)[0]

  def forward(
      given: differentiable.Inputs,
  ) -> tuple[output.AttentionOutput, tuple[Any, ...]]:
    made: Any = passes.forward(module, given, ring, spec)
    sums = None
    if spec.return_col_mass:
      sums = passes.col_mass(module, given, made.lse, ring, spec)
    out = made.out.astype(given.query.dtype)
    # The gradient by a sink adds up all rows, and their rounding.
    kept = out if given.sink_logits is None else made.out
    given = given._replace(row_weights=None)
    return output.AttentionOutput(out, made.lse, sums), (given, kept, made.lse)

  def backward(
      kept: tuple[Any, ...], cotangents: tuple[Any, ...]
  ) -> tuple[differentiable.Inputs]:
    given, out, lse = kept
    d_out, d_lse, _ = cotangents
    delta = differentiable.row_deltas(d_out, out, d_lse)
    query, key, value, where, *_ = given
    saved = differentiable.Saved(query, key, value, where, lse, delta, d_out)
    found = passes.backward(module, saved, ring, spec)
    query, key, value = (x.astype(query.dtype) for x in found)
    d_sink = None
    if given.sink_logits is not None:
      d_sink = differentiable.sink_cotangent(given.sink_logits, lse, delta)
    return (differentiable.Inputs(query, key, value, None, d_sink, None),)

  call.defvjp(forward, backward)
  return derivatives.reverse_only("attention", call, inputs)
