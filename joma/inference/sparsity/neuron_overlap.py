"""Do texts, a prompt and what follows it, and layers choose the same neurons?

A text's choice is that of GRIFFIN: the blocks of neurons of the largest
sum_t (h_t / ||h_t||)^2. The overlap of two choices is the share of blocks that
they have in common; of choices at random it is `num` over the blocks there are.
Sparsity that is structured is alike over texts, or over layers
(https://arxiv.org/abs/2404.01365).

Letters: L layers, B texts, T tokens, F neurons, U blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from joma.inference.sparsity import sparsity_labels
from joma.inference.sparsity import unit_rules


class Overlap(NamedTuple):
  """Mean overlaps.

  Attributes:
    texts: Between different texts, of each layer.
    continuation: Between a prompt and what follows it, of each layer.
    layers: Between layers, of the same text; 1 on the diagonal.
    chance: Of choices at random.
  """

  texts: Float[Array, "L"]
  continuation: Float[Array, "L"]
  layers: Float[Array, "L L"]
  chance: float


def measure(
    hidden: Float[Array, "L B T F"], prompt_len: int, block_size: int, num: int
) -> Overlap:
  """Measures the overlaps of a model's choices.

  Args:
    hidden: What W_down of each layer reads, as `mlp.Mlp` sows it.
    prompt_len: Tokens of the prompts; the rest follow.
    block_size: Neurons of a block.
    num: Blocks that are chosen.
  """
  is_prompt = jnp.arange(hidden.shape[2]) < prompt_len
  prompt = _chosen(hidden, is_prompt, block_size, num)
  rest = _chosen(hidden, ~is_prompt, block_size, num)
  whole = _chosen(hidden, jnp.ones_like(is_prompt), block_size, num)
  share = (
      lambda spec, one, two: jnp.einsum(
          spec, one.astype(jnp.float32), two.astype(jnp.float32)
      )
      / num
  )
  between = share("LBU,LCU->LBC", whole, whole)
  apart = 1 - jnp.eye(between.shape[-1])[None]
  texts = (between * apart).sum(axis=(1, 2)) / jnp.maximum(apart.sum(), 1)
  return Overlap(
      texts=texts,
      continuation=share("LBU,LBU->LB", prompt, rest).mean(axis=1),
      layers=share("LBU,MBU->LMB", whole, whole).mean(axis=2),
      chance=num / whole.shape[-1],
  )


def _chosen(
    hidden: Float[Array, "L B T F"],
    is_read: Bool[Array, "T"],
    block_size: int,
    num: int,
) -> Bool[Array, "L B U"]:
  """The blocks of each layer and text, of the tokens that are read."""
  rule = unit_rules.Griffin(num=num)
  is_read = jnp.broadcast_to(is_read[None], hidden.shape[1:3])
  score = lambda one: rule.scores(one, is_read, block_size)
  return sparsity_labels.keep_top(jax.vmap(score)(hidden), num)
