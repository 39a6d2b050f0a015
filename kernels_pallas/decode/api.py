"""One decode step over a cache of fixed size that evicts what it used least.

Letters: B batch, N query heads, K key and value heads, C slots, H size of a
query's and a key's head, J of a value's.
H2O (https://arxiv.org/abs/2306.14048), attention sinks
(https://arxiv.org/abs/2309.17453) and their kin, in one pass over the cache:
attention, scores, the choice of a slot and the write of the new token.

Paper's settings: those of the policies `h2o` and `streaming_llm`.
"""

import importlib
import types
import typing
from typing import Any

import jax
from jax.experimental import checkify
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import arguments
from kernels_pallas import implementations
from kernels_pallas import masks
from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.transformations import derivatives
from kernels_pallas.transformations import exported
from kernels_pallas.transformations import manual_axes
from kernels_pallas.transformations import partitions

Score, Reduce = rule_lib.Score, rule_lib.Reduce


def decode_step(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K J"],
    cache: slots_lib.Slots,
    positions: Int[Array, "B"],
    *,
    num_sinks: int = 0,
    num_recent: int = 0,
    score: Score = "sum",
    decay: float = 1.0,
    gain: float = 1.0,
    reduce: Reduce = "sum",
    history: int = 32,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    window: int | None = None,
    implementation: implementations.Implementation | None = None,
    config: implementations.Config = None,
) -> tuple[Float[Array, "B N J"], slots_lib.Slots, Int[Array, "B K"]]:
  """Writes the new tokens, attends from them, and updates the scores.

  In this order, for each sequence and key head: a slot is chosen, the first
  empty one, else that of least priority among the unprotected, the first of
  equal ones; key and value are written there with score 0; the query attends
  to all slots that are not empty, the new one among them; each score becomes
  decay times itself and gain times what attention its slot received. Priority
  is the score, or what `rule` makes of it. Donate the cache, and it is updated
  in place. Not differentiable.

  Args:
    query: Any float type; logits, softmax and scores are float32 (float64 for
      float64).
    key: K divides N; head n reads key head n // (N / K). Positions are encoded
      in it already.
    value: As key; J may differ from H by XLA and by the reference, as `out`
      then has. Kernels want one size.
    cache: See `slots.Slots`; `slots.empty` makes one. Its float type may be
      another than the query's.
    positions: Of the new tokens. -1 marks an inactive sequence: nothing of it
      is written, its out is 0.
    num_sinks: Positions below it are never evicted.
    num_recent: Nor so many positions before the new token's.
    score: Priority is the score for "sum" and "ema", the score for each step
      since the token came for "mean", the token's position for "position". For
      "votes" it is how many of the last `history` steps gave the slot more than
      1 / n of n slots seen, for "key_norm" minus the key's norm.
    decay: What a step leaves of the scores, in [0, 1].
    gain: Factor of what a step adds to the scores, above 0.
    reduce: Whether a slot receives the sum over the query heads that share it,
      their largest weight or their mean; "layer" is the mean over all query
      heads, slot by slot: key heads then keep the same tokens.
    history: Steps that have a vote, 1 to 32. "votes" needs a cache with votes.
    scale: Factor of the logits; None is H ** -0.5.
    logits_soft_cap: c in c tanh(logits / c); None is off.
    window: Positions that the query sees, its own included; None is all.
    implementation: None is the best of the platform; a named one raises where
      it cannot run.
    config: Sizes, the `Config` of the implementation; None lets it choose.

  Returns:
    (out, cache, slot): slot is which each new token took, -1 where inactive.

  Raises:
    ValueError: If shapes, types or options do not fit together, or the
      implementation is unknown or not for this platform. What is only known
      when the program runs is checked under `jax.experimental.checkify`.
  """
  positions = arguments.narrow(positions)
  check_vectors(query, key, value, positions)
  _check_cache(cache, key, value)
  rule = make_rule(
      query,
      num_sinks=num_sinks,
      num_recent=num_recent,
      score=score,
      decay=decay,
      gain=gain,
      reduce=reduce,
      history=history,
      scale=scale,
      logits_soft_cap=logits_soft_cap,
      window=window,
      config=config,
  )
  # A step that could evict nobody would have to refuse its token.
  check_room(rule, cache.capacity, "slots")
  _check_votes(rule, cache)
  sizes = query.shape[-1], value.shape[-1]
  choose = lambda named=None: choose_for(named, *sizes)
  axes = ("BNH", query), ("BKC", cache.pos)
  chosen, query = exported.chosen("decode_step", implementation, choose, *axes)
  arguments.check_config(config, chosen, _module(chosen))
  check_values(cache.pos, positions)
  given = manual_axes.align(
      (slots_lib.Token(query, key, value, positions), cache)
  )
  module = _module(chosen)
  step = lambda token, cache: module.step(token, cache, rule)
  labels = None if reduce == "layer" else _labels(cache)
  return derivatives.run("decode_step", module, step, *given, labels=labels)


