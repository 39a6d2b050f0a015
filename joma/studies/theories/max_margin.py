"""Which tokens does attention select, and by which matrix?

Max-margin token selection (https://arxiv.org/abs/2308.16898,
https://arxiv.org/abs/2306.13596). N inputs of T tokens x, a query z and a label
y each; a fixed read-out v gives every token a score, and

  f = sum_t p_t s_t,  p = softmax(x W z),  s_t = y v^T x_t,  loss ln(1 + e^-f).

The claim: normalised gradient descent on W goes to the support vector machine
of Frobenius norm of the tokens that are selected in the end, which are locally
and need not be globally optimal; on W = K Q^T to that of nuclear norm
(`margins`). The gradient is a sum over pairs,

  dL/dW = -sum_i sigmoid(-f) sum_{t<u} p_t p_u (s_t - s_u) (x_t - x_u) z^T,

in which nothing cancels, and its weights are multiplied as logarithms: the form
p_t (s_t - f), the same on paper, loses its direction by rounding as p
saturates.

Letters as in `margins`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies.theories import margins
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

# Steps at which the direction is looked at, as shares of all.
_SHOWN = (1 / 300, 1 / 30, 0.1, 1 / 3, 2 / 3, 1.0)
# Key and query grow as the root of their product does.
_PAIR_RATE = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaxMarginConfig:
  """Which tokens does attention select, and by which matrix?

  Attributes:
    num_seeds: Draws of inputs, queries and read-out.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_inputs: Inputs, each with a query and a label.
    num_tokens: Tokens of an input.
    width: Size of a token.
    num_steps: Steps of normalised gradient descent on W.
    rate: Length of a step; |W| ends near num_steps times it.
    num_pair_steps: Steps on key and query.
  """

  num_seeds: int = 6
  first_seed: int = 0
  num_inputs: int = 6
  num_tokens: int = 8
  width: int = 10
  num_steps: int = 3000
  rate: float = 0.2
  num_pair_steps: int = 8000

  def __post_init__(self):
    require.between("num_seeds", self.num_seeds, 2, 1000)
    settings_lib.require_seeds(self.first_seed, self.num_seeds)
    require.between("num_inputs", self.num_inputs, 1, 100)
    require.between("num_tokens", self.num_tokens, 2, 100)
    require.between("width", self.width, 2, 100)
    require.between("num_steps", self.num_steps, 300, 10**6)
    require.between("num_pair_steps", self.num_pair_steps, 300, 10**6)
    require.positive("rate", self.rate)


class Problem(NamedTuple):
  """Inputs of a seed.

  Attributes:
    tokens: x, of unit length.
    queries: z, of unit length.
    scores: s.
  """

  tokens: jaxtyping.Float[np.ndarray, "N T D"]
  queries: jaxtyping.Float[np.ndarray, "N D"]
  scores: jaxtyping.Float[np.ndarray, "N T"]


def draw_problem(config: MaxMarginConfig, seed: int) -> Problem:
  """Draws tokens, queries, read-out and labels."""
  rng = np.random.default_rng(seed)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  shape = (config.num_inputs, config.num_tokens, config.width)
  tokens = unit(rng.normal(size=shape))
  queries = unit(rng.normal(size=(config.num_inputs, config.width)))
  read_out = unit(rng.normal(size=config.width))
  labels = rng.choice([-1.0, 1.0], size=(config.num_inputs, 1))
  return Problem(tokens, queries, labels * (tokens @ read_out))


def log_weights(
    problem: Problem, matrix: jaxtyping.Float[np.ndarray, "D D"]
) -> jaxtyping.Float[np.ndarray, "N T"]:
  """Logarithms of p, of finite size however small p is."""
  logits = np.einsum(
      "NTD,DE,NE->NT", problem.tokens, matrix, problem.queries, optimize=True
  )
  return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def descent(
    problem: Problem, matrix: jaxtyping.Float[np.ndarray, "D D"]
) -> jaxtyping.Float[np.ndarray, "D D"]:
  """-dL/dW times a positive number, which normalising takes away."""
  logs, scores = log_weights(problem, matrix), problem.scores
  margin = (np.exp(logs) * scores).sum(axis=1)
  gaps = scores[:, :, None] - scores[:, None]
  sizes = logs[:, :, None] + logs[:, None]
  sizes -= np.logaddexp(0, margin)[:, None, None]  # ln sigmoid(-f)
  sizes = np.where(gaps != 0, sizes, -np.inf)
  pairs = np.exp(sizes - sizes.max()) * gaps
  # Each pair twice, t before u and after it, of which either gives x_t.
  return np.einsum(
      "NTU,NTD,NE->DE", pairs, problem.tokens, problem.queries, optimize=True
  )


def descent_by_token(
    problem: Problem, matrix: jaxtyping.Float[np.ndarray, "D D"]
) -> jaxtyping.Float[np.ndarray, "D D"]:
  """The same as a sum over tokens, p_t (s_t - f), as it is often written."""
  weights, scores = np.exp(log_weights(problem, matrix)), problem.scores
  margin = (weights * scores).sum(axis=1, keepdims=True)
  tokens = weights * (scores - margin) / (1 + np.exp(margin))
  return np.einsum("NT,NTD,NE->DE", tokens, problem.tokens, problem.queries)


def cosine(
    a: jaxtyping.Float[np.ndarray, "D D"], b: jaxtyping.Float[np.ndarray, "D D"]
) -> float:
  """Of two matrices as vectors."""
  return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def measure(
    config: MaxMarginConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains from every seed, and compares directions.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", one a seed: "steps", "selected" (cosines to the machine of the
    selected tokens, along training), "best" (to that of the globally optimal
    ones, at the end), "is_best", "by_token" (`descent_by_token`, along
    training) and "pair", of key and query; "claims" and "finding".
  """
  part = part or parts.at_once
  rows = [
      part(f"seed {seed}", lambda s=seed: _run(config, s))
      for seed in settings_lib.seeds(config)
  ]
  told = _claims(rows)
  return {"rows": rows, "claims": told, "finding": claims.finding(told)}


