"""The best placement, beside those that let less lie in the host's memory."""

import dataclasses
from typing import Any

from joma.inference.cost import offload
from joma.scale.offload import offload_config

Summary = dict[str, Any]

# What may lie in the host's memory.
WAYS: dict[str, dict[str, bool]] = {
    "all on the chip": dict(
        host_weights=False, host_cache=False, host_stream=False
    ),
    "weights in the host": dict(host_cache=False, host_stream=False),
    "caches in the host": dict(host_weights=False, host_stream=False),
    "anything": {},
}


def make(config: offload_config.OffloadConfig) -> Summary:
  """Searches.

  Args:
    config: The question.

  Returns:
    Plain JSON types: `question`; `rows`, the best placement of each way, with
    "fits" False where there is none; `finding`, sentences.
  """
  work, machine = config.work(), config.machine()
  rows = []
  for way, may in WAYS.items():
    found = offload.search(work, machine, config.max_batch, **may)
    rows.append(
        {"way": way, **({"fits": False} if found is None else _row(found))}
    )
  return {
      "question": dataclasses.asdict(config),
      "num_layers": work.num_layers,
      "rows": rows,
      "finding": _finding(config, rows),
  }


def _row(found: offload.Found) -> Summary:
  return {
      "fits": True,
      **dataclasses.asdict(found.placement),
      "device_gb": found.device_bytes / 1e9,
      "host_gb": found.host_bytes / 1e9,
      "seconds": dict(found.seconds),
      "bound": found.bound,
      "step_seconds": found.step_seconds,
      "tokens_per_sec": found.tokens_per_sec,
  }


def _finding(
    config: offload_config.OffloadConfig, rows: list[Summary]
) -> list[str]:
  alone, best = rows[0], rows[-1]
  if not best["fits"]:
    return [
        f"{config.shape} fits into {config.chip} and {config.host_gb:g} GB of"
        " its host in no way, not for one sequence."
    ]
  lines = [
      f"Most tokens per second: {best['tokens_per_sec']:.4g} with batch"
      f" {best['batch_size']}, weights of {best['host_weights']} and caches of"
      f" {best['host_cache']} layers in the host, bound by {best['bound']}."
  ]
  if alone["fits"]:
    gain = best["tokens_per_sec"] / alone["tokens_per_sec"]
    lines.append(f"That is {gain:.3g} times what the chip alone gives.")
  else:
    lines.append("The chip alone does not hold it.")
  return lines
