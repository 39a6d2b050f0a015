"""Attention entropy falls and rises with attention, and only falls without.

  dv/dt = (mu - v) o e^{v^2 / 2}   against   dv/dt = mu - v,

JoMA's reduced dynamics near a critical point (https://arxiv.org/abs/2310.00535,
Section 4). Where attention follows the MLP, salient components get there long
before the others, and the entropy of attention, softmax(v^2 / 2) by Theorem 1,
overshoots its last value; with frozen attention all get there at one rate, and
it does not. In float64.

Letters as in `joma.studies`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import drawing
  from joma.theory import convergence
  from scansnap_jax.experiment import figures


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyBounceConfig:
  """Attention entropy falls and rises again; without attention it falls.

  Attributes:
    mu: What each component tends to, positive, up to 6.
    initial: First value of every component, below every mu.
    end_time: Last time of the integration.
    num_times: Points of each curve, equally spaced.
  """

  mu: tuple[float, ...] = (3.0, 2.0, 1.0)
  initial: float = 0.01
  end_time: float = 8.0
  num_times: int = 801

  def __post_init__(self):
    settings_lib.require_targets(self.mu, self.initial)
    if max(self.mu) > 6:
      raise errors.UserError(f"mu may be up to 6, got {self.mu}.")
    if not 0 < self.end_time <= 1e6:
      raise errors.UserError(
          f"end_time must be in (0, 1e6], got {self.end_time}."
      )
    require.between("num_times", self.num_times, 2, 10**5)


def measure(
    config: EntropyBounceConfig,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
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
      entropy = np.asarray(convergence.attention_entropy(v, 2.0))
      summary[name] = {"v": np.asarray(v), **_course(times, entropy)}
  curves = {name: summary[name]["entropy"] for name in ("with", "without")}
  study_lib.emit(on_metrics, range(len(times)), {"time": times, **curves})
  return {**summary, "finding": _finding(summary)}


def _course(times: np.ndarray, entropy: np.ndarray) -> dict[str, Any]:
  # A least value strictly inside is a fall and a rise; at the end it is a fall
  # alone.
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


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws components with and without attention, and both entropies."""
  times, mu = np.asarray(summary["times"]), np.asarray(summary["mu"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.7)
    *courses, entropies = figure.subplots(1, 3)
    looks = drawing.looks(len(mu))
    for axes, name in zip(courses, ("with", "without"), strict=True):
      v = np.asarray(summary[name]["v"])
      for j, look in enumerate(looks):
        solid = look._replace(linestyle="-")
        label = rf"$\mu_j={mu[j]:g}$"
        drawing.draw_curve(axes, times, v[:, j] / mu[j], solid, label)
      axes.set(title=f"{name} attention", ylabel=r"$v_j/\mu_j$", ylim=(0, 1.05))
      axes.legend(loc="lower right")
    for name, look in (("with", drawing.WITH), ("without", drawing.WITHOUT)):
      entropy = summary[name]["entropy"]
      drawing.draw_curve(entropies, times, entropy, look, f"{name} attention")
    entropies.set(
        title="attention entropy", ylabel="nats", yscale="log", ylim=(2e-3, 2)
    )
    entropies.legend(loc="lower right")
    for axes in (*courses, entropies):
      axes.set(xlabel="time $t$", xlim=(0, times[-1]))
  return figure


STUDY = study_lib.Study(
    title="Attention entropy falls, then rises",
    config=EntropyBounceConfig(),
    measure=study_lib.streamed("entropy_bounce", measure),
    draw=draw,
    caption=(
        "Components v_j / μ_j and the entropy of softmax(v²/2), with attention"
        " that follows the MLP and with frozen attention."
    ),
)
