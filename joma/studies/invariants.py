"""Theorem 1 of JoMA against the step size: identities and the approximation.

Small random blocks with stationary g, trained by gradient descent for a fixed
time (https://arxiv.org/abs/2310.00535). If a law is an identity of gradient
flow, its relative error falls in proportion to the step, for every activation
and, in the sum over queries, for any number of them. The laws: those of linear
and exp attention and the exact one of softmax attention. Beside them the law
printed for softmax attention, whose error stays, and what rates that differ and
temperature do to the law of exp attention (`invariants`). In float64.

Letters: B samples, M tokens, K hidden nodes, Q queries, D width.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from joma import config as config_lib
from joma.theory import dynamics
from joma.theory import flow
from joma.theory import invariants
from scansnap_jax.experiment import errors as errors_lib

ATTENTIONS: tuple[dynamics.Attention, ...] = get_args(dynamics.Attention)
# (eta_z / eta_w, T), away from 1 one by one and together.
_FACTORS = ((3.0, 1.0), (1.0, 0.5), (3.0, 0.5))
# How near to 1 the fitted order must be to speak of proportion.
_ORDER_MARGIN = 0.1


class Problem(NamedTuple):
  """A random block.

  Attributes:
    params: Initial values.
    batch: Samples; the u_q have length 1 but are not orthogonal.
    pull: g of each sample and node [B, K], constant in time.
  """

  params: dynamics.Params
  batch: dynamics.Batch
  pull: Float[Array, "B K"]

  def loss(self, hidden: Float[Array, "B K"], upper: tuple[()]) -> Array:
    """Computes -E[sum_k g_k h_k]."""
    del upper
    return -jnp.mean(jnp.sum(self.pull * hidden, axis=1))


def make_problem(
    config: config_lib.InvariantsConfig, num_queries: int
) -> Problem:
  """Draws samples, embeddings, gradients and initial values, in float64."""
  generator = np.random.default_rng(config.seed)
  normal = lambda *shape: generator.normal(size=shape)
  tokens, samples = config.num_tokens, config.num_samples
  width = tokens + num_queries
  basis = np.linalg.qr(normal(width, width))[0]
  mixing = normal(num_queries, num_queries)
  mixing /= np.linalg.norm(mixing, axis=0)
  batch = dynamics.Batch(
      jnp.asarray(generator.dirichlet(np.ones(tokens), samples)),
      jnp.arange(samples) % num_queries,
      jnp.asarray(basis[:, :tokens]),
      jnp.asarray(basis[:, tokens:] @ mixing),
  )
  params = dynamics.Params(
      jnp.asarray(0.3 * normal(width, config.num_hidden)),
      jnp.asarray(0.3 * normal(num_queries, tokens)),
  )
  pull = jnp.asarray(2 * normal(samples, config.num_hidden))
  return Problem(params, batch, pull)


def train(
    problem: Problem,
    block: dynamics.Block,
    *,
    step_size: float | Array,
    time: float,
    rate_ratio: float | Array = 1.0,
) -> flow.Trajectory:
  """Descends for `time`; eta_z is `rate_ratio` times the step. Two records."""
  return flow.descend(
      problem.params,
      *(problem.batch, block, problem.loss),
      eta_w=step_size,
      eta_z=rate_ratio * step_size,
      num_records=1,
      steps_per_record=jnp.round(time / step_size).astype(int),
  )


def measure(
    config: config_lib.InvariantsConfig,
    *,
    on_metrics: Callable[[int, dict[str, Any]], None] | None = None,
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
      problem = make_problem(config, num_queries)
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
  if on_metrics is not None:
    for i, step_size in enumerate(summary["step_sizes"]):
      errors = {
          f"{row['attention']}_{row['activation']}_{row['num_queries']}": row[
              "relative_error"
          ][i]
          for row in laws
      }
      on_metrics(i, {"step_size": step_size, **errors})
  return {**summary, "finding": _finding(summary)}


Checks = Mapping[str, list[invariants.InvariantCheck]]


def _check_all(
    config: config_lib.InvariantsConfig,
    problem: Problem,
    attention: dynamics.Attention,
) -> Checks:
  """Checks by law; leaves [activations], one check a step size."""
  phis = [*dynamics.ACTIVATIONS.values()]

  def check(weights, step_size):
    # One program for all activations: the weights choose.
    mixture = lambda h: functools.reduce(
        jnp.add, [w * phi(h) for w, phi in zip(weights, phis, strict=True)]
    )
    block = dynamics.Block(attention=attention, activation=mixture)
    path = train(problem, block, step_size=step_size, time=config.time)
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
    checks: Checks,
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


def _printed_rows(checks: Checks, num_queries: int) -> list[dict[str, Any]]:
  rows = []
  for i, activation in enumerate(dynamics.ACTIVATIONS):
    row: dict[str, Any] = {"activation": activation, "num_queries": num_queries}
    for law in ("printed", "first_term"):
      for name, values in checks[law][-1]._asdict().items():
        row[f"{law}_{name}"] = float(values[i])
    rows.append(row)
  return rows


def _factor_rows(config: config_lib.InvariantsConfig) -> list[dict[str, Any]]:
  problem = make_problem(config, config.num_queries[-1])
  rows = []
  for rate_ratio, temperature in _FACTORS:
    block = dynamics.Block(
        attention="exp", activation="silu", temperature=temperature
    )
    path = jax.jit(
        functools.partial(train, problem, block), static_argnames="time"
    )(
        step_size=min(config.step_sizes),
        time=config.time,
        rate_ratio=rate_ratio,
    )
    row = {"rate_ratio": rate_ratio, "temperature": temperature}
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
