"""The gated delta rule of a layer: its vectors, and the op on a mesh.

Letters: B batch, T tokens, N query heads, K key and value heads, H head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from joma.transformer import hooks
from joma.transformer import sharding
from kernels_pallas.gated_delta_rule import api
from kernels_pallas.gated_delta_rule import output

# Which axes of the rule's other arguments are sequences, and heads.
_LABELS = {"segment_starts": "b.", "initial_state": "bn..", "lengths": "b"}


def unit(made: list[Array], num_heads: int) -> tuple[Array, Array, Array]:
  """Passes silu, repeats keys and values, makes queries and keys unit."""
  num_groups = num_heads // made[1].shape[2]
  query, key, value = (jax.nn.silu(x) for x in made)
  key, value = (jnp.repeat(x, num_groups, axis=2) for x in (key, value))

  def of_one(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    size = jnp.square(wide).sum(axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(size + 1e-6)).astype(x.dtype)

  return of_one(query), of_one(key), value


def rule(
    options: hooks.AttentionOptions,
    arrays: tuple[Array, ...],
    **more: Array,
) -> output.GatedDeltaRuleOutput:
  """The rule, of each device's own sequences and heads on a mesh.

  Args:
    options: Of the layer.
    arrays: Queries, keys, values, decays and beta, all of N heads.
    **more: Other arguments of the rule that are arrays.
  """
  labels = [*["b.n."] * 3, "b.n." if arrays[3].ndim == 4 else "b.n", "b.n"]
  labels += [_LABELS[name] for name in more]

  def own(*given: Array) -> output.GatedDeltaRuleOutput:
    return api.gated_delta_rule(
        *given[:5],
        **dict(zip(more, given[5:], strict=True)),
        scale=options.scale,
        implementation=options.implementation,
    )

  results = output.GatedDeltaRuleOutput._make(("b.n.", "bn.."))
  return sharding.per_head(own, (*arrays, *more.values()), labels, results)
