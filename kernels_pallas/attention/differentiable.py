"""Joins the forward and the backward of an implementation into one function.

An implementation of attention is a module with two functions:

  forward(inputs, spec) -> AttentionOutput with lse, and col_mass per query
      head if spec asks
  backward(saved, spec) -> cotangents of query, key and value

and, if it has a way of its own, row_products(d_out, out) -> their sums over the
head size, in the type of lse.

With P = exp(logits - lse), dP = d_out value^T and delta = rowsum(d_out * out)
- d_lse, the gradient by the logits is P * (dP - delta): the cotangent of lse
costs nothing. A sink is a key whose value is 0, so dP = 0 there.

`where` is a Mask, a Selection or None. `col_mass` is a measurement: no gradient
flows through it.
"""

import dataclasses
import functools
import types
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import implementations
from kernels_pallas import masks
from kernels_pallas import output
from kernels_pallas import selection as selection_lib
from kernels_pallas.transformations import derivatives
from kernels_pallas.transformations import manual_axes
from kernels_pallas.transformations import partitions

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
  config: implementations.Config = None


class Inputs(NamedTuple):
  """What the forward pass reads.

  Attributes:
    query: Any float type.
    key: K divides N.
    value: As key.
    where: What may be attended to; None is every key. Inside of a derivative
      only its traced arrays, the others stay as they are known.
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

_WithWhere = TypeVar("_WithWhere", Inputs, Saved)
# What the forward pass gives the backward one: its inputs, out and lse.
_Kept = tuple[Inputs, jax.Array, jax.Array]


@runtime_checkable
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
    implementation: types.ModuleType | Attention,
    inputs: Inputs,
    spec: AttentionSpec,
) -> output.AttentionOutput:
  """Attention by `implementation`, with its own backward pass.

  A `where` that is known while tracing (NumPy leaves) stays known inside.
  `row_weights` broadcasts to [B, N, T]. An implementation without `backward`
  is differentiated by jax.
  """
  inputs = manual_axes.align(inputs)
  if inputs.row_weights is not None:
    inputs = inputs._replace(row_weights=_full_weights(inputs))
  if not hasattr(implementation, "backward"):
    return implementation.forward(inputs, spec)
  # Arrays that are traced must go through custom_vjp as arguments; those that
  # are known must not, or kernels could not plan by them.
  leaves, tree = jax.tree.flatten(inputs.where)
  traced = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
  # The function outlives this trace, as the rule of a derivative: it holds no
  # tracer.
  known = [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
  del leaves

  def whole(given: _WithWhere) -> _WithWhere:
    rest = iter(jax.tree.leaves(given.where))
    found = [next(rest) if leaf is None else leaf for leaf in known]
    return given._replace(where=jax.tree.unflatten(tree, found))

  # The gradient by a sink adds up all rows' delta, and their rounding: without
  # a sink, or a gradient, nobody pays for a wide out.
  is_wide = inputs.sink_logits is not None
  wide_spec = dataclasses.replace(spec, is_out_wide=is_wide)

  # Lists that are traced make loops of lengths that are.
  once = functools.partial(
      derivatives.run, "attention", implementation, is_by_jax=not traced
  )

  labels = _labels(inputs)

  def run(given: Inputs, spec: AttentionSpec) -> output.AttentionOutput:
    forward = lambda given: implementation.forward(whole(given), spec)
    split = None
    if labels is not None:
      mass = "bn." if spec.return_col_mass else None
      sink = None if given.sink_logits is None else "n"
      weights = None if given.row_weights is None else "bn."
      split = partitions.Labels.of(
          (*labels, sink, weights), ("b.n.", "bn.", mass)
      )
    return once(forward, given, labels=split)

  @jax.custom_vjp
  def call(given: Inputs) -> output.AttentionOutput:
    return run(given, spec)

  def forward(given: Inputs) -> tuple[output.AttentionOutput, _Kept]:
    result = run(given, wide_spec)
    assert result.lse is not None
    # Weights of rows are for `col_mass`, which has no gradient.
    kept = given._replace(row_weights=None), result.out, result.lse
    return result._replace(out=result.out.astype(given.query.dtype)), kept

  def backward(kept: _Kept, cotangents: tuple[Any, ...]) -> tuple[Inputs]:
    given, out, lse = kept
    d_out, d_lse, _ = cotangents
    products = getattr(implementation, "row_products", None)
    if products is None:
      delta = row_deltas(d_out, out, d_lse)
    else:
      # d_lse adds P d_lse to the cotangent of the logits, as -delta does.
      delta = once(lambda pair: products(*pair), (d_out, out)) - d_lse
    query, key, value = given[:3]
    saved = Saved(query, key, value, given.where, lse, delta, d_out)
    back = lambda saved: implementation.backward(whole(saved), spec)
    split = None
    if labels is not None:
      split = (*labels, "bn.", "bn.", "b.n."), labels[:3]
      split = partitions.Labels.of(*split)
    d_query, d_key, d_value = once(back, saved, labels=split)
    d_sink = None
    if given.sink_logits is not None:
      d_sink = sink_cotangent(given.sink_logits, lse, delta)
    return (Inputs(d_query, d_key, d_value, None, d_sink, None),)

  call.defvjp(forward, backward)
  carried: Any = traced
  given = inputs._replace(where=carried)
  return derivatives.reverse_only("attention", call, given)


def _labels(inputs: Inputs) -> tuple[str, str, str, list[str]] | None:
  """Of query, key, value and `where`; None where they cannot be split."""
  batch, _, num_heads, _ = inputs.query.shape
  sizes = (batch, num_heads, inputs.key.shape[2])
  where = partitions.of_where(inputs.where, sizes)
  if where is None:
    return None
  return "b.n.", "b.k.", "b.k.", where


def _full_weights(inputs: Inputs) -> jax.Array:
  """Weights of rows as [B, N, T]; constants, as `col_mass` is."""
  batch, num_queries, num_heads = inputs.query.shape[:3]
  shape = (batch, num_heads, num_queries)
  assert inputs.row_weights is not None
  return jax.lax.stop_gradient(jnp.broadcast_to(inputs.row_weights, shape))


def row_deltas(d_out: jax.Array, out: jax.Array, d_lse: jax.Array) -> jax.Array:
  """rowsum(d_out * out) - d_lse, in the type of the lse."""
  # TPUs would round float32 to bfloat16 first.
  delta = jnp.einsum(
      "BTNH,BTNH->BNT",
      d_out.astype(out.dtype),
      out,
      preferred_element_type=d_lse.dtype,
      precision="highest",
  )
  # d_lse adds P d_lse to the cotangent of the logits, as -delta does.
  return delta - d_lse


def sink_cotangent(
    sink_logits: jax.Array, lse: jax.Array, delta: jax.Array
) -> jax.Array:
  """The cotangent of a key a head whose value is 0."""
  sink = sink_logits.astype(lse.dtype)[None, :, None]
  # A sink of -inf is none: rows without it and without keys have no lse.
  weight = jnp.exp(sink - jnp.where(jnp.isneginf(lse), 0.0, lse))
  return -(weight * delta).sum(axis=(0, 2)).astype(sink_logits.dtype)
