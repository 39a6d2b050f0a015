"""What does one layer of linear attention learn to do with its examples?

Prompts hold n pairs (x_i, y_i) with y = w^T x and a query x; x has covariance
L, w is new in each prompt. Linear attention predicts

  y^ = 1/n sum_i (p . z_i) (z_i^T Q z),   z_i = (x_i, y_i),   z = (x, 0).

1. One step of preconditioned gradient descent on the prompt's examples is its
   optimum (https://arxiv.org/abs/2306.00297, https://arxiv.org/abs/2306.09927):

     y^ = 1/n sum_i y_i x_i^T G x,   G* = ((1 + 1/n) L + tr(L)/n I)^-1.

   It is trained here from drawn prompts alone.
2. How it gets there depends on how keys and queries are kept
   (https://arxiv.org/abs/2501.16265). With G = sum_h v_h k_h q_h^T the gradient
   flow from small values waits at levels, one for each direction of L that is
   still missing; with merged G = sum_h v_h U_h it falls once. Derived here: the
   mean loss is tr(G L G^T S) - 2 tr(L G L) + tr L, S = E[(X X^T / n)^2] =
   (1 + 1/n) L^2 + tr(L)/n L, so that with J directions of values l it is
   tr L - sum_{j <= J} l_j^2 / ((1 + 1/n) l_j + tr(L)/n).

Letters: B prompts, D width, H heads, S steps.
"""

from __future__ import annotations

from collections.abc import Callable
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
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies import training
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

# How near to a level counts as waiting there.
_NEAR = 0.03


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContextConfig:
  """What does one layer of linear attention learn to do with its examples?

  Attributes:
    spectrum: Eigenvalues of the covariance of x, falling.
    num_examples: Pairs of a prompt.
    num_seeds: Runs of everything.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of training on drawn prompts, a multiple of num_records.
    num_records: Records of a run.
    batch_size: Prompts of a step.
    rate: Highest learning rate.
    num_heads: Heads of the gradient flow.
    start: Size of the values that the flow starts from.
    flow_time: How long the flow is followed.
    flow_step: Length of its steps.
  """

  spectrum: tuple[float, ...] = (1.0, 0.6, 0.35, 0.2)
  num_examples: int = 31
  num_seeds: int = 4
  first_seed: int = 0
  num_steps: int = 2000
  num_records: int = 20
  batch_size: int = 2048
  rate: float = 0.02
  num_heads: int = 8
  start: float = 0.03
  flow_time: float = 2000.0
  flow_step: float = 0.1

  def __post_init__(self):
    settings_lib.check_runs(self)
    settings_lib.require_several("spectrum", self.spectrum)
    if tuple(sorted(self.spectrum, reverse=True)) != self.spectrum:
      raise errors.UserError(f"spectrum must fall, got {self.spectrum}.")
    for name in ("num_examples", "batch_size"):
      require.at_least(name, getattr(self, name), 1)
    require.at_least("num_heads", self.num_heads, len(self.spectrum))
    for name in ("rate", "start", "flow_time", "flow_step"):
      require.positive(name, getattr(self, name))


def optimum(config: InContextConfig) -> jaxtyping.Float[np.ndarray, "D D"]:
  """G*."""
  values, n = np.array(config.spectrum), config.num_examples
  return np.diag(1 / ((1 + 1 / n) * values + values.sum() / n))


def levels(config: InContextConfig) -> jaxtyping.Float[np.ndarray, "J"]:
  """Losses with 0, 1, ... directions learned."""
  gains = np.array(config.spectrum) ** 2 * np.diag(optimum(config))
  return sum(config.spectrum) - np.append(0, gains.cumsum())


def mean_loss(
    config: InContextConfig, gain: jaxtyping.Float[np.ndarray, "*b D D"]
) -> jaxtyping.Float[np.ndarray, "*b"]:
  """Of predictions y^ = 1/n sum_i y_i x_i^T G x, over all prompts."""
  values, square = _moments(config)
  spread = np.einsum("...IJ,J,...IJ,I->...", gain, values, gain, square)
  shared = np.einsum("...II,I->...", gain, values**2)
  return np.asarray(spread - 2 * shared + values.sum())


