"""Weights of positions alone: what attends to what, whatever is said.

  query_t = W_q p_t,   key_s = W_k p_s,   value_s = W_v x_s

p is a learned table, or, frozen, random numbers: Positional Attention
(https://arxiv.org/abs/2410.01686), and the random queries and keys of
Deconstructing Attention (https://arxiv.org/abs/2510.11602), where a random
sequence runs through the stack first. Outputs are linear in the values, so that
numbers ten times as large give outputs ten times as large. In a pass over whole
texts, whose tokens stand at 0, 1, ..., weights are computed once, not once a
text, which is XLA only; a decode step runs on the kernels as softmax does.

Paper's settings: one-hot positions, log2 n + 1 layers for lists of n, an MLP
without residual.

Letters: B batch, T tokens, M rows of the table, D width.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from joma.transformer import config as configs
from joma.transformer import hooks


@dataclasses.dataclass(frozen=True)
class Positional:
  """Says what the projections read.

  Attributes:
    learned: Whether the table is learned; a frozen one has no end.
    seed: Of the frozen table.
  """

  name: ClassVar[str] = "positional"
  paper: ClassVar[str] = "https://arxiv.org/abs/2410.01686"
  neutral: ClassVar[str] = ""
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"table": (None, "fsdp")}

  learned: bool = True
  seed: int = 0

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns `table`, p float32 [M, D], M the model's `max_len`."""
    if not self.learned:
      return {}
    shape = (config.max_len, config.embed_dim)
    return {"table": jax.random.normal(key, shape)}

  def read(
      self, params: hooks.Params, call: hooks.Call
  ) -> tuple[Array, Array, Array]:
    """Returns positions twice, of one text where all share them, and x."""
    places = call.positions
    if not call.has_cache:
      places = jnp.arange(places.shape[1])[None]
    places = jnp.maximum(places, 0)
    if self.learned:
      found = jnp.take(params["table"], places, axis=0, mode="fill")
    else:
      draw = lambda place: jax.random.normal(
          jax.random.fold_in(jax.random.key(self.seed), place),
          (call.config.embed_dim,),
      )
      found = jax.vmap(jax.vmap(draw))(places)
    found = found.astype(call.x.dtype)
    return found, found, call.x
