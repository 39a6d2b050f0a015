"""Attention entropy falls and rises with attention, and only falls without.

  dv/dt = (mu - v) o e^{v^2 / 2}   against   dv/dt = mu - v,

JoMA's reduced dynamics near a critical point (https://arxiv.org/abs/2310.00535,
Section 4). Where attention follows the MLP, salient components get there long
before the others, and the entropy of softmax(v^2) overshoots its last value;
with frozen attention all get there at one rate, and it does not. In float64.

Letters: S times, J components.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from joma import config as config_lib
from joma.theory import convergence


def measure(
    config: config_lib.EntropyBounceConfig,
    *,
    on_metrics: Callable[[int, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
  """Integrates both equations.

  Args:
    config: The settings.
    on_metrics: Called with the place of each time and both entropies.

  Returns:
    `times` [S]; for `with` and `without` attention: `v` [S, J], `entropy` [S]
    in nats, its first, least and last value, the time of the least and whether
    it falls then rises; and the finding.
  """
  times = np.linspace(0, config.end_time, config.num_times)
  summary: dict[str, Any] = {"mu": list(config.mu), "times": times}
  with jax.enable_x64(True):
    mu = jnp.array(config.mu)
    start = jnp.full_like(mu, config.initial)
    for name in ("with", "without"):
      gaps = convergence.integrate(
          *(jnp.asarray(times), mu, start), has_attention=name == "with"
      )
      v = convergence.components(gaps, mu)
      entropy = np.asarray(convergence.attention_entropy(v))
      summary[name] = {"v": np.asarray(v), **_course(times, entropy)}
  if on_metrics is not None:
    for i, time in enumerate(times.tolist()):
      row = {name: summary[name]["entropy"][i] for name in ("with", "without")}
      on_metrics(i, {"time": time, **row})
  return {**summary, "finding": _finding(summary)}


def _course(times: np.ndarray, entropy: np.ndarray) -> dict[str, Any]:
  bottom = int(entropy.argmin())
  return {
      "entropy": entropy,
      "first": float(entropy[0]),
      "least": float(entropy[bottom]),
      "time_of_least": float(times[bottom]),
      "last": float(entropy[-1]),
      "bounces": bool(0 < bottom < len(entropy) - 1),
  }


def _finding(summary: dict[str, Any]) -> str:
  parts = []
  for name in ("with", "without"):
    course = summary[name]
    if course["bounces"]:
      text = (
          f"falls from {course['first']:.4f} to {course['least']:.4f} (t ="
          f" {course['time_of_least']:.2f}) and rises to {course['last']:.4f}"
      )
    else:
      text = f"only falls, from {course['first']:.4f} to {course['last']:.4f}"
    parts.append(f"{name} attention {text}")
  return f"The entropy {'; '.join(parts)}."