def _run(config: MaxMarginConfig, seed: int) -> dict[str, Any]:
  problem = draw_problem(config, seed)
  steps = [max(1, round(share * config.num_steps)) for share in _SHOWN]
  seen = _descend(config, problem, descent, steps)
  chosen = log_weights(problem, seen[-1]).argmax(axis=1)
  best = problem.scores.argmax(axis=1)
  of = lambda which: margins.frobenius(
      margins.constraints(problem.tokens, problem.queries, which)
  )
  target = of(chosen)
  plain = _descend(config, problem, descent_by_token, steps)
  return {
      "steps": steps,
      "selected": [cosine(each, target) for each in seen],
      "best": cosine(seen[-1], of(best)),
      "is_best": bool((chosen == best).all()),
      "by_token": [cosine(each, target) for each in plain],
      "pair": _pair(config, problem, seed),
  }


def _descend(
    config: MaxMarginConfig, problem: Problem, form: Any, steps: list[int]
) -> list[jaxtyping.Float[np.ndarray, "D D"]]:
  """W at some steps, by steps of equal length from 0."""
  matrix, seen = np.zeros((config.width, config.width)), []
  for step in range(1, config.num_steps + 1):
    change = form(problem, matrix)
    matrix = matrix + config.rate * _unit(change)
    if step in steps:
      seen.append(matrix)
  return seen


def _unit(
    change: jaxtyping.Float[np.ndarray, "E D"],
) -> jaxtyping.Float[np.ndarray, "E D"]:
  length = np.linalg.norm(change)
  if not (np.isfinite(length) and length > 0):
    raise errors.UserError(
        "training diverged: the gradient has no direction. Use a smaller rate,"
        " in a new workdir."
    )
  return change / length


def _pair(
    config: MaxMarginConfig, problem: Problem, seed: int
) -> dict[str, float]:
  """Trains key and query from small values; norms are at a margin of 1."""
  rng = np.random.default_rng([seed, 1])
  key, query = 1e-3 * rng.normal(size=(2, config.width, config.width))
  rate, early_step = _PAIR_RATE * config.rate, config.num_pair_steps // 4
  early = np.zeros_like(key)
  for step in range(config.num_pair_steps):
    change = descent(problem, key @ query.T)
    d_key, d_query = change @ query, change.T @ key
    move = rate * _unit(np.concatenate([d_key, d_query]))
    key, query = key + move[: config.width], query + move[config.width :]
    if step == early_step:
      early = key @ query.T
  last = key @ query.T
  chosen = log_weights(problem, last).argmax(axis=1)
  rows = margins.constraints(problem.tokens, problem.queries, chosen)
  least, round_one = margins.nuclear(rows), margins.frobenius(rows)
  size = lambda x: np.linalg.norm(x, "nuc")
  # At a margin of 1, relative to the least that there is.
  excess = lambda x: float(
      size(x) / np.einsum("CDE,DE->C", rows, x).min() / size(least)
  )
  return {
      "to_nuclear": cosine(last, least),
      "to_frobenius": cosine(last, round_one),
      "excess": excess(last),
      "excess_early": excess(early),
      "excess_frobenius": excess(round_one),
  }


