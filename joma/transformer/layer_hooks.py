"""The systems of a layer, and the calls that concern several of them.

Letters as in `hooks`.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Float, PyTree
import numpy as np

from joma.systems import names
from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import implementations
from kernels_pallas import masks
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True)
class LayerSystems:
  """The systems of one layer, each protocol's at most one; None where none is.

  Attributes:
    systems: All of them, in the order of the entry.
    read: Of that protocol, and so on.
    share: Likewise.
    prepare: All of that protocol: each changes what the one before it made.
    weights: Likewise.
    select: Likewise.
    mixer: Likewise.
    gate: Likewise.
    losses: Likewise.
    carry: Likewise.
    probe: Likewise.
  """

  systems: tuple[Any, ...] = ()
  read: hooks.Read | None = None
  share: hooks.Share | None = None
  prepare: tuple[hooks.Prepare, ...] = ()
  weights: hooks.Weights | None = None
  select: hooks.Select | None = None
  mixer: hooks.Mixer | None = None
  gate: hooks.Gate | None = None
  losses: hooks.Losses | None = None
  carry: hooks.Carry | None = None
  probe: hooks.Probe | None = None

  def takes(self, config: configs.TransformerConfig, layer: int) -> bool:
    """Whether the layer's queries and keys are those of an earlier one."""
    return self.share is not None and not self.share.is_source(config, layer)


_PROTOCOLS: dict[str, Any] = {
    "read": hooks.Read,
    "share": hooks.Share,
    "prepare": hooks.Prepare,
    "weights": hooks.Weights,
    "select": hooks.Select,
    "mixer": hooks.Mixer,
    "gate": hooks.Gate,
    "losses": hooks.Losses,
    "carry": hooks.Carry,
    "probe": hooks.Probe,
}


def of_layer(config: configs.TransformerConfig, layer: int) -> LayerSystems:
  """Returns the systems of a layer.

  Raises:
    UserError: If two of them do the same, or do not go together.
  """
  entry = names.entry_of(config.attention, layer)
  systems = tuple(names.make(part) for part in names.parts(entry))
  found: dict[str, Any] = {}
  for system in systems:
    for kind, protocol in _PROTOCOLS.items():
      if not isinstance(system, protocol):
        continue
      if kind == "prepare":
        found[kind] = (*found.get(kind, ()), system)
        continue
      if kind in found:
        raise errors.UserError(
            f"attention={entry!r}: {found[kind].name} and {system.name} both"
            f" are of the kind {kind}; a layer has one at most."
        )
      found[kind] = system
  # A mixer has no logits: nothing to choose blocks or weights by.
  if "mixer" in found:
    for kind in ("select", "weights"):
      if kind in found and found[kind] is not found["mixer"]:
        raise errors.UserError(
            f"attention={entry!r}: {found['mixer'].name} takes the place of"
            f" attention and leaves nothing to {found[kind].name}."
        )
  return LayerSystems(systems, **found)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedCache:
  """A layer's cache and the states of its `Prepare` systems.

  Attributes:
    kv_cache: A KVCache.
    state: Of each system that has one, by its name, as `Prepare.init_state`
      makes it.
  """

  kv_cache: PyTree
  state: PyTree


def inner(cache: PyTree) -> PyTree:
  """What keeps keys and values, without the states of others beside it."""
  return cache.kv_cache if isinstance(cache, PreparedCache) else cache


def init_cache(
    config: configs.TransformerConfig,
    layer: int,
    batch_size: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
    default: Callable[[], hooks.KVCache],
    policy: str | None = None,
) -> PyTree:
  """Returns the empty cache of a layer: its systems', or the default.

  Args:
    config: The model's.
    layer: Which, from 0.
    batch_size: B.
    capacity: Positions of the longest text.
    dtype: Of keys and values.
    default: Makes the cache of a layer whose systems have none.
    policy: What evicts from the default; None where nothing does.

  Raises:
    UserError: If there is a policy and nothing that it could evict from.
  """
  own = of_layer(config, layer)
  owner = own.mixer or own.select
  if owner is None:
    kv_cache = default()
  elif policy is not None:
    raise errors.UserError(
        f"{policy} has nothing to evict from in layer {layer}, where"
        f" {owner.name} keeps what it needs itself."
    )
  else:
    kv_cache = owner.init_cache(config, layer, batch_size, capacity, dtype)
  states = {
      system.name: state
      for system in own.prepare
      if (state := system.init_state(config, layer, batch_size)) is not None
  }
  return PreparedCache(kv_cache, states) if states else kv_cache


def prepare(
    systems: tuple[hooks.Prepare, ...],
    call: hooks.Call,
    query: Float[Array, "#B T N H"],
    key: Float[Array, "#B T K H"],
    value: Float[Array, "B T K H"],
    kv_cache: PyTree,
) -> tuple[Array, Array, Array, PyTree]:
  """Lets systems prepare, one after the other.

  Returns:
    Query, key and value of the last, and the cache with the states.

  Raises:
    UserError: If the cache lacks the state of one.
  """
  has_states = isinstance(kv_cache, PreparedCache)
  states = dict(kv_cache.state) if has_states else {}
  for system in systems:
    state = states.get(system.name)
    if call.has_cache and state is None:
      _check_stateless(system, call, kv_cache)
    query, key, value, state = system.prepare(
        call.params[system.name], call, query, key, value, state
    )
    if state is not None:
      states[system.name] = state
  if has_states:
    kv_cache = dataclasses.replace(kv_cache, state=states)
  return query, key, value, kv_cache


