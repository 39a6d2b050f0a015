"""Rows of costs by length, batch and policy: when does eviction pay?

A row compares a decode step of one policy with one that keeps everything, on
each chip. What a policy costs is its own to say.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from joma.inference.cost import cache_plan
from joma.inference.cost import chips as chips_lib
from joma.inference.cost import cost_model
from joma.inference.cost import cost_table_config
from joma.inference.cost import model_size
from joma.systems.cache_policies import names as policy_names
from joma.transformer.config import TransformerConfig

Row = Mapping[str, Any]
# Of the time of a step: less is not worth the tokens that are lost.
_PAYS = 1.1


def make(config: cost_table_config.CostTableConfig) -> dict[str, Any]:
  """Computes the table.

  Returns:
    Plain JSON types: `model`, its size; `rows`, each with `length`,
    `batch_size`, `policy`, `kept`, bytes and FLOPs of `decode` and `prefill`,
    and `chips`, by name, with `ms` a step, `prefill_ms`, `fits`, `speed_up`
    over the full cache (None where that does not fit), `largest_batch` and
    `tokens_per_sec` at it; `chips`, the figures used; `finding`, sentences.

  Raises:
    UserError: A setting does not fit the model.
  """
  rows = []
  for length in config.lengths:
    for batch_size in config.batch_sizes:
      load = cost_model.Load(
          batch_size=batch_size,
          length=length,
          weight_dtype=config.weight_dtype,
          cache_dtype=config.cache_dtype,
      )
      full = _row(config, load, cache_plan.full(), None, None)
      rows.append(full)
      rows += [
          _row(config, load, plan, kept, full)
          for plan, kept in plans(config, length)
      ]
  machines = {
      chip.name: {
          "memory_gb": None if chip.hbm_bytes is None else chip.hbm_bytes / 1e9,
          "bandwidth_gbs": chip.bytes_per_sec / 1e9,
          "peak_tflops": chip.flops_per_sec / 1e12,
          "source": chip.source,
      }
      for chip in config.machines()
  }
  model = _model(config)
  return {
      "model": model,
      "rows": rows,
      "chips": machines,
      "finding": findings(model, rows) + _left_out(rows),
  }


def plans(
    config: cost_table_config.CostTableConfig, length: int
) -> list[tuple[cache_plan.CachePlan, float | None]]:
  """Returns the plans of all policies, with the fraction that each keeps."""
  # Policies import jax, which no flag and no other row of the table needs.
  from joma.inference.cache import calls

  found: list[tuple[cache_plan.CachePlan, float | None]] = []
  for name in config.policies:
    if name == cost_table_config.CONTEXTUAL:
      found.append((cache_plan.CachePlan(name=name), None))
      continue
    policy, named = policy_names.costed(name), policy_names.settings(name)
    settings = {k: v for k, v in config.settings().items() if k not in named}
    for kept in config.kept:
      room = cache_plan.Room(
          kept=kept, length=length, model=config.shape, settings=settings
      )
      found.append((calls.costed(policy, room, name), kept))
  return found


def findings(model: Mapping[str, Any], rows: list[Row]) -> list[str]:
  """Says when eviction pays, in sentences."""
  weights = f"Weights are {model['weight_gb']:.2f} GB"
  found = [f"{weights}; no layer's cache grows with the text."]
  if model["break_even_tokens"] is not None:
    found = [
        f"{weights}, a token's keys and values {model['token_kib']:.4g} KiB: a"
        " full cache is as much as the weights at batch x length ="
        f" {model['break_even_tokens']:,.0f} tokens."
    ]
  changed = [row for row in rows if row["policy"] != policy_names.REFERENCE]
  gains = [
      (chip["speed_up"], name, row)
      for row in changed
      for name, chip in row["chips"].items()
      if chip["speed_up"] is not None and chip["fits"]
  ]
  if gains:
    for word, (gain, name, row) in (
        ("Least", min(gains, key=lambda gain: gain[0])),
        ("Most", max(gains, key=lambda gain: gain[0])),
    ):
      found.append(
          f"{word} gain: {gain:.2f} times less time, {_place(row)} on {name}."
      )
  rooms = [
      (chip["throughput_gain"], name, row)
      for row in changed
      for name, chip in row["chips"].items()
      if chip["throughput_gain"] is not None
  ]
  if rooms:
    gain, name, row = max(rooms, key=lambda room: room[0])
    found.append(
        f"With the largest batch that fits, up to {gain:.1f} times the tokens"
        f" per second: {row['policy']} at {row['length']:,} tokens on {name}."
    )
  return found


def _left_out(rows: list[Row]) -> list[str]:
  """Says what no figure of the attention systems holds."""
  unknown = [
      what
      for row in rows
      for call in ("decode", "prefill")
      for what in row[call]["unknown"]
  ]
  named = ", ".join(dict.fromkeys(unknown))
  return [f"Not counted, and not nothing: {named}."] if named else []


def verdict(row: Row) -> str:
  """Whether a row's policy pays on some chip, in a word or two."""
  if row["policy"] == policy_names.REFERENCE:
    return ""
  seen = row["chips"].values()
  gains = [c["speed_up"] for c in seen if c["fits"] and c["speed_up"]]
  if gains and max(gains) >= _PAYS:
    return "pays"
  if any(c["fits"] and c["speed_up"] is None for c in seen):
    return "makes it fit"
  return "does not pay" if gains else "does not fit"


