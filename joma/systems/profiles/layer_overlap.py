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

from joma.systems.profiles import layer_shares
from joma.systems.reuse import heaviest
from joma.transformer import model as models


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
  shared = layer_shares.overlaps(jnp.stack(chosen))
  errors = [
      layer_shares.error(each, choice, layer["value"]["__call__"][0], size)
      for each, choice, layer in zip(weights, chosen, layers, strict=True)
  ]
  shares = [
      layer_shares.share(heaviest.block_mass(each, config.num_kv_heads, size))
      for each in weights
  ]
  return Profile(
      shared.mean(axis=2),
      shared.min(axis=2),
      jnp.stack(errors),
      jnp.stack(shares),
  )


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