def _check_stateless(
    system: hooks.Prepare, call: hooks.Call, kv_cache: PyTree
) -> None:
  """Raises UserError if a system wants a state that the cache does not keep."""
  if system.init_state(call.config, call.layer, 1) is not None:
    raise errors.UserError(
        f"{system.name} carries something from token to token, which this"
        f" {type(kv_cache).__name__} does not keep: make the cache with the"
        " model's config."
    )


def check_causal(name: str, call: hooks.Call, mask: masks.Mask) -> None:
  """Raises UserError where a mixer that reads all before itself may not.

  Padding at the ends of texts needs no mask: nothing before it sees it.
  """
  plain = masks.causal(mask.starts.shape[-1])
  same = [
      isinstance(one, np.ndarray) and np.array_equal(one, two)
      for one, two in (
          (mask.starts, plain.starts),
          (mask.stops, plain.stops),
      )
  ]
  if not all(same) or mask.query_ids is not None or call.options.window:
    raise errors.UserError(
        f"{name} reads all that comes before a token: layer {call.layer} can"
        " follow no window and no mask but the causal one."
    )


def check_implementation(
    rule: hooks.WeightRule,
    implementation: implementations.Implementation | None,
) -> None:
  """Raises UserError where kernels are named that cannot follow a rule."""
  if implementation in ("pallas_tpu", "pallas_gpu"):
    raise errors.UserError(
        f"implementation={implementation} knows softmax alone and cannot follow"
        f" {rule.name}: leave it out, or give xla."
    )


def check(config: configs.TransformerConfig) -> None:
  """Raises UserError if a layer's systems do not go together."""
  for layer in range(min(config.num_layers, len(config.attention))):
    of_layer(config, layer)


def has_params(
    system: hooks.System, config: configs.TransformerConfig, layer: int
) -> bool:
  """Whether a system, with its options, has parameters in a layer."""
  if not isinstance(system, hooks.Parametric):
    return False
  draw = functools.partial(system.init_params, config=config, layer=layer)
  return bool(jax.eval_shape(draw, jax.random.key(0)))


def over(
    config: configs.TransformerConfig, attention: tuple[str, ...]
) -> configs.TransformerConfig:
  """Lays systems without parameters of their own over a model.

  Args:
    config: Of a model whose parameters are there.
    attention: Entries as in `TransformerConfig`; none leaves all as it is.

  Raises:
    UserError: If one of them, or one that the model has, has parameters, or if
      they do not go together.
  """
  if not attention:
    return config
  changed = dataclasses.replace(config, attention=attention)
  for kind, has in (("lacks", changed), ("has and would not use", config)):
    for layer in range(config.num_layers):
      for system in of_layer(has, layer).systems:
        if has_params(system, has, layer):
          raise errors.UserError(
              f"attention={','.join(attention)}: {system.name} has parameters"
              f" of its own, which this model {kind}: lay only systems without"
              " parameters over a model, or train one with launch.train_lm"
              " --model.attention."
          )
  return changed


def check_trainable(config: configs.TransformerConfig) -> None:
  """Raises UserError if a system would show a language model its targets."""
  for layer in range(min(config.num_layers, len(config.attention))):
    for system in of_layer(config, layer).systems:
      if isinstance(system, hooks.SeesLater):
        raise errors.UserError(
            f"{system.name} lets later tokens change what earlier ones give"
            f" ({system.sees_later}): no language model is trained with it."
        )


def with_weights(own: LayerSystems, call: hooks.Call) -> hooks.Call:
  """Puts the rule of a layer's weights into its options."""
  if own.weights is None:
    return call
  rule = own.weights.weights(call.params[own.weights.name], call)
  options = dataclasses.replace(call.options, weights=rule)
  return dataclasses.replace(call, options=options)


def attend(
    own: LayerSystems,
    call: hooks.Call,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    kv_cache: PyTree,
) -> tuple[Float[Array, "B T N H"], PyTree]:
  """Attends with a cache.

  Raises:
    UserError: If the cache would pass over one of the layer's systems.
  """
  is_prepared = isinstance(kv_cache, PreparedCache)
  inner = kv_cache.kv_cache if is_prepared else kv_cache
  # A cache that does not say so honours nothing: rules are never passed over.
  honours = getattr(inner, "honours", ())
  rule, owner = call.options.weights, own.mixer or own.select
  wanted = {} if rule is None else {rule.kind: rule.name}
  wanted |= {} if owner is None else {owner.name: owner.name}
  for kind, name in wanted.items():
    if kind not in honours:
      instead = "leave the policy out and keep everything, as `full_cache.init`"
      if owner is not None and name != owner.name:  # The cache is its own.
        instead = f"steps follow {owner.name} or {name}, not both; a pass"
      raise errors.UserError(
          f"{type(inner).__name__} cannot follow {name}, which layer"
          f" {call.layer} has: {instead} does."
      )
  options = call.options
  if own.systems or (isinstance(inner, hooks.ReadsCall) and inner.reads_call()):
    options = dataclasses.replace(options, call=call)
  out, inner = inner.attend(
      query, key, value, call.positions, call.rotate, options
  )
  if is_prepared:
    return out, dataclasses.replace(kv_cache, kv_cache=inner)
  return out, inner
