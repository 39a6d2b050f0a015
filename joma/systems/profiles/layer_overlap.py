"""What layers like best, how much of it they share, and what it costs to lack.

A layer's choice is, for each query and key head, the blocks of keys that get
most of its attention, the first block and the query's own among them. Of a
model that reads everything:

  overlap[i, j]  |choice_i and choice_j| / |choice_j|, by which plans are made
  error[i]       ||o_i' - o_i|| / ||o_i|| of the heads' outputs where layer i
                 alone reads its choice: what is sensitive stays full
  share[i]       least share of the blocks seen that hold 90 % of the weight

(HyLRA, https://arxiv.org/abs/2602.00777, has the mean over heads; the tool of
unified-cache-management their minimum.) Under a plan overlaps are others: what
`hylra` sows as its probe measures them again.

Letters: B texts, T tokens, N query heads, K key heads, C blocks, L layers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from joma.systems.reuse import heaviest
from joma.transformer import model as models

_MASS = 0.9


class Profile(NamedTuple):
  """What was measured of the queries that count.

  Attributes:
    overlap: Of source i and layer j, mean over heads.
    least_overlap: The same, minimum over heads.
    error: Relative error of the heads' outputs.
    share: Of the blocks, mean over heads.
  """

  overlap: Float[Array, "L L"]
  least_overlap: Float[Array, "L L"]
  error: Float[Array, "L"]
  share: Float[Array, "L"]


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def measure(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    size: int,
    num: int,
    num_first: int = 0,
) -> Profile:
  """Measures a model of which every layer reads everything.

  Args:
    model: The Transformer, without systems.
    params: Its parameters.
    tokens: Texts.
    size: Keys of a block.
    num: Blocks of a choice.
    num_first: Queries at the beginning that do not count.
  """
  is_value = lambda module, _: module.name == "value"
  found: Any = model.apply(
      {"params": params},
      tokens,
      mutable="intermediates",
      capture_intermediates=is_value,
  )
  seen, config = found[1]["intermediates"], model.config
  layers = [seen[f"layers_{i}"]["attn"] for i in range(config.num_layers)]
  weights = [layer["attn_weights"][0][:, :, num_first:] for layer in layers]
  choose = functools.partial(
      _chosen, config.num_kv_heads, size=size, num=num, first=num_first
  )
  chosen = [choose(each) for each in weights]
  shared = overlaps(jnp.stack(chosen))
  errors = [
      _error(each, choice, layer["value"]["__call__"][0], size)
      for each, choice, layer in zip(weights, chosen, layers, strict=True)
  ]
  shares = [
      _share(heaviest.block_mass(each, config.num_kv_heads, size))
      for each in weights
  ]
  return Profile(
      shared.mean(axis=2),
      shared.min(axis=2),
      jnp.stack(errors),
      jnp.stack(shares),
  )


def overlaps(chosen: Bool[Array, "L B K T C"]) -> Float[Array, "L L K"]:
  """Share of layer j's choice that layer i's has, mean over texts and queries.

  Args:
    chosen: Marks of each layer's choice.
  """
  wide = chosen.astype(jnp.float32)
  same = jnp.einsum("IBKTC,JBKTC->IJBKT", wide, wide)
  size = jnp.maximum(wide.sum(axis=-1), 1)
  return (same / size[None]).mean(axis=(2, 4))


def _chosen(
    num_kv_heads: int,
    weights: Float[Array, "B N T S"],
    size: int,
    num: int,
    first: int,
) -> Bool[Array, "B K T C"]:
  mass = heaviest.block_mass(weights, num_kv_heads, size)
  own = (first + jnp.arange(weights.shape[2])) // size
  blocks, is_valid = heaviest.top(mass, own[None, None], num)
  place = jnp.arange(mass.shape[-1])[None, None, None, None]
  return ((blocks[..., None] == place) & is_valid[..., None]).any(axis=3)


def _error(
    weights: Float[Array, "B N T S"],
    chosen: Bool[Array, "B K T C"],
    value: Float[Array, "B S K H"],
    size: int,
) -> Float[Array, ""]:
  num_groups = weights.shape[1] // value.shape[2]
  by_key = jnp.repeat(chosen, size, axis=3)[..., : weights.shape[-1]]
  few = jnp.where(jnp.repeat(by_key, num_groups, axis=1), weights, 0.0)
  few = few / jnp.maximum(few.sum(axis=-1, keepdims=True), 1e-9)
  value = jnp.repeat(value, num_groups, axis=2)
  read = lambda weights: jnp.einsum("BNTS,BSNH->BTNH", weights, value)
  norm = lambda x: jnp.sqrt(jnp.square(x).sum())
  return norm(read(few - weights)) / norm(read(weights))


def _share(mass: Float[Array, "B K T C"]) -> Float[Array, ""]:
  """Blocks that hold most of the mass, over the blocks that have any."""
  ranked = -jnp.sort(-mass, axis=-1)
  held = ranked / ranked.sum(axis=-1, keepdims=True)
  needed = (jnp.cumsum(held, axis=-1) - held < _MASS).sum(axis=-1)
  return (needed / jnp.maximum((mass > 0).sum(axis=-1), 1)).mean()
