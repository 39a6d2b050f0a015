"""What attention systems add to a model's costs, counted from their own code.

A token, or a text, is traced through the model with its systems and without:
the difference of their matrix products is the systems'. Their caches and
parameters are those that they make. So no system says what it costs, and none
is forgotten; what a trace cannot tell is named, and never counted as nothing.

Letters: B batch, T tokens, L layers, N query heads, H head size.
"""

import dataclasses
import functools
from typing import Any

from joma.systems import names
from joma.transformer import config as configs

Config = configs.TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
  """What systems keep of one sequence, beside or in the place of slots.

  Attributes:
    owners: Layers whose systems keep a cache of their own; no slot is theirs.
    held: Bytes of the systems' caches and states.
  """

  owners: frozenset[int] = frozenset()
  held: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """What a decode step of one sequence has besides.

  Attributes:
    flops: Beyond those of plain attention to the slots of layers without a
      cache of their own.
    moved: Bytes of what systems keep that are read and written.
    unknown: What could not be counted, in words.
  """

  flops: int = 0
  moved: int = 0
  unknown: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
  """What a prompt of one sequence has besides.

  Attributes:
    plain: Layers whose pairs are those of plain attention.
    flops: Beyond those of plain attention in these layers.
    unknown: What could not be counted, in words.
  """

  plain: frozenset[int]
  flops: int = 0
  unknown: tuple[str, ...] = ()


def has_systems(config: Config) -> bool:
  """Whether any layer has one."""
  return any(map(names.parts, config.attention))


def num_params(config: Config) -> int:
  """Numbers in the parameters of all systems, less those that they save."""
  if not has_systems(config):
    return 0
  import jax

  short, times = _period(config)
  with_systems, without = (
      sum(leaf.size for leaf in jax.tree.leaves(_model(one)[1]))
      for one in (short, dataclasses.replace(short, attention=()))
  )
  return times * (with_systems - without)


@functools.cache
def of_cache(config: Config, length: int, dtype: str) -> Cache:
  """Counts what systems keep.

  Args:
    config: The model's.
    length: T.
    dtype: Of keys and values; what is int8 elsewhere is bfloat16 in the caches
      of systems, which know no scales.
  """
  if not has_systems(config):
    return Cache()
  short, times = _period(config)
  _, own = _caches(short, length, dtype)
  layers = range(config.num_layers)
  return Cache(
      owners=frozenset(i for i in layers if _is_owner(config, i)),
      held=times * sum(leaf.size * leaf.dtype.itemsize for _, leaf in own),
  )


@functools.cache
def of_step(config: Config, length: int, dtype: str) -> Step:
  """Counts a decode step.

  Args:
    config: The model's.
    length: T, the new token's included.
    dtype: As in `of_cache`.
  """
  if not has_systems(config):
    return Step()
  # Systems are traced, which takes jax.
  from joma.inference.cost import traced

  short, times = _period(config)
  caches, own = _caches(short, length, dtype)
  bare = dataclasses.replace(short, attention=())
  kept = of_cache(config, length, dtype)
  try:
    found = _trace_step(short, caches, tuple(place for place, _ in own))
    plain = _trace_step(bare, _caches(bare, length, dtype)[0])
  except traced.Unknown:
    # All that is kept, once: the cache is told, and not the products.
    return Step(moved=kept.held, unknown=("products of a step",))
  slots = 4 * config.num_heads * config.head_dim * length
  return Step(
      flops=times * (found.flops - plain.flops) + slots * len(kept.owners),
      moved=times * sum(found.moved),
  )


@functools.cache
def of_pass(config: Config, length: int) -> Pass:
  """Counts a prompt of T tokens, by the products of the plain reference.

  Of a selector these are the search, and the pairs of as many blocks as it
  lists at most.
  """
  every = range(config.num_layers)
  if not has_systems(config):
    return Pass(plain=frozenset(every))
  from joma.inference.cost import traced

  short, times = _period(config)
  bare = dataclasses.replace(short, attention=())
  try:
    found = _trace_pass(short, length) - _trace_pass(bare, length)
  except traced.Unknown:
    return Pass(plain=frozenset(every), unknown=("products of a prompt",))
  # A softmax's pairs cancel: the reference computes them all in both.
  pairs = 4 * config.num_heads * config.head_dim * length**2
  others, unknown = set(), []
  for layer in range(short.num_layers):
    own = _systems_of(short, layer)
    if own.mixer is not None or not _is_softmax(short, layer):
      others.add(layer)
      found += pairs
    elif own.select is not None:
      others.add(layer)
      chosen = _chosen_pairs(short, layer, length)
      if chosen is None:
        unknown.append(f"what {own.select.name} leaves out of a prompt")
      found += pairs // 2 if chosen is None else 4 * config.head_dim * chosen
  return Pass(
      plain=frozenset(i for i in every if i % short.num_layers not in others),
      flops=times * found,
      unknown=tuple(dict.fromkeys(unknown)),
  )