def choose_for(
    implementation: implementations.Implementation | None,
    head_dim: int,
    value_dim: int,
) -> implementations.Implementation:
  """As `implementations.choose`, where values may have a size of their own.

  Raises:
    ValueError: If kernels are asked for that have one size for both.
  """
  if head_dim == value_dim:
    return implementations.choose(implementation, {"tpu": "pallas_tpu"})
  if implementation in ("pallas_tpu", "pallas_gpu"):
    size = max(head_dim, value_dim)
    raise ValueError(
        f"implementation={implementation!r} has one size for keys and values,"
        f" not {head_dim} and {value_dim}; use 'xla', 'reference' or None, or"
        f" pad both to {size} with zeros and cut `out`, with scale="
        f"{head_dim}**-0.5"
    )
  return implementations.choose(implementation, {})


def _labels(cache: slots_lib.Slots) -> partitions.Labels:
  """Which axes are batch and heads; a rule over all heads splits none."""
  slots = jax.tree.map(lambda x: "bk" + "." * (x.ndim - 2), cache)
  token = ("bn.", "bk.", "bk.", "b")  # As `slots.Token`.
  return partitions.Labels.of((token, slots), ("bn.", slots, "bk"), False)


def make_rule(query: masks.AnyArray, **options: Any) -> rule_lib.Rule:
  """Checks the options of a step.

  Raises:
    ValueError: If one has no meaning.
  """
  check_choice("score", options["score"], Score)
  check_choice("reduce", options["reduce"], Reduce)
  least = {"num_sinks": 0, "num_recent": 0, "window": 1, "history": 1}
  for name, number in least.items():
    _check_integer(name, options[name], number)
  if options["history"] > 32:
    raise ValueError(f"history={options['history']} must be at most 32")
  for name in ("decay", "gain", "scale", "logits_soft_cap"):
    arguments.check_number(name, options[name])
  if options["decay"] is None or not 0 <= options["decay"] <= 1:
    raise ValueError(f"decay={options['decay']} must be from 0 to 1")
  for name in ("gain", "logits_soft_cap"):
    number = options[name]
    if number is not None and not number > 0:
      raise ValueError(f"{name}={number} must be positive")
  # Resolved here once, so that all implementations multiply by the same number.
  if options["scale"] is None:
    options["scale"] = query.shape[-1] ** -0.5
  return rule_lib.Rule(**options)


def check_choice(name: str, value: object, kind: object) -> None:
  """Raises ValueError unless the value is one of a `Literal`."""
  known = typing.get_args(kind)
  if value not in known:
    raise ValueError(
        f"{name}={value!r} is unknown; it must be one of {', '.join(known)}"
    )


def _check_integer(name: str, number: object, least: int) -> None:
  """Raises ValueError unless it is an integer from `least` on."""
  if name == "window" and number is None:
    return
  if isinstance(number, bool) or not isinstance(number, int):
    raise ValueError(f"{name}={number!r} must be an integer")
  if number < least:
    raise ValueError(f"{name}={number} must be at least {least}")


def check_room(rule: rule_lib.Rule, capacity: int, what: str) -> None:
  """Raises ValueError unless a token can always be evicted."""
  if rule.num_sinks + rule.num_recent > capacity - 1:
    raise ValueError(
        f"num_sinks={rule.num_sinks} and num_recent={rule.num_recent} protect"
        f" {rule.num_sinks + rule.num_recent} tokens, but of {capacity}"
        f" {what} at most {capacity - 1} may be protected: one is for the new"
        " token"
    )


def _check_votes(rule: rule_lib.Rule, cache: slots_lib.Slots) -> None:
  """Raises ValueError unless votes are where the rule wants them."""
  if (rule.score == "votes") != (cache.votes is not None):
    has = "no votes" if cache.votes is None else "votes"
    raise ValueError(
        f"score={rule.score!r} and a cache with {has}: those are for 'votes'"
        " alone; see slots.empty"
    )