def _moments(config: InContextConfig) -> tuple[np.ndarray, np.ndarray]:
  """Diagonals of L and S."""
  values, n = np.array(config.spectrum), config.num_examples
  return values, (1 + 1 / n) * values**2 + values.sum() / n * values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
  """Linear attention on drawn prompts: `training.Problem`.

  Attributes:
    config: Sizes.
  """

  config: InContextConfig

  def init(self, key: jax.Array) -> jaxtyping.PyTree:
    """Draws p [D + 1] and Q [D + 1, D + 1]."""
    size = len(self.config.spectrum) + 1
    keys = jax.random.split(key)
    return {
        "p": 0.1 * jax.random.normal(keys[0], (size,)),
        "q": 0.1 * jax.random.normal(keys[1], (size, size)),
    }

  def draw(
      self, key: jax.Array
  ) -> tuple[
      jaxtyping.Float[jax.Array, "B T D"], jaxtyping.Float[jax.Array, "B T"]
  ]:
    """Draws x and y, the query last."""
    c, keys = self.config, jax.random.split(key)
    values = jnp.sqrt(jnp.array(c.spectrum))
    shape = (c.batch_size, c.num_examples + 1, len(c.spectrum))
    x = jax.random.normal(keys[0], shape) * values[None, None]
    w = jax.random.normal(keys[1], (c.batch_size, len(c.spectrum)))
    return x, jnp.einsum("BTD,BD->BT", x, w)

  def loss(
      self, params: jaxtyping.PyTree, key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Mean square error at the query, twice."""
    x, y = self.draw(key)
    seen = jnp.concatenate([x, y[..., None]], axis=-1)
    examples, query = seen[:, :-1], seen[:, -1].at[:, -1].set(0.0)
    read = jnp.einsum("BTD,D->BT", examples, params["p"])
    keys = jnp.einsum("BTD,DE,BE->BT", examples, params["q"], query)
    found = (read * keys).sum(axis=1) / self.config.num_examples
    error = jnp.square(found - y[:, -1]).mean()
    return error, error


def flow(
    config: InContextConfig, seed: int, is_merged: bool
) -> jaxtyping.Float[np.ndarray, "S"]:
  """Mean loss along gradient descent in small steps from small values."""
  values, square = _moments(config)
  rng = np.random.default_rng(seed)
  draw = lambda *shape: config.start * rng.normal(size=shape)
  heads, width = config.num_heads, len(values)
  if is_merged:
    factors = [draw(heads), draw(heads, width, width)]
  else:
    factors = [draw(heads), draw(heads, width), draw(heads, width)]
  product = _merged if is_merged else _separate
  seen = []
  for _ in range(round(config.flow_time / config.flow_step)):
    gain, pull = product(*factors)
    seen.append(gain)
    slope = 2 * (square[:, None] * gain * values - np.diag(values**2))
    moves = pull(slope)
    factors = [
        x - config.flow_step * move
        for x, move in zip(factors, moves, strict=True)
    ]
  curve = mean_loss(config, np.array(seen))
  if not np.isfinite(curve).all():
    raise errors.UserError(
        f"the flow diverged with flow_step={config.flow_step:g}: use shorter"
        " steps, in a new workdir."
    )
  return curve


def _separate(
    v: np.ndarray, k: np.ndarray, q: np.ndarray
) -> tuple[np.ndarray, Callable[[np.ndarray], list[np.ndarray]]]:
  """G, and the gradients of its factors from that of G."""

  def pull(slope: np.ndarray) -> list[np.ndarray]:
    to_key, to_query = q @ slope.T, k @ slope
    return [
        (k * to_key).sum(axis=1),
        v[:, None] * to_key,
        v[:, None] * to_query,
    ]

  return (v[:, None] * k).T @ q, pull


def _merged(
    v: np.ndarray, u: np.ndarray
) -> tuple[np.ndarray, Callable[[np.ndarray], list[np.ndarray]]]:
  pull = lambda slope: [(u * slope).sum(axis=(1, 2)), v[:, None, None] * slope]
  return np.einsum("H,HIJ->IJ", v, u), pull


def waiting(
    config: InContextConfig, curve: jaxtyping.Float[np.ndarray, "S"]
) -> float:
  """Share of the descent that is spent near a level between first and last."""
  known = levels(config)
  start = int(np.argmax(curve < (1 - _NEAR) * known[0]))
  end = int(np.argmax(curve < (1 + _NEAR) * known[-1]))
  if end <= start:
    raise errors.UserError(
        "the flow does not reach the last level in flow_time="
        f"{config.flow_time:g}: follow it longer, or start from larger values."
    )
  near = np.abs(curve[start:end, None] / known[1:-1] - 1) < _NEAR
  return float(near.any(axis=1).mean())


def measure(
    config: InContextConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains on prompts, and follows both flows.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "errors", |G - G*| / |G*| of each seed, and "losses" [seeds, records];
    "levels"; of "separate" and "merged" heads "waiting", of each seed, and
    "curve" of the first seed at "times"; "plain", the loss of the best plain
    step; "claims" and "finding".
  """
  part = part or parts.at_once
  trained = part("prompts", lambda: _trained(config))
  flows = {
      name: part(name, lambda n=name: _flows(config, n == "merged"))
      for name in ("separate", "merged")
  }
  values, square = _moments(config)
  plain = values.sum() - (values**2).sum() ** 2 / (values * square).sum()
  told = _claims(config, trained, flows, plain)
  return {
      **trained,
      **flows,
      "levels": levels(config).tolist(),
      "plain": float(plain),
      "claims": told,
      "finding": claims.finding(told),
  }


def _trained(config: InContextConfig) -> dict[str, Any]:
  seeds = settings_lib.seeds(config)
  found = training.train(
      Prompts(config=config),
      seeds,
      schedule=training.Schedule(
          num_steps=config.num_steps, num_records=config.num_records
      ),
      rate=config.rate,
  )
  best, errors_of = optimum(config), []
  for run in range(len(seeds)):
    params = found.params_of(run)
    gain = params["p"][-1] * np.asarray(params["q"])[:-1, :-1]
    off = np.linalg.norm(gain - best) / np.linalg.norm(best)
    errors_of.append(float(off))
  return {
      "errors": errors_of,
      "losses": found.losses.tolist(),
      "steps": found.steps,
      "curves": found.curves(),
  }


def _flows(config: InContextConfig, is_merged: bool) -> dict[str, Any]:
  curves = [
      flow(config, seed, is_merged) for seed in settings_lib.seeds(config)
  ]
  # Evenly along the logarithm of time, as levels last longer and longer.
  count = len(curves[0])
  shown = np.unique(np.geomspace(1, count, min(count, 400)).astype(int)) - 1
  return {
      "waiting": [waiting(config, curve) for curve in curves],
      "times": (config.flow_step * (1 + shown)).tolist(),
      "curve": curves[0][shown].tolist(),
  }


def _claims(
    config: InContextConfig,
    trained: dict[str, Any],
    flows: dict[str, dict[str, Any]],
    plain: float,
) -> list[claims.Row]:
  off = trained["errors"]
  last = np.array(trained["losses"])[:, -1]
  least = levels(config)[-1]
  apart, merged = (
      np.array(flows[name]["waiting"]) for name in ("separate", "merged")
  )
  return [
      claims.row(
          "trained on prompts, one layer is the preconditioned step G*",
          "|G - G*| / |G*| below .01 from every seed",
          f"largest {max(off):.4f}",
          max(off) < 0.01,
      ),
      claims.row(
          "its loss is that of G*, and below that of the best plain step",
          f"within 2 % of {least:.4f}; plain {plain:.4f}",
          training.interval_text(last, 4),
          abs(last.mean() / least - 1) < 0.02 and last.max() < plain,
      ),
      claims.row(
          "separate keys and queries learn one direction after the other",
          "more than half of the descent within 3 % of a level between first"
          " and last, from every seed",
          ", ".join(f"{share:.2f}" for share in apart),
          apart.min() > 0.5,
      ),
      claims.row(
          "merged ones fall once",
          "at most a quarter of the descent there",
          ", ".join(f"{share:.2f}" for share in merged),
          merged.max() <= 0.25,
      ),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws losses of training, and both flows with their levels."""
  first, second = drawing.looks(2)
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    left, right = figure.subplots(1, 2)
    losses = intervals.interval(np.asarray(summary["losses"]), is_positive=True)
    drawing.draw_interval(left, np.asarray(summary["steps"]), losses, first, "")
    left.axhline(summary["levels"][-1], color="black", linestyle=":")
    left.axhline(summary["plain"], color="grey", linestyle="--")
    left.set(xlabel="step", ylabel="loss on drawn prompts", yscale="log")
    for name, look in (("separate", first), ("merged", second)):
      times, curve = (np.asarray(summary[name][k]) for k in ("times", "curve"))
      drawing.draw_curve(right, times, curve, look, name)
    for level in summary["levels"]:
      right.axhline(level, color="black", linestyle=":", linewidth=0.7)
    right.set(xlabel="time of the flow", xscale="log", ylabel="mean loss")
    right.legend(title="keys and queries")
  return figure


STUDY = study_lib.Study(
    title="In-context learning of linear attention",
    config=InContextConfig(),
    smoke=dict(
        spectrum=(1.0, 0.5),
        num_examples=7,
        num_seeds=2,
        num_steps=4,
        num_records=2,
        batch_size=4,
        flow_time=200.0,
    ),
    measure=study_lib.in_parts("in_context", measure),
    draw=draw,
    caption=(
        "Left: loss while one layer trains on drawn prompts; dotted, that of"
        " the preconditioned step G*, dashed, that of the best plain step."
        " Right: gradient flow from small values (first seed); dotted, losses"
        f" with 0, 1, 2, ... directions learned. {study_lib.BANDS}"
    ),
    report_title="Theories of attention",
)
