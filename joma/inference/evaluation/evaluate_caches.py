"""The caches of an evaluation, by a policy's name, and what they cost."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from joma.inference.cache import calls
from joma.inference.cache import kv_cache as kv_cache_lib
from joma.inference.cache import policy as policy_lib
from joma.inference.cost import cost_model
from joma.inference.evaluation import evaluate_config
from joma.systems.cache_policies import names as policy_names
from joma.transformer import config as configs
from joma.transformer import layer_hooks
from joma.transformer import model as models
from scansnap_jax.experiment import errors

Config = evaluate_config.EvaluateConfig


def names_of(
    config: Config, shape: configs.TransformerConfig
) -> tuple[str, ...]:
  """Policies that are evaluated.

  Where a layer's system keeps what it needs itself, nothing evicts from it: of
  the policies that always stand beside, those that evict are left out.
  """
  layers = [layer_hooks.of_layer(shape, n) for n in range(shape.num_layers)]
  if not any(own.mixer or own.select for own in layers):
    return config.all_policies()
  always, *others = config.all_policies()
  return (always, *(name for name in others if name in config.policies))


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

  Its sizes follow the slots (`calls.fitted`); what keeps everything and reads
  a part has room for the whole text.

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
  policy = _fitted(name, slots, seed)
  if policy.reads_part:
    slots = config.length + num_new
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


def _fitted(name: str, slots: int, seed: int = 0) -> policy_lib.Policy:
  policy, named = policy_names.parse(name), policy_names.settings(name)
  if policy.draws and "seed" not in named:
    policy = dataclasses.replace(policy, seed=seed)
  return calls.fitted(policy, slots, named)


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
  # What a layer's system keeps itself is as long as the text.
  inner = [layer_hooks.inner(cache) for cache in caches]
  capacities = tuple(getattr(cache, "capacity", length) for cache in inner)
  policy = getattr(inner[0], "policy", None) or _fitted(name, slots)
  plan = calls.plan(policy, capacities, name)
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