def _period(config: Config) -> tuple[Config, int]:
  """A model of one period of the pattern, and how often it repeats.

  Layers that take from others have no period: which they take from, and whether
  they do, depends on their place.
  """
  period, windows = len(config.attention), config.windows
  hands_on = any(
      own.share is not None or own.carry is not None
      for own in (_systems_of(config, layer) for layer in range(period))
  )
  if hands_on or windows != windows[:period] * (config.num_layers // period):
    return config, 1
  short = dataclasses.replace(
      config, num_layers=period, windows=windows[:period]
  )
  return short, config.num_layers // period


def _is_owner(config: Config, layer: int) -> bool:
  own = _systems_of(config, layer)
  return own.mixer is not None or own.select is not None


def _chosen_pairs(config: Config, layer: int, length: int) -> int | None:
  """Pairs of all heads that a selector lists at most; None is not known."""
  import jax
  import jax.numpy as jnp

  from kernels_pallas import masks

  system = _systems_of(config, layer).select

  def select(query: Any, key: Any) -> Any:
    call = _call(config, layer, system, length)
    params = call.params[system.name]
    return system.select(params, call, query, key, masks.causal(length))

  shape = lambda heads: jax.ShapeDtypeStruct(
      (1, length, heads, config.head_dim), jnp.float32
  )
  try:
    made = jax.eval_shape(
        select, shape(config.num_heads), shape(config.num_kv_heads)
    )
  except KeyError:  # It reads what another layer hands on.
    return None
  causal = length * (length + 1) // 2
  if isinstance(made, masks.Mask):  # It leaves nothing out.
    return causal * config.num_heads
  *_, rows, width = made.block_table.shape
  listed = rows * made.block_q * width * made.block_kv
  return min(listed, causal) * config.num_heads


def _systems_of(config: Config, layer: int) -> Any:
  from joma.transformer import layer_hooks

  return layer_hooks.of_layer(config, layer)


def _is_softmax(config: Config, layer: int) -> bool:
  """Whether a layer's weights are softmax's, or softmax with more in it."""
  import jax

  system = _systems_of(config, layer).weights
  if system is None:
    return True
  found: list[bool] = []

  def make() -> None:
    call = _call(config, layer, system, 1)
    rule = system.weights(call.params[system.name], call)
    found.append(rule.is_softmax)

  jax.eval_shape(make)
  return found[0]


def _call(config: Config, layer: int, system: Any, length: int) -> Any:
  """A call of a text of zeros, to ask a system for shapes."""
  import jax
  import jax.numpy as jnp

  from joma.transformer import hooks

  x = jnp.zeros((1, length, config.embed_dim))
  params = {}
  if isinstance(system, hooks.Parametric):
    params = system.init_params(jax.random.key(0), config, layer)
  return hooks.Call(
      config=config,
      layer=layer,
      x=x,
      positions=jnp.arange(length)[None],
      rotate=lambda x, positions: x,
      options=hooks.AttentionOptions(scale=1.0),
      params={system.name: params},
      carry={"resid_embed": x},
      is_training=False,
      has_cache=False,
  )


def _caches(config: Config, length: int, dtype: str) -> tuple[Any, Any]:
  """Shapes of all caches, and the systems' leaves with their places."""
  import jax

  from joma.transformer import full_cache
  from joma.transformer import layer_hooks

  dtype = "bfloat16" if dtype == "int8" else dtype
  make = functools.partial(full_cache.init, config, 1, length, dtype)
  caches = jax.eval_shape(make)
  own, start = [], 0
  for layer, cache in enumerate(caches):
    leaves = jax.tree.leaves(cache)
    num = len(leaves)
    if not _is_owner(config, layer):
      # The slots are a policy's to keep; a state beside them comes last.
      is_prepared = isinstance(cache, layer_hooks.PreparedCache)
      num = len(jax.tree.leaves(cache.state)) if is_prepared else 0
    first = len(leaves) - num
    own += list(enumerate(leaves[first:], start + first))
    start += len(leaves)
  return caches, own


def _model(config: Config) -> tuple[Any, Any]:
  """The model and its parameters' shapes."""
  import jax
  import jax.numpy as jnp

  from joma.transformer import model as models

  model = models.Transformer(config, implementation="reference")
  made = jax.eval_shape(
      model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )
  return model, made


def _trace_step(config: Config, caches: Any, own: tuple[int, ...] = ()) -> Any:
  import jax
  import jax.numpy as jnp

  from joma.inference.cost import traced

  model, params = _model(config)
  one = jax.ShapeDtypeStruct((1, 1), jnp.int32)

  def call(caches: Any, params: Any, tokens: Any, positions: Any) -> Any:
    return model.apply(params, tokens, positions=positions, kv_cache=caches)

  return traced.trace(call, (caches, params, one, one), own)


def _trace_pass(config: Config, length: int) -> int:
  import jax
  import jax.numpy as jnp

  from joma.inference.cost import traced

  # Learned positions end somewhere, and cost no product.
  long = dataclasses.replace(config, max_len=max(config.max_len, length))
  model, params = _model(long)
  text = jax.ShapeDtypeStruct((1, length), jnp.int32)
  return traced.trace(model.apply, (params, text)).flops
