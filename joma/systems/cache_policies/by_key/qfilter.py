"""Keys that lie along the main direction of the queries.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots, H head size.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFilter(policy_lib.Policy):
  """The projection of a key on the main direction of queries (2503.02812).

  Queries of a head have a mean far from 0, along the first right singular
  vector u of all of them, so that on average q.k is in proportion to k.u. The
  sign of u is that of the queries' mean; heads that share a key head average
  their u. A key is judged once, when it enters.

  Differs from the paper: it takes u from texts that are read beforehand. Here u
  is of the text's own rotated queries: of a whole prompt by its second moment,
  then by a step of power iteration a token.

  Paper's settings: one direction a head, from texts read beforehand.
  """

  label: ClassVar[str] = "Q-Filter"
  uses_queries: ClassVar[bool] = True
  num_recent: int | None = 0

  def init_state(
      self, batch: int, num_kv_heads: int, head_dim: int, num_groups: int
  ) -> rules.Arrays:
    heads = (batch, num_kv_heads, num_groups, head_dim)
    return jnp.zeros((*heads, head_dim)), jnp.zeros(heads), jnp.zeros(heads)

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    num_kv_heads, head_dim = prompt.key.shape[2:]
    query = prompt.query.astype(jnp.float32)
    is_token = (prompt.positions >= 0)[..., None, None]
    query = jnp.where(is_token, query, 0.0)
    query = query.reshape(*query.shape[:2], num_kv_heads, -1, head_dim)
    moment = jnp.einsum("BTKGH,BTKGI->BKGHI", query, query, precision="highest")
    # Eigenvectors are columns, the greatest last.
    main = jnp.linalg.eigh(moment)[1][..., -1]
    total = query.sum(axis=1)
    score = _project(
        prompt.rotated_key.astype(jnp.float32).swapaxes(1, 2), main, total
    )
    return score, None, (moment, main, total)

  def enter(
      self, token: policy_lib.Token, state: rules.Arrays
  ) -> rules.Entered:
    moment, main, total = state
    at = token.position[:, None]
    batch, num_kv_heads, num_groups, head_dim = token.raw_query.shape
    heads = token.raw_query.reshape(batch, 1, -1, head_dim)
    query = token.rotate(heads, at).astype(jnp.float32)
    query = query.reshape(batch, num_kv_heads, num_groups, head_dim)
    moment = moment + query[..., :, None] * query[..., None, :]
    turned = jnp.einsum("BKGHI,BKGI->BKGH", moment, main, precision="highest")
    # The first query of a text is the direction itself.
    is_new = (main == 0).all(axis=-1, keepdims=True)
    main = _unit(jnp.where(is_new, query, turned))
    total = total + query
    key = token.rotate(token.raw_key[:, None], at).astype(jnp.float32)
    score = _project(key.swapaxes(1, 2), main, total)[..., 0]
    return score, None, (moment, main, total)


def _project(
    key: Float[Array, "B K T H"],
    main: Float[Array, "B K G H"],
    total: Float[Array, "B K G H"],
) -> Float[Array, "B K T"]:
  """k.u, with u the mean of the group's directions, each signed as its mean."""
  along = jnp.einsum("BKGH,BKGH->BKG", main, total, precision="highest")
  signed = jnp.where(along[..., None] < 0, -main, main).mean(axis=2)
  return jnp.einsum("BKTH,BKH->BKT", key, signed, precision="highest")


def _unit(x: Float[Array, "B K G H"]) -> Float[Array, "B K G H"]:
  length = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return x / jnp.maximum(length, 1e-30)
