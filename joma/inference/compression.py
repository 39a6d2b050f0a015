"""A cache policy on arrays alone: what stays of any model's keys and values.

  compress(keys, values, statistics, lengths, policy="keydiff", capacity=C)

Nothing is asked of the model: its keys and values as they lie in its cache, and
what the policy looks at besides. Shapes are those of the arguments and of
`capacity`, so that one compiled program serves all lengths; policy and capacity
are static under `jax.jit`. The tokens that stay are those that this project's
own cache keeps of the same prompt.

Letters: B batch, S slots of the model's cache, N query heads, K key and value
heads, G = N / K, C capacity, H head size.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.inference.cache import cache_options
from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import slot_arrays
from joma.inference.cache import storage
from joma.systems.cache_policies import names
from joma.transformer import hooks
from kernels_pallas import masks
from kernels_pallas.attention import api
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
  """What a policy may look at besides keys and values.

  `required` says which of them a policy wants; others are not read.

  Attributes:
    query: The prompt's queries as they met the keys; those behind a sequence's
      length are not read.
    col_mass: What each key got from all queries in all, as
      `drop_in.dot_product_attention(return_col_mass=True)` returns it. Where it
      is missing and wanted, it is computed from `query`.
    raw_query: Queries before rotation; None is `query`.
    raw_key: Keys before rotation; None is `keys`.
  """

  query: Float[Array, "B S N H"] | None = None
  col_mass: Float[Array, "B N S"] | None = None
  raw_query: Float[Array, "B S N H"] | None = None
  raw_key: Float[Array, "B S K H"] | None = None


class Kept(NamedTuple):
  """The slots that stay, in the order of their positions; empty ones last.

  Attributes:
    keys: As they were.
    values: Of the same tokens.
    positions: Of each head's tokens in the prompt, int32; -1 is empty.
    lengths: Slots that each sequence has taken, int32, C at most.
  """

  keys: Float[Array, "B C K H"]
  values: Float[Array, "B C K H"]
  positions: Int[Array, "B C K"]
  lengths: Int[Array, "B"]


def required(policy: str | policy_lib.Policy) -> tuple[str, ...]:
  """Names the statistics that a policy wants: query, or col_mass or query."""
  policy = _parsed(policy)
  if calls.uses_queries(policy):
    return ("query",)
  return ("col_mass",) if calls.uses_col_mass(policy) else ()


def compress(
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    statistics: Statistics | None,
    lengths: Int[Array, "B"],
    *,
    policy: str | policy_lib.Policy,
    capacity: int,
    layer: int = 0,
    scale: float | None = None,
    rotate: hooks.Rotate | None = None,
) -> Kept:
  """Keeps of each sequence and key head the C tokens that a policy chooses.

  Args:
    keys: Of one layer, after a prompt, as they meet queries.
    values: Of the same tokens.
    statistics: What `required(policy)` names; None is nothing.
    lengths: Tokens of each sequence; slots behind them are empty.
    policy: A name with settings, as `h2o:num_sinks=4`, or a policy; static.
    capacity: C; static.
    layer: Of the model, by which some policies draw; static.
    scale: Of the attention logits; None is H ** -0.5.
    rotate: The model's rotary positions; None is none.

  Raises:
    UserError: If a statistic is missing, or the policy keeps tokens in
      something else than slots, protects too many, or evicts nothing where
      there are fewer slots than tokens.
  """
  policy = _parsed(policy)
  statistics = Statistics() if statistics is None else statistics
  require.at_least("capacity", capacity, 1)
  _check(policy, statistics, keys.shape[1], capacity)
  policy = calls.fitted(policy, capacity).with_capacity(capacity)
  scale = keys.shape[-1] ** -0.5 if scale is None else scale
  prompt = _prompt(
      keys, values, statistics, lengths, policy, layer, scale, rotate
  )
  num_kv_heads, head_dim = keys.shape[2:]
  cache = kv_cache.init_layer(
      policy,
      layer,
      (keys.shape[0], num_kv_heads, capacity, head_dim),
      _num_groups(prompt, num_kv_heads),
      keys.dtype,
      cache_options.DEFAULT,
  )
  cache = kv_cache.keep(cache, prompt, calls.read_prompt(policy, prompt))
  # Heads of a lazy layer may have holes.
  order = jnp.where(cache.pos < 0, jnp.iinfo(jnp.int32).max, cache.pos)
  order = jnp.argsort(order, axis=-1)
  ordered = lambda x: slot_arrays.take(x, order).swapaxes(1, 2)
  count = (cache.pos >= 0).sum(axis=-1).max(axis=-1)
  return Kept(
      ordered(storage.read(cache.key)).astype(keys.dtype),
      ordered(storage.read(cache.value)).astype(values.dtype),
      ordered(cache.pos),
      count.astype(jnp.int32),
  )


def _prompt(
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    statistics: Statistics,
    lengths: Int[Array, "B"],
    policy: policy_lib.Policy,
    layer: int,
    scale: float,
    rotate: hooks.Rotate | None,
) -> policy_lib.Prompt:
  """What the policy reads; keys stand for queries that nobody looks at."""
  batch, num_slots, num_kv_heads, _ = keys.shape
  slots = jnp.arange(num_slots)[None]
  positions = jnp.where(slots < lengths[:, None], slots, -1).astype(jnp.int32)
  query = keys if statistics.query is None else statistics.query
  col_mass = statistics.col_mass
  if calls.uses_col_mass(policy):
    if col_mass is None:
      col_mass = _col_mass(query, keys, values, positions, policy, scale)
    col_mass = col_mass.reshape(batch, num_kv_heads, -1, num_slots)
  raw_query, raw_key = statistics.raw_query, statistics.raw_key
  return policy_lib.Prompt(
      query=query,
      key=keys,
      rotated_key=keys,
      value=values,
      raw_key=keys if raw_key is None else raw_key,
      raw_query=query if raw_query is None else raw_query,
      positions=positions,
      lengths=lengths,
      col_mass=col_mass,
      rotate=(lambda x, positions: x) if rotate is None else rotate,
      options=hooks.AttentionOptions(scale=scale),
      layer=layer,
  )


def _col_mass(
    query: Float[Array, "B S N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    positions: Int[Array, "B S"],
    policy: policy_lib.Policy,
    scale: float,
) -> Float[Array, "B N S"]:
  """What keys got from their sequence's queries, as the policy weighs them."""
  lengths = (positions >= 0).sum(axis=1)
  weights = calls.row_weights(policy, positions, lengths)
  if weights is None:
    weights = (positions >= 0).astype(jnp.float32)
  where = masks.causal(keys.shape[1])
  result = api.attention(
      query,
      keys,
      values,
      where=where,
      scale=scale,
      return_col_mass=True,
      row_weights=weights[:, None],
  )
  assert result.col_mass is not None  # It was asked for.
  return result.col_mass


