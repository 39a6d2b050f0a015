"""Does an idle head's sink grow for ever?

Active-dormant heads (https://arxiv.org/abs/2410.13835): a head that has nothing
to do learns to put out nothing, by attention on the first token, whose value is
small. Derived here, for one head with the logit z of the first token above all
others, its value u and the mean value v of the others,

  o = p u + (1 - p) v,   p = 1 / (1 + e^-z),   loss o^2 / 2,

under gradient flow in which

  logits alone   the sink grows: with u = 0 it is dz/dt = v^2 p (1 - p)^2, which
                 tends to z = ln(2 v^2 t) / 2,
  values alone   what is read cancels: p u + (1 - p) v = 0,
  both           the same is reached soon, and then nothing moves any more.

So a sink that grows like ln(t) / 2 needs a first value that stays drained while
logits train; the joint flow of this head makes neither. It is integrated by
SciPy's LSODA.

Letters: R runs (starts), S times.
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
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np
  from scipy import integrate

  from joma.studies import claims
  from joma.studies import drawing
  from scansnap_jax.experiment import figures

REGIMES = {"logits alone": (1, 0), "values alone": (0, 1), "both": (1, 1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DormantConfig:
  """Does an idle head's sink grow for ever?

  Attributes:
    num_seeds: Starts of each regime.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    end_time: Last time of the flow.
    num_times: Points of each curve, evenly in the logarithm from 1.
  """

  num_seeds: int = 5
  first_seed: int = 0
  end_time: float = 1e8
  num_times: int = 81

  def __post_init__(self):
    require.between("num_seeds", self.num_seeds, 2, 1000)
    settings_lib.require_seeds(self.first_seed, self.num_seeds)
    require.between("num_times", self.num_times, 5, 10**5)
    if not 1e3 <= self.end_time <= 1e12:
      raise errors.UserError(
          f"end_time must be from 1e3 to 1e12, got {self.end_time}."
      )


def velocity(
    state: jaxtyping.Float[np.ndarray, "3"], trained: tuple[int, int]
) -> jaxtyping.Float[np.ndarray, "3"]:
  """Of z, u and v; `trained` says whether logits and values move."""
  z, first, others = state
  p = 1 / (1 + np.exp(-z))
  rest = 1 / (1 + np.exp(z))  # 1 - p without the loss of digits.
  read = p * first + rest * others
  logit, value = trained
  slopes = (logit * (first - others) * p * rest, value * p, value * rest)
  return -read * np.array(slopes)


def flow(
    config: DormantConfig, seed: int, regime: str
) -> jaxtyping.Float[np.ndarray, "S 3"]:
  """z, u and v at `times`, from a logit of 0 and a first value near 0."""
  rng = np.random.default_rng(seed)
  others = rng.uniform(0.5, 2.0)
  first = 0.0 if regime == "logits alone" else rng.uniform(-0.2, 0.2)
  found = integrate.solve_ivp(
      lambda _, state: velocity(state, REGIMES[regime]),
      (0.0, config.end_time),
      (0.0, first, others),
      method="LSODA",
      rtol=1e-10,
      atol=1e-13,
      t_eval=times(config),
  )
  if not found.success:
    raise errors.UserError(f"the flow diverged: {found.message}")
  return found.y.T


def times(config: DormantConfig) -> jaxtyping.Float[np.ndarray, "S"]:
  """Of the curves."""
  return np.geomspace(1.0, config.end_time, config.num_times)


def measure(
    config: DormantConfig, *, on_metrics: study_lib.OnMetrics | None = None
) -> dict[str, Any]:
  """Follows all regimes.

  Args:
    config: Sizes.
    on_metrics: Called with the place of each time and mean logits.

  Returns:
    "times"; of each regime "logits", "first", "others" and "read" [R, S];
    "claims" and "finding".
  """
  seen, rows = times(config), {}
  for regime in REGIMES:
    found = np.array(
        [flow(config, seed, regime) for seed in settings_lib.seeds(config)]
    )
    logits, first, others = np.moveaxis(found, 2, 0)
    p = 1 / (1 + np.exp(-logits))
    rows[regime] = {
        "logits": logits,
        "first": first,
        "others": others,
        "read": p * first + others / (1 + np.exp(logits)),
    }
  means = {name: row["logits"].mean(axis=0) for name, row in rows.items()}
  study_lib.emit(on_metrics, range(len(seen)), {"time": seen} | means)
  told = _claims(seen, rows)
  return {
      "times": seen,
      "rows": rows,
      "claims": told,
      "finding": claims.finding(told),
  }


def _claims(
    seen: jaxtyping.Float[np.ndarray, "S"], rows: dict[str, dict[str, Any]]
) -> list[claims.Row]:
  late = int(np.argmax(seen >= seen[-1] / 100))
  alone, values, both = (rows[name] for name in REGIMES)
  slopes = (alone["logits"][:, -1] - alone["logits"][:, late]) / np.log(
      seen[-1] / seen[late]
  )
  # After a ten thousandth of the time at the latest.
  soon = int(np.argmax(seen >= 1e-4 * seen[-1]))
  moved = np.abs(both["logits"][:, -1] - both["logits"][:, soon])
  left = np.abs(both["first"][:, -1])
  ends = both["logits"][:, -1]
  spread = lambda x: f"{x.min():.4g} to {x.max():.4g}"
  return [
      claims.row(
          "with a drained first value the sink's logit grows like ln(t) / 2",
          "slope in ln(t) over the last factor of 100 within .01 of .5, from"
          " every start",
          spread(slopes),
          np.abs(slopes - 0.5).max() < 0.01,
      ),
      claims.row(
          "with logits frozen what is read cancels",
          "|p u + (1 - p) v| below 1e-6, from every start",
          f"largest {np.abs(values['read'][:, -1]).max():.1e}",
          np.abs(values["read"][:, -1]).max() < 1e-6,
      ),
      claims.row(
          "where both train the sink goes on growing",
          "its logit rises by more than .1 in the last factor of 10^4",
          f"largest rise {moved.max():.1e}; it ends at {spread(ends)}",
          moved.min() > 0.1,
      ),
      claims.row(
          "and the first value is drained",
          "|u| below .01 at the end, from every start",
          spread(left),
          left.max() < 0.01,
      ),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws logits and values along time."""
  seen, rows = np.asarray(summary["times"]), summary["rows"]
  looks = dict(zip(REGIMES, drawing.looks(len(REGIMES)), strict=True))
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    left, right = figure.subplots(1, 2)
    for regime, look in looks.items():
      for axes, key in ((left, "logits"), (right, "first")):
        for run, curve in enumerate(np.asarray(rows[regime][key])):
          label = regime if run == 0 and axes is left else None
          axes.plot(
              seen, curve, color=look.color, ls=look.linestyle, label=label
          )
    guide = np.log(2 * seen) / 2
    left.plot(seen, guide, color="black", linestyle=":", label=r"$\ln(2t)/2$")
    left.set(xlabel="time", ylabel="logit of the first token", xscale="log")
    right.set(xlabel="time", ylabel="value of the first token", xscale="log")
    figures.put_legend_above(figure, figures.legend_entries(left))
  return figure


STUDY = study_lib.Study(
    title="Sinks of idle heads",
    config=DormantConfig(),
    smoke=dict(num_seeds=2, end_time=1000.0, num_times=9),
    measure=study_lib.streamed("dormant", measure),
    draw=draw,
    caption=(
        "A head that has nothing to do, from several starts: which of its"
        " logit and values train decides whether its sink grows. Dotted: the"
        " law with a drained first value and a mean value of 1 of the others."
    ),
    report_title="Theories of attention",
)
