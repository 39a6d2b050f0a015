"""Figure 4 of JoMA: attention gets sparse, then dense again.

  v <- v + eta (mu - v) o softmax(v^2 / T)

from one value for all components (https://arxiv.org/abs/2310.00535). Salient
components, those with large mu, get there first; the entropy of the attention
softmax(v^2 / T) falls meanwhile, and rises when the others follow. Nothing is
random: with the paper's mu the trajectory is one set of numbers.

Letters: S steps, J components.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from joma import config as config_lib
from joma.theory import convergence

_TABLED = (0, 100, 300, 500, 1000, 2000, 4999)
_CURVE_POINTS = 500


def measure(
    config: config_lib.Figure4Config,
    *,
    on_metrics: Callable[[int, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
  """Iterates the map in float32.

  Args:
    config: The settings.
    on_metrics: Called with the step and the entropy before it.

  Returns:
    `min_entropy` and `min_step`, over the steps; `entropy_at` some of them (by
    the step as text), each before its update; `v_final` [J], after the last
    update; `mu`; for the figure `curve`: steps, v [S, J] and entropy [S] before
    each; and the finding.
  """
  path = jax.device_get(
      jax.jit(
          lambda mu: convergence.figure4_path(
              mu,
              initial=config.initial,
              temperature=config.temperature,
              step_size=config.step_size,
              num_steps=config.num_steps,
          )
      )(jnp.array(config.mu, jnp.float32))
  )
  entropy = path.entropy[:-1]
  every = -(-config.num_steps // _CURVE_POINTS)
  shown = np.arange(0, config.num_steps, every)
  if on_metrics is not None:
    for step in shown.tolist():
      on_metrics(step, {"entropy": entropy[step]})
  summary = {
      "min_entropy": float(entropy.min()),
      "min_step": int(entropy.argmin()),
      "entropy_at": {
          str(step): float(entropy[step])
          for step in _TABLED
          if step < config.num_steps
      },
      "v_final": path.v[-1],
      "mu": list(config.mu),
      "curve": {
          "steps": shown,
          "v": path.v[shown],
          "entropy": entropy[shown],
      },
  }
  ends = float(entropy[0]), float(entropy[-1])
  return {**summary, "finding": _finding(summary, *ends)}


def _finding(summary: dict[str, Any], first: float, last: float) -> str:
  least, step = summary["min_entropy"], summary["min_step"]
  if least < min(first, last):
    course = (
        f"falls from {first:.4f} to {least:.5f} at step {step} and rises again"
        f" to {last:.4f}"
    )
  else:
    course = f"goes from {first:.4f} to {last:.4f} without a minimum between"
  return f"The entropy of attention {course}."
