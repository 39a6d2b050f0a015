"""Which loss makes attention sparse?

One softmax layer with one query q and a read-out v (https://arxiv.org/abs/2603.06248
asks this of softmax attention),

  f = sum_t p_t v^T x_t,   p = softmax(X q),

learns a label y of -1 or 1 that one of T tokens carries; all others are noise.
Both q and v train, by gradient descent on one set of inputs, from normal values
of some size. The logistic loss ln(1 + e^-yf) has no minimum: f grows for ever,
which one token with all the weight serves best. The square loss (f - y)^2 / 2
has reached its minimum once f is y, and how sparse attention is by then is left
to the way there, and so to the start.

Letters: D width, N inputs, S records, T tokens.
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
  import jax
  import jax.numpy as jnp
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from scansnap_jax import metrics
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

LOSSES = ("logistic", "square")
_NOISE = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSparsityConfig:
  """Which loss makes attention sparse?

  Attributes:
    scales: Sizes of the start, rising.
    num_seeds: Draws of inputs and start.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_inputs: Inputs of a draw.
    num_tokens: Tokens of an input.
    width: Size of a token.
    num_steps: Steps of a run; records are spaced evenly in their logarithm.
    rate: Length of a step, times the gradient.
  """

  scales: tuple[float, ...] = (0.01, 0.1, 0.5, 1.0)
  num_seeds: int = 8
  first_seed: int = 0
  num_inputs: int = 16
  num_tokens: int = 8
  width: int = 16
  num_steps: int = 20_000
  rate: float = 0.3

  def __post_init__(self):
    require.between("num_seeds", self.num_seeds, 2, 1000)
    settings_lib.require_seeds(self.first_seed, self.num_seeds)
    settings_lib.require_several("scales", self.scales)
    require.at_least("num_inputs", self.num_inputs, 2)
    require.at_least("num_tokens", self.num_tokens, 2)
    require.at_least("width", self.width, 2)
    require.between("num_steps", self.num_steps, 100, 10**7)
    require.positive("rate", self.rate)


class Problem(NamedTuple):
  """Inputs and labels of -1 or 1."""

  inputs: jaxtyping.Float[np.ndarray, "N T D"]
  labels: jaxtyping.Float[np.ndarray, "N"]


def draw_problem(config: LossSparsityConfig, seed: int) -> Problem:
  """Draws noise, and the tokens that carry the label, anywhere."""
  rng = np.random.default_rng(seed)
  mark, sign = np.linalg.qr(rng.normal(size=(config.width, 2)))[0].T
  labels = rng.choice([-1.0, 1.0], size=config.num_inputs)
  shape = (config.num_inputs, config.num_tokens, config.width)
  inputs = _NOISE * rng.normal(size=shape)
  place = rng.integers(config.num_tokens, size=config.num_inputs)
  rows = np.arange(config.num_inputs)
  inputs[rows, place] = 2 * mark + labels[:, None] * sign
  return Problem(inputs, labels)


def attend(
    params: dict[str, jax.Array], inputs: jaxtyping.Float[jax.Array, "N T D"]
) -> tuple[jaxtyping.Float[jax.Array, "N"], jaxtyping.Float[jax.Array, "N T"]]:
  """Returns f and p."""
  attn_logits = jnp.einsum("NTD,D->NT", inputs, params["query"])
  attn_weights = jax.nn.softmax(attn_logits, axis=-1)
  values = jnp.einsum("NTD,D->NT", inputs, params["read_out"])
  return (attn_weights * values).sum(axis=1), attn_weights


def mean_loss(
    params: dict[str, jax.Array], problem: Problem, kind: str
) -> jaxtyping.Float[jax.Array, ""]:
  """Over the inputs, of a kind of `LOSSES`."""
  found, _ = attend(params, jnp.asarray(problem.inputs))
  labels = jnp.asarray(problem.labels)
  if kind == "logistic":
    return jnp.logaddexp(0.0, -labels * found).mean()
  return jnp.square(found - labels).mean() / 2


def train(
    params: dict[str, jax.Array],
    problem: Problem,
    steps: jaxtyping.Int[jax.Array, "S"],
    kind: str,
    rate: float,
) -> tuple[jaxtyping.Float[jax.Array, "S"], jaxtyping.Float[jax.Array, "S"]]:
  """Losses, and mean entropies of attention in nats, after some steps."""

  def step(
      _: int | jax.Array, params: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    slope = jax.grad(mean_loss)(params, problem, kind)
    return jax.tree.map(lambda x, change: x - rate * change, params, slope)

  def record(
      params: dict[str, jax.Array], ends: tuple[jax.Array, jax.Array]
  ) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    params = jax.lax.fori_loop(*ends, step, params)
    _, attn_weights = attend(params, jnp.asarray(problem.inputs))
    entropy = metrics.entropy(attn_weights).mean()
    return params, (mean_loss(params, problem, kind), entropy)

  firsts = jnp.append(jnp.zeros_like(steps[:1]), steps[:-1])
  return jax.lax.scan(record, params, (firsts, steps))[1]


def measure(
    config: LossSparsityConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains by both losses from every size and seed.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", by loss and size of the start: "losses" and "entropies" [seeds,
    records]; "steps" of the records, "most", the entropy of equal weights,
    "claims" and "finding".
  """
  part = part or parts.at_once
  steps = _steps(config)
  rows = {
      f"{kind}, {scale:g}": part(
          f"{kind}, {scale:g}",
          lambda k=kind, s=scale: _run(config, k, s, steps),
      )
      for kind in LOSSES
      for scale in config.scales
  }
  told = _claims(config, rows, steps)
  return {
      "rows": rows,
      "steps": steps.tolist(),
      "scales": list(config.scales),
      "most": float(np.log(config.num_tokens)),
      "claims": told,
      "finding": claims.finding(told),
  }


