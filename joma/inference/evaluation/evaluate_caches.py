"""The caches of an evaluation, by a policy's name, and what they cost."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from joma.inference.cache import kv_cache as kv_cache_lib
from joma.inference.cost import cache_plan
from joma.inference.cost import cost_model
from joma.inference.evaluation import evaluate_config
from joma.systems.cache_policies import names as policy_names
from joma.systems.cache_policies.own_cache import quest
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors

Config = evaluate_config.EvaluateConfig
# Of slots: their place alone decides who leaves.
_BY_PLACE = ("full", "window", "streaming_llm", "random")


def make(
    config: Config,
    shape: configs.TransformerConfig,
    name: str,
    slots: int,
    batch_size: int,
    seed: int = 0,
    num_new: int = 0,
) -> tuple[Any, ...]:
  """Returns empty caches of a policy.

  Windows of a prompt's last queries shrink to half of small caches. Quest keeps
  everything and reads so many slots, in whole pages.

  Args:
    config: Settings.
    shape: The model's.
    name: As `policy_names.parse` takes it.
    slots: Of a KV head.
    batch_size: B.
    seed: Of policies that draw; a seed in the name goes before.
    num_new: Tokens beyond the text, for which those that keep everything need
      room.

  Raises:
    UserError: The policy does not fit so few slots.
  """
  policy: Any = policy_names.parse(name)
  if hasattr(policy, "seed") and "seed=" not in name:
    policy = dataclasses.replace(policy, seed=seed)
  if isinstance(policy, quest.Quest):
    num_keys = slots // policy.page_size * policy.page_size
    policy = dataclasses.replace(
        policy, num_keys=max(num_keys, policy.page_size)
    )
    slots = config.length + num_new
  window = getattr(policy, "window", None)
  if window is not None and "window=" not in name:
    window = max(1, min(window, slots // 2))
    policy = dataclasses.replace(policy, window=window)
  try:
    return kv_cache_lib.init(
        policy,
        shape,
        batch_size,
        slots,
        jnp.dtype(config.cache_dtype),
        positions=config.positions,
    )
  except errors.UserError as error:
    raise errors.UserError(
        f"policies={name}, {slots} slots: {error}"
    ) from error


def cost(
    config: Config,
    model: models.Transformer,
    name: str,
    slots: int,
    text_shape: tuple[int, int],
) -> dict[str, Any]:
  """Returns bytes by the cost model and of the real arrays.

  Args:
    config: Settings.
    model: Its sizes and type count.
    name: As `policy_names.parse` takes it.
    slots: Of a KV head.
    text_shape: (B, T).
  """
  batch_size, length = text_shape
  caches = make(config, model.config, name, slots, batch_size)
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
  base = name.split(":")[0]
  if base == "quest":
    capacities = (caches[0].kept.key.shape[2],)
    num_keys = min(caches[0].policy.num_keys, *capacities)
    plan = cache_plan.quest(num_keys, caches[0].policy.page_size)
  else:
    capacities = tuple(_capacity(cache) for cache in caches)
    plan = cache_plan.scored(capacities, name)
  if base == "full":
    plan = cache_plan.full()
  elif base in _BY_PLACE:
    plan = cache_plan.window(capacities, name)
  dtype = np.dtype(model.dtype).name
  load = cost_model.Load(
      batch_size=batch_size,
      length=max(length, *capacities),
      weight_dtype="float32" if dtype == "float32" else "bfloat16",
      cache_dtype=config.cache_dtype,
  )
  work = cost_model.decode(model.config, load, plan, counts_lookup=False)
  return {
      "step_bytes": int(work.num_bytes),
      "step_cache_bytes": int(work.cache_bytes),
      "cache_bytes": held,
  }


def _capacity(cache: Any) -> int:
  """Slots of a layer, a KV head on average."""
  if hasattr(cache, "owner"):
    return cache.owner.shape[1] // cache.num_kv_heads
  return cache.pos.shape[2]
