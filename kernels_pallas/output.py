"""What an attention op returns, and how partial results are merged."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class AttentionOutput(NamedTuple):
  """Result of an attention op.

  Attributes:
    out: Float [B, T, N, H], in the query's dtype. 0 where a query has no key.
    lse: Float32 [B, N, T], log of the softmax denominator in nats, sink logits
      included; -inf where a query has no key and no sink. None if not asked.
    col_mass: Float32 [B, N, S] (or [B, K, S]): sum over queries t of
      row_weights[t] * attn_weights[t, s]. None if not asked.
  """

  out: Float[Array, "B T N H"]
  lse: Float[Array, "B N T"] | None = None
  col_mass: Float[Array, "B #N S"] | None = None


def finish(
    result: AttentionOutput,
    num_kv_heads: int,
    return_lse: bool,
    col_mass_heads: Literal["query", "kv"],
) -> AttentionOutput:
  """Drops what was not asked for; sums `col_mass` over the group of a KV head.

  Raises:
    ValueError: If `col_mass_heads` is unknown.
  """
  if col_mass_heads not in ("query", "kv"):
    raise ValueError(
        f"col_mass_heads={col_mass_heads!r} must be 'query' or 'kv'"
    )
  col_mass = result.col_mass
  if col_mass is not None and col_mass_heads == "kv":
    batch, _, num_keys = col_mass.shape
    grouped = col_mass.reshape(batch, num_kv_heads, -1, num_keys)
    col_mass = grouped.sum(axis=2)
  return AttentionOutput(
      result.out, result.lse if return_lse else None, col_mass
  )


def merge(*parts: AttentionOutput) -> AttentionOutput:
  """Combines attentions of the same queries to disjoint sets of keys.

  out = sum_i w_i out_i with w = softmax over the parts' lse, as in ring and
  context-parallel attention. Associative and commutative, differentiable. A
  learned sink logit belongs to exactly one of the parts.

  Args:
    *parts: At least one, each with `lse`. `col_mass` is not merged, because
      each part normalised it by its own lse.

  Returns:
    `out` in the dtype of the first part, and `lse`.

  Raises:
    ValueError: If there is no part, or a part has no `lse`.
  """
  known = [part.lse for part in parts if part.lse is not None]
  if not parts or len(known) < len(parts):
    raise ValueError("merge needs parts that were made with return_lse=True")
  lses = jnp.stack(known)
  highest = lses.max(axis=0)
  # Rows that no part has keys for: every weight 0 instead of exp(nan).
  safe = jnp.where(jnp.isneginf(highest), 0.0, highest)
  unnormalized = jnp.exp(lses - safe[None])
  total = unnormalized.sum(axis=0)
  weights = unnormalized / jnp.where(total == 0, 1.0, total)[None]
  # Summed in the type of the lse: parts of bfloat16 would be rounded twice.
  outs = jnp.stack([part.out.astype(lses.dtype) for part in parts])
  out = jnp.einsum("PBNT,PBTNH->BTNH", weights, outs, precision="highest")
  lse = jnp.where(
      total == 0, -jnp.inf, safe + jnp.log(jnp.where(total == 0, 1.0, total))
  )
  return AttentionOutput(out.astype(parts[0].out.dtype), lse)