def _place(row: Row) -> str:
  kept = "" if row["kept"] is None else f" keeping {100 * row['kept']:g} %"
  return (
      f"{row['policy']}{kept} at batch {row['batch_size']}, length"
      f" {row['length']:,},"
  )


def _model(config: cost_table_config.CostTableConfig) -> dict[str, Any]:
  load = cost_model.Load(
      batch_size=1,
      length=1,
      weight_dtype=config.weight_dtype,
      cache_dtype=config.cache_dtype,
  )
  size = model_size.count(config.shape)
  itemsize = cost_model.ITEMSIZE[config.weight_dtype]
  tokens = cost_model.break_even_tokens(config.shape, load)
  return {
      "parameters": size.total,
      "weight_gb": size.total * itemsize / 1e9,
      "lookup_gb": size.lookup * itemsize / 1e9,
      "token_kib": cost_model.token_bytes(config.shape, load) / 1024,
      "break_even_tokens": None if math.isinf(tokens) else tokens,
  }


def _row(
    config: cost_table_config.CostTableConfig,
    load: cost_model.Load,
    plan: cache_plan.CachePlan,
    kept: float | None,
    full: Row | None,
) -> dict[str, Any]:
  model: TransformerConfig = config.shape
  sparsity = (
      config.sparsity() if plan.name == cost_table_config.CONTEXTUAL else None
  )
  lookup = config.counts_lookup
  step = cost_model.decode(model, load, plan, sparsity, counts_lookup=lookup)
  prompt = cost_model.prefill(model, load, plan, counts_lookup=lookup)
  row = {
      "length": load.length,
      "batch_size": load.batch_size,
      "policy": plan.name,
      "kept": kept,
      "cache_gb": cost_model.cache_bytes(model, load, plan) / 1e9,
      "memory_gb": step.memory_bytes / 1e9,
      "decode": _numbers(step),
      "prefill": _numbers(prompt),
      "chips": {},
  }
  for chip in config.machines():
    base = None if full is None else full["chips"][chip.name]
    row["chips"][chip.name] = _on(chip, step, prompt, base) | _at_most(
        config, load, plan, sparsity, chip, base
    )
  row["verdict"] = verdict(row)
  return row


def _numbers(cost: cost_model.Cost) -> dict[str, Any]:
  return {
      "weight_bytes": round(cost.weight_bytes),
      "cache_bytes": round(cost.cache_bytes),
      "flops": round(cost.flops),
      "memory_bytes": round(cost.memory_bytes),
      "unknown": list(cost.unknown),
  }


def _on(
    chip: chips_lib.Chip,
    step: cost_model.Cost,
    prompt: cost_model.Cost,
    base: Mapping[str, Any] | None,
) -> dict[str, Any]:
  ms = 1e3 * step.seconds(chip)
  return {
      "ms": ms,
      "bound": step.bound(chip),
      "prefill_ms": 1e3 * prompt.seconds(chip),
      "fits": chip.fits(step.memory_bytes),
      "speed_up": base["ms"] / ms if base and base["fits"] else None,
  }


def _at_most(
    config: cost_table_config.CostTableConfig,
    load: cost_model.Load,
    plan: cache_plan.CachePlan,
    sparsity: cost_model.ContextualSparsity | None,
    chip: chips_lib.Chip,
    base: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """Tokens per second with the largest batch that fits."""
  most = cost_model.largest_batch(config.shape, load, plan, chip)
  found: dict[str, Any] = {
      "largest_batch": most,
      "tokens_per_sec": None,
      "throughput_gain": None,
  }
  if most:
    crowd = dataclasses.replace(load, batch_size=most)
    cost = cost_model.decode(
        config.shape,
        crowd,
        plan,
        sparsity,
        counts_lookup=config.counts_lookup,
    )
    found["tokens_per_sec"] = most / cost.seconds(chip)
    if base and base["tokens_per_sec"]:
      gain = found["tokens_per_sec"] / base["tokens_per_sec"]
      found["throughput_gain"] = gain
  return found
