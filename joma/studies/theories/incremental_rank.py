"""Does attention learn its directions one at a time?

Incremental learning of diagonal attention (https://arxiv.org/abs/2306.07042).
One layer reads T tokens of D coordinates,

  f(X) = softmax(X diag(k q) X^T) X diag(v o),

and learns another of its kind, with products a of key and query and b of value
and output. Gradient flow from values of size alpha keeps each product near 0
until it grows, after a time that goes like ln(1/alpha): at small alpha one
product after the other, each adding 1 to the rank of its matrix. From 0 the
value of a coordinate grows first, as attention's gradient is 0 where values are
0. The flow is followed in small steps, with automatic derivatives.

Letters: B samples, D width, S steps, T tokens.
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
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals


@dataclasses.dataclass(frozen=True, kw_only=True)
class IncrementalRankConfig:
  """Does attention learn its directions one at a time?

  Attributes:
    alphas: Sizes of the start, falling.
    keys: Products of key and query that are to be learned, falling.
    values: Products of value and output that are to be learned, falling.
    num_seeds: Draws of the inputs.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_inputs: Inputs of a draw.
    num_tokens: Tokens of an input.
    num_steps: Steps of the flow for the smallest alpha.
    step_size: Length of a step.
  """

  alphas: tuple[float, ...] = (0.1, 0.01, 0.001)
  keys: tuple[float, ...] = (1.5, 1.0, 0.7, 0.45)
  values: tuple[float, ...] = (2.0, 1.4, 1.0, 0.7)
  num_seeds: int = 3
  first_seed: int = 0
  num_inputs: int = 1024
  num_tokens: int = 6
  num_steps: int = 5000
  step_size: float = 0.1

  def __post_init__(self):
    require.between("num_seeds", self.num_seeds, 2, 1000)
    settings_lib.require_seeds(self.first_seed, self.num_seeds)
    settings_lib.require_several("alphas", self.alphas)
    if max(self.alphas) >= 1:
      raise errors.UserError(f"alphas must be below 1, got {self.alphas}.")
    for name in ("keys", "values"):
      settings_lib.require_several(name, getattr(self, name))
    if len(self.keys) != len(self.values):
      raise errors.UserError(
          f"keys and values must be as many, got {self.keys} and {self.values}."
      )
    require.at_least("num_inputs", self.num_inputs, 1)
    require.at_least("num_tokens", self.num_tokens, 2)
    require.between("num_steps", self.num_steps, 1, 10**6)
    require.positive("step_size", self.step_size)


class Weights(NamedTuple):
  """Diagonals of the four matrices."""

  key: jaxtyping.Float[jax.Array, "D"]
  query: jaxtyping.Float[jax.Array, "D"]
  value: jaxtyping.Float[jax.Array, "D"]
  output: jaxtyping.Float[jax.Array, "D"]

  @property
  def products(self) -> jaxtyping.Float[jax.Array, "E"]:
    """Of key and query, then of value and output."""
    return jnp.append(self.key * self.query, self.value * self.output)


def attend(
    weights: Weights, inputs: jaxtyping.Float[jax.Array, "B T D"]
) -> jaxtyping.Float[jax.Array, "B T D"]:
  """The layer."""
  keys, values = jnp.split(weights.products, 2)
  attn_logits = jnp.einsum("BTD,D,BSD->BTS", inputs, keys, inputs)
  attn_weights = jax.nn.softmax(attn_logits, axis=-1)
  return jnp.einsum("BTS,BSD,D->BTD", attn_weights, inputs, values)


def flow(
    start: Weights,
    inputs: jaxtyping.Float[jax.Array, "B T D"],
    targets: jaxtyping.Float[jax.Array, "B T D"],
    step_size: float,
    num_steps: int,
) -> jaxtyping.Float[jax.Array, "S E"]:
  """Products after each step down half the mean square error of a token."""

  def loss(weights: Weights) -> jax.Array:
    error = attend(weights, inputs) - targets
    return jnp.square(error).sum(axis=-1).mean() / 2

  def step(weights: Weights, _: None) -> tuple[Weights, jax.Array]:
    slope = jax.grad(loss)(weights)
    move = lambda weight, change: weight - step_size * change
    weights = jax.tree.map(move, weights, slope)
    return weights, weights.products

  return jax.lax.scan(step, start, None, length=num_steps)[1]


def measure(
    config: IncrementalRankConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Follows the flow from each size and seed.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", one a size of the start: "half_times" [seeds, products], the time at
    which a product is half of what it is to be, over ln(1/alpha); "times" and
    "products" of the first seed; "targets", "claims" and "finding".
  """
  part = part or parts.at_once
  rows = [
      part(f"alpha {alpha:g}", lambda a=alpha: _run(config, a))
      for alpha in config.alphas
  ]
  told = _claims(config, rows)
  return {
      "rows": rows,
      "targets": [*config.keys, *config.values],
      "claims": told,
      "finding": claims.finding(told),
  }


