"""What may take the place of products of heads and neurons: the protocols.

A `Router` is no system of a config (`joma.transformer.hooks`): it is handed to
`Transformer.__call__` with its arrays, as Deja Vu's plan is.

Letters: B batch, T new tokens, D width, N query heads, H head size.
"""

from typing import Protocol, runtime_checkable

import flax.linen as nn
from jaxtyping import Array, Float, Int, PyTree

from joma.transformer import mlp


@runtime_checkable
class Router(Protocol):
  """Takes the place of products of heads and neurons; a pytree of its arrays.

  Handed to `Transformer.__call__`, which asks it for a `Route` in each layer.
  """

  def route(
      self,
      layer: int,
      x: Float[Array, "B T D"],
      x_before: Float[Array, "B T D"],
      positions: Int[Array, "B T"],
      kv_cache: PyTree,
  ) -> "Route":
    """Returns what happens in a layer.

    Args:
      layer: Which, from 0.
      x: The residual stream that the layer reads.
      x_before: What the layer before it read; the first layer's is `x`.
      positions: Of the tokens; -1 marks padding.
      kv_cache: The layer's cache, or None.
    """
    ...


@runtime_checkable
class Route(Protocol):
  """A router's way through one layer; made anew at every call, may take notes.

  The layer calls `heads`, then `product` in each projection of attention, then
  `mlp`, then `new_cache`, once each and in this order.
  """

  def heads(self, attn_in: Float[Array, "B T D"], kv_cache: PyTree) -> PyTree:
    """Told what attention reads; returns the cache that it attends with."""
    ...

  def product(self, dense: nn.Module, x: Array) -> Array:
    """Returns `dense(x)`, or what takes its place.

    Args:
      dense: Whose `name` is query, key, value or out, and whose parameters are
        in its `variables`.
      x: [B, T, D], or [B, T, N, H] for the output projection.
    """
    ...

  def mlp(
      self,
      apply_mlp: mlp.Mlp,
      mlp_in: Float[Array, "B T D"],
      resid: Float[Array, "B T D"],
  ) -> Float[Array, "B T D"]:
    """Returns `apply_mlp(mlp_in)`, or what takes its place.

    Args:
      apply_mlp: The bound `mlp.Mlp`: its parameters are in its `variables`;
        called with `product=` it hands each of its projections over, as
        `product(dense, x)`, with the names up, gate and down.
      mlp_in: What the MLP reads.
      resid: The residual stream that `mlp_in` was normalized from.
    """
    ...

  def new_cache(self, kv_cache: PyTree) -> PyTree:
    """Returns what the layer hands on as its cache."""
    ...


class Products:
  """What a `Route` that changes products of attention alone leaves as it is."""

  def heads(self, attn_in: Float[Array, "B T D"], kv_cache: PyTree) -> PyTree:
    """The cache that is there."""
    del attn_in
    return kv_cache

  def mlp(
      self,
      apply_mlp: mlp.Mlp,
      mlp_in: Float[Array, "B T D"],
      resid: Float[Array, "B T D"],
  ) -> Float[Array, "B T D"]:
    """The MLP as it is."""
    del resid
    return apply_mlp(mlp_in)

  def new_cache(self, kv_cache: PyTree) -> PyTree:
    """The cache that is there."""
    return kv_cache