def _steps(config: LossSparsityConfig) -> jaxtyping.Int[np.ndarray, "S"]:
  return np.unique(np.geomspace(10, config.num_steps, 34).astype(np.int32))


def _run(
    config: LossSparsityConfig,
    kind: str,
    scale: float,
    steps: jaxtyping.Int[np.ndarray, "S"],
) -> dict[str, Any]:
  losses, entropies = [], []
  with jax.enable_x64(True):
    follow = jax.jit(train, static_argnums=(3, 4))
    for seed in settings_lib.seeds(config):
      rng = np.random.default_rng([seed, 1])
      start = scale * rng.normal(size=(2, config.width))
      params = {
          "query": jnp.asarray(start[0]),
          "read_out": jnp.asarray(start[1]),
      }
      problem = draw_problem(config, seed)
      found = follow(params, problem, jnp.asarray(steps), kind, config.rate)
      losses.append(np.asarray(found[0]))
      entropies.append(np.asarray(found[1]))
  if not np.isfinite([losses, entropies]).all():
    raise errors.UserError(
        f"training diverged with rate={config.rate:g}: use a smaller one, in a"
        " new workdir."
    )
  return {"losses": np.array(losses), "entropies": np.array(entropies)}


def _claims(
    config: LossSparsityConfig,
    rows: dict[str, dict[str, Any]],
    steps: jaxtyping.Int[np.ndarray, "S"],
) -> list[claims.Row]:
  entropies = {
      kind: np.array(
          [rows[f"{kind}, {scale:g}"]["entropies"] for scale in config.scales]
      )
      for kind in LOSSES
  }  # Scales, seeds, records.
  least = f"{config.scales[0]:g}"
  gap = entropies["square"][0, :, -1] - entropies["logistic"][0, :, -1]
  before = int(np.argmax(steps >= steps[-1] / 10))
  falls = {
      kind: intervals.interval(each[0, :, before] - each[0, :, -1])
      for kind, each in entropies.items()
  }
  # How much of the end is decided by the start, and not by the inputs.
  spread = {
      kind: each[:, :, -1].std(axis=0, ddof=1).mean()
      for kind, each in entropies.items()
  }
  interval = intervals.interval(gap)
  return [
      claims.row(
          f"from a start of {least} the logistic loss ends with sparser"
          " attention",
          "the square loss's entropy less its own has an interval above 0",
          f"{intervals.text(interval)} nats",
          interval["low"] > 0,
      ),
      claims.row(
          "by the logistic loss attention goes on growing sparser",
          f"in the last nine tenths of the steps, from {least}: a fall of more"
          " than .1 nats",
          f"{intervals.text(falls['logistic'])} nats",
          falls["logistic"]["low"] > 0.1,
      ),
      claims.row(
          "by the square loss it has stopped",
          "there, a fall of less than .05 nats",
          f"{intervals.text(falls['square'])} nats",
          falls["square"]["high"] < 0.05,
      ),
      claims.row(
          "where the square loss stops depends on the start",
          "over sizes of the start its entropies deviate by more than twice"
          " what the logistic loss's do (means over seeds)",
          f"{spread['square']:.3f}, logistic {spread['logistic']:.3f}",
          spread["square"] > 2 * spread["logistic"],
      ),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws entropies along training, and at the end by the start."""
  rows, scales = summary["rows"], summary["scales"]
  steps = np.asarray(summary["steps"])
  looks = dict(zip(LOSSES, (drawing.WITH, drawing.WITHOUT), strict=True))
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for kind, look in looks.items():
      of = lambda scale, k=kind: intervals.interval(
          np.asarray(rows[f"{k}, {scale:g}"]["entropies"]),
          least=0,
          most=summary["most"],
      )
      drawing.draw_interval(left, steps, of(scales[0]), look, kind)
      ends = [{k: v[-1] for k, v in of(scale).items()} for scale in scales]
      drawing.draw_points(right, scales, drawing.points(ends), look, kind)
    left.axhline(summary["most"], color="black", linestyle=":")
    left.set(xlabel="step", xscale="log", ylim=(0, None))
    left.set(ylabel="attention entropy (nats)", title=f"start of {scales[0]:g}")
    right.set(xlabel="size of the start", xscale="log", title="after all steps")
    figures.put_legend_above(figure, figures.legend_entries(left))
  return figure


STUDY = study_lib.Study(
    title="Which loss makes attention sparse",
    config=LossSparsityConfig(),
    smoke=dict(
        scales=(0.1, 1.0),
        num_seeds=2,
        num_inputs=4,
        num_tokens=3,
        width=4,
        num_steps=100,
    ),
    measure=study_lib.in_parts("loss_sparsity", measure),
    draw=draw,
    caption=(
        "Entropy of attention, by the loss that is trained; dotted, that of"
        f" equal weights. {study_lib.BANDS}"
    ),
    report_title="Theories of attention",
)
