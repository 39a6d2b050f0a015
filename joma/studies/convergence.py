"""Theorem 4 of JoMA: salient components converge first.

  L_j / L_k = e^{(mu_j^2 - mu_k^2) / 2} (1 + Lambda_jk),   L = ln(1 / delta),
  Lambda_jk = lambda_jk e^{mu_k^2 / 2} / L_k,

for neighbours j, k of falling mu (https://arxiv.org/abs/2310.00535). The paper
bounds lambda; that it tends to a constant, and to which, is derived in
`joma.theory.convergence`. In float64 and in L: the gaps delta underflow.

Letters: S times, J components.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from joma import config as config_lib
from joma.theory import convergence

_FIRST_TIME = 0.01


def measure(
    config: config_lib.ConvergenceConfig,
    *,
    on_metrics: Callable[[int, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
  """Integrates L and compares the ratios with their limits.

  Args:
    config: The settings.
    on_metrics: Called with the place of each time and the ratios.

  Returns:
    `times` [S]; `log_inverse_gap` L, with and without attention [S, J]; for
    each pair of neighbours, [J - 1] or [S, J - 1]: `ratio`, `ratio_limit`,
    `lambda`, `lambda_limit`; and the finding.
  """
  mu = np.array(config.mu)
  with jax.enable_x64(True):
    times = np.geomspace(_FIRST_TIME, config.end_time, config.num_times)
    start = jnp.full(len(mu), config.initial)
    gaps, gaps_without = (
        convergence.integrate(
            *(jnp.append(0.0, times), jnp.asarray(mu), start),
            has_attention=has_attention,
        )[1:]
        for has_attention in (True, False)
    )
    pairs = []
    for j in range(len(mu) - 1):
      gap_j, gap_k = gaps[:, j], gaps[:, j + 1]
      pair = config.mu[j], config.mu[j + 1]
      starts = config.initial, config.initial
      pairs.append((
          gap_j / gap_k,
          convergence.ratio_limit(*pair),
          convergence.measured_lambda(gap_j, gap_k, *pair),
          convergence.lambda_limit(*pair, *starts),
      ))
    gaps, gaps_without = np.asarray(gaps), np.asarray(gaps_without)
  ratio, ratio_limit, lambda_, lambda_limit = map(
      np.array, zip(*pairs, strict=True)
  )
  summary = {
      "mu": list(config.mu),
      "times": times,
      "log_inverse_gap": {"with": gaps, "without": gaps_without},
      "ratio": ratio.T,
      "ratio_limit": ratio_limit,
      "lambda": lambda_.T,
      "lambda_limit": lambda_limit,
  }
  if on_metrics is not None:
    for i, time in enumerate(times.tolist()):
      row = {f"ratio_{j}_{j + 1}": ratio[j, i] for j in range(len(ratio))}
      on_metrics(i, {"time": time, **row})
  return {**summary, "finding": _finding(summary)}


def _finding(summary: dict[str, Any]) -> str:
  last, limit = summary["ratio"][-1], summary["ratio_limit"]
  mu = summary["mu"]
  pairs = [
      f"{last[j]:.3f} for mu {mu[j]:g} : {mu[j + 1]:g} (limit {limit[j]:.3f})"
      for j in range(len(limit))
  ]
  is_near = np.abs(last / limit - 1).max() < 0.02
  verb = "reach their limits" if is_near else "are still far from their limits"
  without = summary["log_inverse_gap"]["without"][-1]
  return (
      f"The ratios of ln(1/delta) {verb} by t = {summary['times'][-1]:g}:"
      f" {', '.join(pairs)}; without attention they are"
      f" {', '.join(f'{r:.3f}' for r in without[:-1] / without[1:])}."
  )