def check_vectors(
    query: masks.AnyArray,
    key: masks.AnyArray,
    value: masks.AnyArray,
    positions: masks.AnyArray,
) -> None:
  """Raises ValueError unless [B, N, H], [B, K, H] x 2 and [B] fit together."""
  for name, array in (("query", query), ("key", key), ("value", value)):
    arguments.check_float_array(name, array)
    if array.ndim != 3:
      raise ValueError(
          f"{name} has shape {array.shape}; in a step it must have 3 axes:"
          " batch, head, head_dim"
      )
  one = (x[:, None] for x in (query, key, value))
  arguments.check_arrays(*one, is_value_alike=False)
  check_int32("positions", positions, query.shape[:1])


def check_int32(name: str, array: Any, shape: tuple[int, ...]) -> None:
  """Raises ValueError unless it is an int32 array of this shape."""
  if getattr(array, "dtype", None) != jnp.int32 or array.shape != shape:
    found = getattr(array, "dtype", type(array).__name__)
    raise ValueError(
        f"{name} is {found} {getattr(array, 'shape', '')}; it must be an int32"
        f" array of shape {shape}"
    )


def check_values(pos: masks.AnyArray, positions: masks.AnyArray) -> None:
  """Checks what is only known when the program runs, under checkify alone."""
  checkify.debug_check(
      jnp.all(positions >= -1),
      "positions has {least}; each must be a position, or -1 for none",
      least=jnp.min(positions, initial=0),
  )
  # Priorities by age need positions that grow.
  newest = jnp.max(pos, axis=tuple(range(1, pos.ndim)), initial=-1)
  checkify.debug_check(
      jnp.all((positions < 0) | (newest < positions)),
      "the cache holds position {newest}, which is not before the new token's",
      newest=jnp.max(newest, initial=-1),
  )


def _check_cache(
    cache: object, key: masks.AnyArray, value: masks.AnyArray
) -> None:
  """Raises ValueError unless it is for keys [B, K, H] and values."""
  if not isinstance(cache, slots_lib.Slots):
    raise ValueError(
        f"cache is a {type(cache).__name__}; it must be a"
        " kernels_pallas.decode.slots.Slots, such as slots.empty"
        " makes"
    )
  if getattr(cache.pos, "ndim", 0) != 3 or cache.pos.shape[:2] != key.shape[:2]:
    raise ValueError(
        f"cache.pos has shape {getattr(cache.pos, 'shape', None)}; for key"
        f" {key.shape} it must be [{key.shape[0]}, {key.shape[1]}, slots]"
    )
  check_int32("cache.pos", cache.pos, cache.pos.shape)
  check_stored(cache, cache.pos.shape, key.shape[-1], value.shape[-1])


def check_stored(
    cache: slots_lib.Slots,
    lead: tuple[int, ...],
    head_dim: int,
    value_dim: int,
) -> None:
  """Raises ValueError unless keys, values, scores and scales fit `lead`."""
  for name, size in (("key", head_dim), ("value", value_dim)):
    array = getattr(cache, name)
    if jnp.dtype(array.dtype) != jnp.int8:
      arguments.check_float_array(f"cache.{name}", array)
    if array.shape != (*lead, size) or array.dtype != cache.key.dtype:
      raise ValueError(
          f"cache.{name} is {array.dtype} {array.shape}; it must be"
          f" {cache.key.dtype} {(*lead, size)}"
      )
  # Scales belong to int8 alone; a scale of a float cache would be ignored.
  is_int8 = cache.key.dtype == jnp.int8
  for name in ("score", "key_scale", "value_scale"):
    array = getattr(cache, name)
    if name != "score" and not is_int8:
      if array is not None:
        raise ValueError(
            f"cache.{name} is for int8; with {cache.key.dtype} it must be None"
        )
      continue
    dtype = getattr(array, "dtype", type(array).__name__)
    if dtype != jnp.float32 or array.shape != lead:
      raise ValueError(
          f"cache.{name} is {dtype} {getattr(array, 'shape', '')}; it must be"
          f" float32 {lead}"
      )
  if cache.votes is not None:
    check_int32("cache.votes", cache.votes, lead)


def _module(implementation: str) -> types.ModuleType:
  return importlib.import_module(f"{__package__}.{implementation}")
