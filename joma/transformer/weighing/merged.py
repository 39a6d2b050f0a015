"""The kernels' op by a rule that is softmax, with its learned keys.

Letters: B batch, T queries, S keys, N query heads, K key and value heads, H
head size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.transformer import hooks
from joma.transformer.weighing import rows
from joma.transformer.weighing import rule as rules
from kernels_pallas import output
from kernels_pallas.attention import api


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: hooks.Where,
    options: hooks.AttentionOptions,
    op: Callable[..., output.AttentionOutput] = api.attention,
    **returns: Any,
) -> output.AttentionOutput:
  """The kernels' op by a rule that is softmax, with its learned keys if any.

  Keys and learned keys are two attentions of the same queries, merged by their
  log sums; what each key got in all is then weighed anew by the first's share.

  Args:
    query: Rotated.
    key: Rotated.
    value: Of the keys.
    where: A mask, or blocks of keys and a mask inside them.
    options: Scale, soft cap, implementation and the rule.
    op: `api.attention`, or one that takes the same.
    **returns: What else it is to return.
  """
  rule, asked = options.weights, dict(returns)
  shared: Any = dict(
      where=where,
      scale=options.scale,
      logits_soft_cap=options.logits_soft_cap,
      implementation=options.implementation,
  )
  if rule is None or rule.extra_keys is None:
    sinks = options.sink_logits
    return op(query, key, value, sink_logits=sinks, **shared, **asked)
  text = op(query, key, value, return_lse=True, **shared)
  whole = output.merge(text, _of_extra(query, rule, options))
  if not asked.pop("return_col_mass", False):
    return whole
  assert text.lse is not None and whole.lse is not None  # Asked for above.
  share = jnp.exp(text.lse - whole.lse)
  by_row = asked.pop("row_weights", None)
  by_row = share if by_row is None else share * by_row
  mass = op(
      query,
      key,
      value,
      row_weights=jax.lax.stop_gradient(by_row),
      return_col_mass=True,
      **shared,
      **asked,
  )
  return whole._replace(col_mass=mass.col_mass)


def _of_extra(
    query: Float[Array, "B T N H"],
    rule: rules.WeightRule,
    options: hooks.AttentionOptions,
) -> output.AttentionOutput:
  """Attention to learned keys alone."""
  rest = rules.rest_logits(rule, query, options.scale, options.logits_soft_cap)
  assert rest is not None  # There are extra keys.
  lse, value = jax.nn.logsumexp(rest, axis=-1), rules.extra_values(rule, query)
  if value is None:
    return output.AttentionOutput(jnp.zeros_like(query), lse)
  out = rows.weighted(jax.nn.softmax(rest), value)
  return output.AttentionOutput(out, lse)