def _run(config: IncrementalRankConfig, alpha: float) -> dict[str, Any]:
  width, found, scale = len(config.keys), [], np.log(1 / alpha)
  follow = jax.jit(flow, static_argnums=(3, 4))
  with jax.enable_x64(True):
    one = jnp.ones(width)
    teacher = Weights(
        jnp.array(config.keys), one, jnp.array(config.values), one
    )
    for seed in settings_lib.seeds(config):
      rng = np.random.default_rng(seed)
      shape = (config.num_inputs, config.num_tokens, width)
      inputs = jnp.asarray(rng.normal(size=shape))
      start = Weights(*(alpha * one for _ in range(4)))
      targets = attend(teacher, inputs)
      size, count = config.step_size, config.num_steps
      found.append(np.asarray(follow(start, inputs, targets, size, count)))
    goal = np.asarray(teacher.products)
  if not np.isfinite(found).all():
    raise errors.UserError(
        f"training diverged with step_size={config.step_size:g}: use shorter"
        " steps, in a new workdir."
    )
  halves = [half_times(each, goal, config.step_size) for each in found]
  # Until a while after the last of them.
  last = min(
      config.num_steps, 1 + int(1.5 * halves[0].max() / config.step_size)
  )
  shown = slice(None, last, max(1, last // 300))
  times = config.step_size * np.arange(1, config.num_steps + 1)
  return {
      "alpha": alpha,
      "half_times": np.array(halves) / scale,
      "times": times[shown] / scale,
      "products": found[0][shown].T,
  }


def half_times(
    products: jaxtyping.Float[np.ndarray, "S E"],
    goal: jaxtyping.Float[np.ndarray, "E"],
    step_size: float,
) -> jaxtyping.Float[np.ndarray, "E"]:
  """When each product is half of what it is to be.

  Raises:
    UserError: One never is.
  """
  is_half = products > goal / 2
  if not is_half.any(axis=0).all():
    raise errors.UserError(
        f"a product is not learned after num_steps={len(products)}: follow the"
        " flow longer."
    )
  return step_size * (1 + is_half.argmax(axis=0))


def _claims(
    config: IncrementalRankConfig, rows: list[dict[str, Any]]
) -> list[claims.Row]:
  width = len(config.keys)
  halves = np.array([row["half_times"] for row in rows])  # Alphas first.
  change = halves[-1] / halves[-2] - 1
  keys, values = halves[-1, :, :width], halves[-1, :, width:]
  gap = (keys - values).min(axis=1)
  early = halves[0, :, :width] / halves[0, :, width:] - 1
  late = keys / values - 1
  return [
      claims.row(
          "times go like ln(1/alpha)",
          f"half-times over it at alpha = {config.alphas[-1]:g} within 10 % of"
          f" those at {config.alphas[-2]:g}",
          f"from {change.min():+.1%} to {change.max():+.1%}",
          np.abs(change).max() <= 0.1,
      ),
      claims.row(
          "values are learned by size, one after the other",
          "half-times rise along values, from every seed",
          f"means {_listed(values.mean(axis=0))}",
          (np.diff(values, axis=1) > 0).all(),
      ),
      claims.row(
          "so are products of key and query",
          "half-times rise along keys, from every seed",
          f"means {_listed(keys.mean(axis=0))}",
          (np.diff(keys, axis=1) > 0).all(),
      ),
      claims.row(
          "the value of a coordinate comes before its key and query",
          "a later half-time of the latter, from every seed",
          f"least gap {gap.min():.3f}",
          gap.min() > 0,
      ),
      claims.row(
          f"the two are farther apart from alpha = {config.alphas[-1]:g} than"
          f" from {config.alphas[0]:g}",
          "a larger mean of the half-times' ratio less 1",
          f"{late.mean():.3f}, {early.mean():.3f}",
          late.mean() > early.mean(),
      ),
  ]


def _listed(values: np.ndarray) -> str:
  return ", ".join(f"{value:.2f}" for value in values)


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws products along the flow from the least start, and all half-times."""
  rows, targets = summary["rows"], summary["targets"]
  width = len(targets) // 2
  names = [f"{kind} {i + 1}" for kind in ("key", "value") for i in range(width)]
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    left, right = figure.subplots(1, 2)
    times, products = (np.asarray(rows[-1][k]) for k in ("times", "products"))
    for kind, look in enumerate((drawing.WITHOUT, drawing.WITH)):
      for i in range(width):
        row = kind * width + i
        share = products[row] / targets[row]
        label = ("key and query", "value and output")[kind] if i == 0 else None
        style = {"color": look.color, "linestyle": look.linestyle}
        left.plot(times, share, **style, label=label)
    half_time = r"time / $\ln(1/\alpha)$"
    left.set(xlabel=half_time, ylabel="share of the product learned")
    left.set(title=rf"$\alpha={rows[-1]['alpha']:g}$", ylim=(0, None))
    left.set_xlim(0, times[-1])
    left.legend(loc="lower right")
    places = np.arange(2 * width)
    looks = drawing.looks(len(rows))
    moves = drawing.shifts(len(rows))
    for row, look, move in zip(rows, looks, moves, strict=True):
      points = intervals.interval(np.asarray(row["half_times"]), least=0)
      look = look._replace(linestyle="")
      values = drawing.points(
          [{k: v[place] for k, v in points.items()} for place in places]
      )
      label = rf"$\alpha={row['alpha']:g}$"
      drawing.draw_points(right, places + move, values, look, label)
    right.set_xticks(places, names, rotation=60, ha="right")
    right.set(ylabel=f"half-{half_time}", ylim=(0, None))
    right.legend(loc="lower right")
  return figure


STUDY = study_lib.Study(
    title="Incremental learning of diagonal attention",
    config=IncrementalRankConfig(),
    smoke=dict(
        alphas=(0.3, 0.1),
        keys=(1.5, 1.0),
        values=(2.0, 1.0),
        num_seeds=2,
        num_inputs=16,
        num_tokens=3,
        num_steps=300,
    ),
    measure=study_lib.in_parts("incremental_rank", measure),
    draw=draw,
    caption=(
        "Left: share of each product that is learned, from the smallest start,"
        " first seed; the largest target comes first. Right: times at which"
        " half is learned, over ln(1/alpha), for all starts; means over draws"
        " of the inputs and 95 % intervals (Student's t)."
    ),
    report_title="Theories of attention",
)