def _claims(rows: list[dict[str, Any]]) -> list[claims.Row]:
  last = [row["selected"][-1] for row in rows]
  local = [row for row in rows if not row["is_best"]]
  plain = [row["by_token"][-1] for row in rows]
  pairs = [row["pair"] for row in rows]
  excess, early, other = (
      np.array([pair[name] for pair in pairs])
      for name in ("excess", "excess_early", "excess_frobenius")
  )
  return [
      claims.row(
          "W points to the machine of the selected tokens",
          "cosine above .99 from every seed",
          f"least {min(last):.4f}",
          min(last) > 0.99,
      ),
      claims.row(
          "selected tokens are locally, not always globally optimal",
          "seeds in which an input selects another token than its best",
          f"{len(local)} of {len(rows)}",
          bool(local),
      ),
      claims.row(
          "there the machine of the globally optimal tokens is another one",
          "cosine below .95 in those seeds",
          ", ".join(f"{row['best']:.3f}" for row in local) or "none",
          bool(local) and max(row["best"] for row in local) < 0.95,
      ),
      claims.row(
          "written by tokens the gradient loses that direction",
          "cosine below .95 from every seed",
          f"largest {max(plain):.3f}",
          max(plain) < 0.95,
      ),
      claims.row(
          "key and query come nearer to the least nuclear norm",
          "its excess over the least smaller after all steps than after a"
          " quarter, from every seed",
          f"means {early.mean():.3f}, {excess.mean():.3f}",
          (excess < early).all(),
      ),
      claims.row(
          "and below that of the machine of least Frobenius norm",
          "from every seed",
          f"{(excess < other).sum()} of {len(rows)}, mean {other.mean():.3f}",
          (excess < other).all(),
      ),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws cosines along training, and nuclear norms of each seed."""
  rows = summary["rows"]
  looks = drawing.looks(3)
  steps = np.asarray(rows[0]["steps"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    left, right = figure.subplots(1, 2)
    for name, label, look in (
        ("selected", "by pairs of tokens", looks[0]),
        ("by_token", "by tokens (rounding)", looks[1]),
    ):
      values = intervals.interval(np.array([row[name] for row in rows]), most=1)
      drawing.draw_interval(left, steps, values, look, label)
    left.set(xlabel="step", xscale="log", ylim=(0, 1.03))
    left.set_ylabel("cosine of $W$ and its machine")
    left.legend(loc="lower center")
    places = np.arange(len(rows))
    for name, label, look in (
        ("excess_early", "after a quarter", looks[1]),
        ("excess", "key and query", looks[0]),
        ("excess_frobenius", "least Frobenius norm", looks[2]),
    ):
      points = [row["pair"][name] for row in rows]
      right.plot(
          places,
          points,
          color=look.color,
          marker=look.marker,
          ls="",
          label=label,
      )
    right.axhline(1, color="black", linestyle=":")
    right.set(xlabel="seed", xticks=places)
    right.set_ylabel("nuclear norm over the least")
    right.legend()
  return figure


STUDY = study_lib.Study(
    title="Max-margin token selection",
    config=MaxMarginConfig(),
    smoke=dict(
        num_seeds=2,
        num_inputs=2,
        num_tokens=3,
        width=4,
        num_steps=300,
        num_pair_steps=400,
    ),
    measure=study_lib.in_parts("max_margin", measure),
    draw=draw,
    caption=(
        "Left: direction of W, and the support vector machine of the tokens"
        " that it selects, from both forms of one gradient. Right: nuclear norm"
        " of what key and query learn, at a margin of 1, over the least that"
        f" there is. {study_lib.BANDS}"
    ),
    report_title="Theories of attention",
)