def _num_groups(prompt: policy_lib.Prompt, num_kv_heads: int) -> int:
  """G: of what each query head gave, or of the queries."""
  if prompt.col_mass is not None:
    return prompt.col_mass.shape[2]
  return prompt.query.shape[2] // num_kv_heads


def _parsed(given: str | policy_lib.Policy) -> policy_lib.Policy:
  return names.parse(given) if isinstance(given, str) else given


def _check(
    policy: policy_lib.Policy,
    statistics: Statistics,
    num_slots: int,
    capacity: int,
) -> None:
  name = names.name_of(policy)
  if calls.has_own_cache(policy):
    raise errors.UserError(
        f"policy {name} keeps tokens in a cache of its own kind, not in slots:"
        " compress takes policies of slots, as h2o, snapkv or keydiff."
    )
  if not policy.evicts and capacity < num_slots:
    raise errors.UserError(
        f"policy {name} evicts nothing: capacity={capacity} must be at least"
        f" the {num_slots} slots of keys."
    )
  wanted = required(policy)
  given = {"query": statistics.query, "col_mass": statistics.col_mass}
  found = [n for n in ("query", *wanted) if given[n] is not None]
  if wanted and not found:
    other = " (or query)" if wanted == ("col_mass",) else ""
    raise errors.UserError(
        f"policy {name} looks at more than keys and values: give"
        f" Statistics({wanted[0]}=...){other}."
    )
