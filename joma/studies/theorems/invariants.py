"""Theorem 1 of JoMA against the step size: identities and the approximation.

Small random blocks with stationary g, trained by gradient descent for a fixed
time (https://arxiv.org/abs/2310.00535). If a law is an identity of gradient
flow, its relative error falls in proportion to the step, for every activation
and, in the sum over queries, for any number of them. The laws: those of linear
and exp attention and the exact one of softmax attention. Beside them the law
printed for softmax attention, whose error stays, and what rates that differ and
temperature do to the law of exp attention (`invariants`). In float64.

Letters as in `joma.studies`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from etils import epy

from joma.studies import study as study_lib
from scansnap_jax.experiment import errors as errors_lib
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  import jaxtyping
  from matplotlib import axes as mpl_axes
  from matplotlib import figure as mpl_figure
  from matplotlib import lines as mpl_lines
  import numpy as np

  from joma.studies import drawing
  from joma.theory import dynamics
  from joma.theory import flow
  from joma.theory import invariants
  from joma.theory import random_block
  from scansnap_jax.experiment import figures

ATTENTIONS = ("linear", "exp", "softmax")
# (eta_z / eta_w, T), away from 1 one by one and together.
_FACTORS = ((3.0, 1.0), (1.0, 0.5), (3.0, 0.5))
# How near to 1 the fitted order must be to speak of proportion.
_ORDER_MARGIN = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvariantsConfig:
  """Theorem 1 against the step size, on small random blocks.

  Attributes:
    step_sizes: Two or more learning rates, each dividing `time`.
    num_queries: Numbers of queries that share the MLP.
    time: Training time, in units of 1 / (learning rate).
    num_tokens: Number of tokens M.
    num_hidden: Number of hidden nodes F.
    num_samples: Number of samples B, at least as many as queries.
    seed: Random seed for samples, gradients and initial values.
  """

  step_sizes: tuple[float, ...] = (1e-2, 1e-3, 1e-4)
  num_queries: tuple[int, ...] = (1, 3)
  time: float = 0.5
  num_tokens: int = 8
  num_hidden: int = 5
  num_samples: int = 16
  seed: int = 0

  def __post_init__(self):
    require.seeds("seed", self.seed)
    require.positive("time", self.time)
    if len(set(self.step_sizes)) < 2:
      raise errors_lib.UserError(
          "step_sizes needs two or more values that differ, to see how the"
          f" error falls; got {self.step_sizes}."
      )
    for step_size in self.step_sizes:
      require.positive("step_sizes", step_size)
      steps = self.time / step_size
      if steps < 0.5 or abs(steps - round(steps)) > 1e-6 * steps:
        raise errors_lib.UserError(
            f"step_sizes must divide time={self.time:g} into whole steps, got"
            f" {step_size:g}."
        )
    if not self.num_queries:
      raise errors_lib.UserError("num_queries needs one or more values.")
    for number in self.num_queries:
      require.between("num_queries", number, 1, self.num_samples)
    require.between("num_tokens", self.num_tokens, 2, 1000)
    require.between("num_hidden", self.num_hidden, 1, 1000)


def measure(
    config: InvariantsConfig,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
) -> dict[str, Any]:
  """Measures every law at the end of training.

  Args:
    config: The settings.
    on_metrics: Called with the place of each step size and the relative errors,
      named by kind of attention, activation and number of queries.

  Returns:
    `step_sizes`; `laws`, rows with the relative error at each step size and the
    order with which it falls; `printed`, rows with normalized correlation,
    slope and relative error of softmax attention's printed law at the smallest
    step, and those of its first term alone (with several queries: of the sum
    over queries, with b-bar over all samples); `factors`, rows with slope and
    relative error of exp attention's law without and with the factors of rates
    and temperature; and the finding.

  Raises:
    UserError: If exp attention blows up within `time`.
  """
  with jax.enable_x64(True):
    laws, printed = [], []
    for num_queries in config.num_queries:
      problem = _make_problem(config, num_queries)
      for attention in ATTENTIONS:
        checks = _check_all(config, problem, attention)
        laws += _law_rows(checks, attention, num_queries, config.time)
        if attention == "softmax":
          printed += _printed_rows(checks, num_queries)
    summary = {
        "step_sizes": sorted(config.step_sizes, reverse=True),
        "laws": laws,
        "printed": printed,
        "factors": _factor_rows(config),
    }
  kinds = ("attention", "activation", "num_queries")
  curves = {
      "_".join(str(row[kind]) for kind in kinds): row["relative_error"]
      for row in laws
  }
  sizes = summary["step_sizes"]
  study_lib.emit(on_metrics, range(len(sizes)), {"step_size": sizes, **curves})
  return {**summary, "finding": _finding(summary)}


def _make_problem(
    config: InvariantsConfig, num_queries: int
) -> random_block.Problem:
  return random_block.make_problem(
      config.seed,
      num_tokens=config.num_tokens,
      num_hidden=config.num_hidden,
      num_samples=config.num_samples,
      num_queries=num_queries,
  )


def _check_all(
    config: InvariantsConfig,
    problem: random_block.Problem,
    attention: dynamics.Attention,
) -> dict[str, list[invariants.InvariantCheck]]:
  """Checks by law; leaves [activations], one check a step size."""
  phis = [*dynamics.ACTIVATIONS.values()]

  def check(
      weights: jaxtyping.Float[jax.Array, "phi"],
      step_size: jaxtyping.Float[jax.Array, ""],
  ) -> dict[str, invariants.InvariantCheck]:
    # One program for all activations: the weights choose.
    mixture = lambda h: functools.reduce(
        jnp.add, [w * phi(h) for w, phi in zip(weights, phis, strict=True)]
    )
    block = dynamics.Block(attention=attention, activation=mixture)
    path = random_block.train(
        problem, block, step_size=step_size, time=config.time
    )
    return jax.tree.map(lambda x: x[-1], _checks(path, attention))

  check = jax.jit(jax.vmap(check, in_axes=(0, None)))
  step_sizes = sorted(config.step_sizes, reverse=True)
  results = [check(jnp.eye(len(phis)), step_size) for step_size in step_sizes]
  return {law: [result[law] for result in results] for law in results[0]}


def _checks(
    path: flow.Trajectory, attention: dynamics.Attention
) -> dict[str, invariants.InvariantCheck]:
  hold = functools.partial(
      invariants.check_invariant, path.params.attn_logits, path.v
  )
  if attention != "softmax":
    return {"law": hold(attention=attention)}
  return {
      "law": hold(attention=attention, correction=path.correction),
      "printed": hold(attention=attention, attended=path.attended[0]),
      "first_term": hold(attention="exp"),
  }


def _law_rows(
    checks: Mapping[str, list[invariants.InvariantCheck]],
    attention: dynamics.Attention,
    num_queries: int,
    time: float,
) -> list[dict[str, Any]]:
  errors = np.array([check.relative_error for check in checks["law"]])
  if not np.isfinite(errors).all():
    raise errors_lib.UserError(
        f"{attention} attention blows up within time={time:g}: choose less."
    )
  return [
      {
          "attention": attention,
          "activation": activation,
          "num_queries": num_queries,
          "relative_error": errors[:, i].tolist(),
      }
      for i, activation in enumerate(dynamics.ACTIVATIONS)
  ]


def _printed_rows(
    checks: Mapping[str, list[invariants.InvariantCheck]], num_queries: int
) -> list[dict[str, Any]]:
  rows = []
  for i, activation in enumerate(dynamics.ACTIVATIONS):
    row: dict[str, Any] = {"activation": activation, "num_queries": num_queries}
    for law in ("printed", "first_term"):
      for name, values in checks[law][-1]._asdict().items():
        row[f"{law}_{name}"] = float(values[i])
    rows.append(row)
  return rows


def _factor_rows(config: InvariantsConfig) -> list[dict[str, Any]]:
  problem = _make_problem(config, config.num_queries[-1])
  rows = []
  for rate_ratio, temperature in _FACTORS:
    block = dynamics.Block(
        attention="exp", activation="silu", temperature=temperature
    )
    path = jax.jit(
        functools.partial(random_block.train, problem, block),
        static_argnames="time",
    )(
        step_size=min(config.step_sizes),
        time=config.time,
        rate_ratio=rate_ratio,
    )
    row = {"rate_ratio": rate_ratio, "temperature": temperature}
    # The law is held against one run twice, with and without the factors: what
    # they mend is theirs.
    for name, factors in (
        ("without", (1.0, 1.0)),
        ("with", (rate_ratio, temperature)),
    ):
      check = invariants.check_invariant(
          *(path.params.attn_logits, path.v),
          attention="exp",
          rate_ratio=factors[0],
          temperature=factors[1],
      )
      row[f"slope_{name}"] = float(check.slope[-1])
      row[f"relative_error_{name}"] = float(check.relative_error[-1])
    rows.append(row)
  return rows


def fitted_orders(
    step_sizes: list[float], rows: list[dict[str, Any]]
) -> np.ndarray:
  """Computes d ln(error) / d ln(step) of each law by least squares."""
  # An error in proportion to the step has slope 1 in logarithms.
  errors = np.log([row["relative_error"] for row in rows])
  return np.polyfit(np.log(step_sizes), errors.T, 1)[0]


def _finding(summary: dict[str, Any]) -> str:
  orders = fitted_orders(summary["step_sizes"], summary["laws"])
  is_first_order = np.abs(orders - 1).max() < _ORDER_MARGIN
  verb = "falls in proportion to" if is_first_order else "does not follow"
  queries = sorted({row["num_queries"] for row in summary["laws"]})
  rows = [r for r in summary["printed"] if r["num_queries"] == queries[0]]
  names = ("correlation", "slope", "relative_error")
  least, slope, error = ([r[f"printed_{n}"] for r in rows] for n in names)
  return (
      "The error of the laws of linear, exp and softmax attention (the exact"
      f" one) {verb} the step: order {orders.min():.3f} to {orders.max():.3f}"
      f" over {len(dynamics.ACTIVATIONS)} activations and"
      f" {' and '.join(map(str, queries))} queries. The printed softmax law,"
      f" with {queries[0]}, has normalized correlation {min(least):.3f} to"
      f" {max(least):.3f}, slope {min(slope):.2f} to {max(slope):.2f} and"
      f" relative error {min(error):.2f} to {max(error):.2f} at the"
      " smallest step."
  )


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws relative error against step size, one panel a kind of attention."""
  queries = sorted({row["num_queries"] for row in summary["laws"]})
  activations = [*dict.fromkeys(row["activation"] for row in summary["laws"])]
  looks = dict(zip(activations, drawing.looks(len(activations)), strict=True))
  step_sizes = np.asarray(summary["step_sizes"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.9)
    panels = figure.subplots(1, 3, sharey=True)
    kinds = ("linear", "exp", "softmax")
    for axes, kind in zip(panels, kinds, strict=True):
      rows = [row for row in summary["laws"] if row["attention"] == kind]
      for row in rows:
        if row["num_queries"] in (queries[0], queries[-1]):
          is_first = row["num_queries"] == queries[0]
          look = looks[row["activation"]]
          _draw_law(axes, step_sizes, row, look, is_first)
      highest = max(row["relative_error"][-1] for row in rows)
      guide = 3 * highest * step_sizes / step_sizes[-1]
      axes.plot(step_sizes, guide, "k:", linewidth=0.8, label=r"$\propto\eta$")
      axes.set(title=f"{kind} attention", xlabel=r"step size $\eta$")
      axes.set(xscale="log", yscale="log")
    for row in summary["printed"]:
      if row["num_queries"] == queries[0]:
        error, look = row["printed_relative_error"], looks[row["activation"]]
        panels[2].plot(step_sizes[-1:], [error], "x", c=look.color)
    panels[0].set_ylabel("relative error")
    entries = figures.legend_entries(*panels)
    if queries[-1] > queries[0]:
      entries[f"{queries[-1]} queries"] = mpl_lines.Line2D(
          [], [], color="black", linestyle=(0, (3, 2)), marker="o", mfc="white"
      )
    entries["printed law"] = mpl_lines.Line2D(
        [], [], color="black", linestyle="", marker="x"
    )
    figures.put_legend_above(figure, entries)
  return figure


def _draw_law(
    axes: mpl_axes.Axes,
    step_sizes: np.ndarray,
    row: Mapping[str, Any],
    look: figures.CurveStyle,
    is_first: bool,
) -> None:
  """Draws the error of a law: filled for the first number of queries."""
  axes.plot(
      step_sizes,
      row["relative_error"],
      color=look.color,
      marker=look.marker,
      linestyle="-" if is_first else (0, (3, 2)),
      markerfacecolor=look.color if is_first else "white",
      linewidth=0.8,
      label=row["activation"] if is_first else None,
  )


STUDY = study_lib.Study(
    title="Theorem 1: joint invariants",
    config=InvariantsConfig(),
    measure=study_lib.streamed("invariants", measure),
    draw=draw,
    caption=(
        "Relative error of Theorem 1's laws after a fixed time against the step"
        " size, one line per activation; filled: the smallest, open: the"
        " largest number of queries, in the sum over queries. Softmax: the"
        " exact law; crosses: the printed one, whose error stays. Dotted:"
        " proportion."
    ),
)
