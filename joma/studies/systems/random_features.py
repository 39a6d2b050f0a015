"""How many examples does attention of random features need?

  f(x_0; x_1 ... x_N) = sum_m 1/N sum_i relu(x~_0^T W_m x~_i) <v_m, x~_i>

with frozen random W_m learns averages over its keys from few examples, where a
network of as many random features, which does not know that the keys' order
says nothing, needs many (https://arxiv.org/abs/2307.11353). Both are ridge
regressions: v has a closed form. Tokens have length 1. The strength of the
ridge is chosen on other examples than those of the test. Targets are

  average      mean_i <beta, x_i>^2
  correlation  mean_i <x_0, x_i>^3 <beta, x_i>

On the second the paper has W_m shifted by the identity do better, which is
reported and decides nothing.

The figure shows the test error, in units of the target's variance.
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

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.systems.closed_form import random_features
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

TARGETS = ("average", "correlation")
KINDS = ("attention", "biased attention", "network")
# As measured before, one seed, at 100, 400 and 1600 examples.
_EXPECTED = {
    ("average", "attention"): (0.364, 0.032, 0.015),
    ("average", "network"): (1.07, 1.03, 0.895),
    ("correlation", "attention"): (0.559, 0.304, 0.198),
    ("correlation", "biased attention"): (0.431, 0.334, 0.274),
    ("correlation", "network"): (0.704, 0.549, 0.487),
}
_EXPECTED_AT = (100, 400, 1600)
# What the error of the average may be at most: twice what is expected.
_BOUNDS = {100: 0.72, 400: 0.06, 1600: 0.04}
_STRENGTHS = tuple(10.0**power for power in range(-9, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomFeaturesConfig:
  """How many examples does attention of random features need?

  Attributes:
    num_seeds: Draws of weights, targets and examples.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    size: Numbers D of a token.
    num_keys: Keys N of an example.
    num_heads: Heads M; the network has M (D + 1) hidden units.
    num_examples: Examples of a fit, one or more numbers.
    num_test: Examples that the ridge is chosen on, and as many of the test.
  """

  num_seeds: int = 5
  first_seed: int = 0
  size: int = 6
  num_keys: int = 8
  num_heads: int = 150
  num_examples: tuple[int, ...] = (100, 400, 1600)
  num_test: int = 2000

  def __post_init__(self):
    require.between("num_seeds", self.num_seeds, 2, 10**4)
    require.seeds("first_seed", self.first_seed, self.num_seeds)
    for name in ("size", "num_keys", "num_heads"):
      require.between(name, getattr(self, name), 1, 10**4)
    require.at_least("num_test", self.num_test, 2)
    if not self.num_examples:
      raise errors.UserError("num_examples needs one or more numbers.")
    for number in self.num_examples:
      require.between("num_examples", number, 2, 10**6)
    require.memory(
        f"num_heads={self.num_heads} of size={self.size}",
        8 * (self.num_heads * (self.size + 1)) ** 2,
    )


def measure(
    config: RandomFeaturesConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Fits all kinds to both targets at all numbers of examples.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "errors", of each target, kind and number of examples, intervals over seeds;
    "descent", the largest difference of predictions between the closed form and
    gradient descent, relative to the largest prediction; "claims" and
    "finding".
  """
  part = part or parts.at_once
  seeds = settings_lib.seeds(config)
  found = [
      part(f"seed {seed}", lambda s=seed: _of_seed(config, s)) for seed in seeds
  ]
  errors_of = {
      target: {
          kind: {
              number: intervals.interval(
                  np.array([one[target][kind][number] for one in found]),
                  least=0,
              )
              for number in map(str, config.num_examples)
          }
          for kind in KINDS
      }
      for target in TARGETS
  }
  descent = max(one["descent"] for one in found)
  told = _claims(errors_of, descent)
  return {
      "num_seeds": config.num_seeds,
      "num_examples": list(config.num_examples),
      "errors": errors_of,
      "descent": descent,
      "claims": told,
      "finding": claims.finding(told),
  }


def _of_seed(config: RandomFeaturesConfig, seed: int) -> dict[str, Any]:
  generator = np.random.default_rng(seed)
  direction = generator.normal(size=config.size)
  direction /= np.linalg.norm(direction)
  num_units = config.num_heads * (config.size + 1)
  num_inputs = (config.num_keys + 1) * config.size
  heads = [
      random_features.head_weights(
          generator, config.num_heads, config.size, is_biased=is_biased
      )
      for is_biased in (False, True)
  ]
  units = random_features.network_weights(generator, num_units, num_inputs)
  total = max(config.num_examples) + 2 * config.num_test
  query = _directions(generator, (total, config.size))
  keys = _directions(generator, (total, config.num_keys, config.size))
  of_kind = zip(
      KINDS,
      (
          random_features.attention_features(heads[0], query, keys),
          random_features.attention_features(heads[1], query, keys),
          random_features.network_features(units, query, keys),
      ),
      strict=True,
  )
  found: dict[str, Any] = {target: {} for target in TARGETS}
  values = np.stack(
      [answers(target, query, keys, direction) for target in TARGETS], axis=1
  )
  for kind, features in of_kind:
    error = {
        str(number): _errors(features, values, number, config.num_test)
        for number in config.num_examples
    }
    for i, target in enumerate(TARGETS):
      found[target][kind] = {n: float(each[i]) for n, each in error.items()}
  return found | {"descent": _descent(generator)}


def answers(
    target: str,
    query: jaxtyping.Float[np.ndarray, "B D"],
    keys: jaxtyping.Float[np.ndarray, "B N D"],
    direction: jaxtyping.Float[np.ndarray, "D"],
) -> jaxtyping.Float[np.ndarray, "B"]:
  """What is to be said of examples."""
  along = keys @ direction
  if target == "average":
    return np.square(along).mean(axis=1)
  return (np.einsum("bd,bnd->bn", query, keys) ** 3 * along).mean(axis=1)


def _directions(
    generator: np.random.Generator, shape: tuple[int, ...]
) -> jaxtyping.Float[np.ndarray, "..."]:
  """Draws vectors of length 1, in all directions alike."""
  drawn = generator.normal(size=shape)
  return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


def _errors(
    features: jaxtyping.Float[np.ndarray, "B F"],
    values: jaxtyping.Float[np.ndarray, "B K"],
    number: int,
    num_test: int,
) -> jaxtyping.Float[np.ndarray, "K"]:
  """Test errors over variances, by the ridges best on other examples."""
  chosen, test = slice(-2 * num_test, -num_test), slice(-num_test, None)
  # A constant beside: no kind has to make it of its features.
  mean = values[:number].mean(axis=0)
  fits = random_features.ridge(
      features[:number], values[:number] - mean, _STRENGTHS
  )
  missed = lambda where: np.square(
      features[where] @ fits + mean - values[where]
  ).mean(axis=1)
  best = missed(chosen).argmin(axis=0)
  errors_of = missed(test)[best, np.arange(len(best))]
  return errors_of / values[test].var(axis=0)


def _descent(generator: np.random.Generator) -> float:
  """Largest difference of the closed form and gradient descent, on few."""
  heads = random_features.head_weights(generator, 6, 3)
  query = generator.normal(size=(40, 3))
  keys = generator.normal(size=(40, 5, 3))
  features = random_features.attention_features(heads, query, keys)
  values = answers("average", query, keys, np.ones(3) / np.sqrt(3))
  closed = random_features.ridge(features, values[:, None], (1e-4,))[0, :, 0]
  walked = random_features.descend(features, values, 1e-4, 20_000)
  largest = np.abs(features @ closed).max()
  return float(np.abs(features @ (closed - walked)).max() / largest)


def _claims(errors_of: dict[str, Any], descent: float) -> list[claims.Row]:
  average = errors_of["average"]
  told = [
      claims.row(
          "the closed form is the limit of gradient descent",
          "predictions equal to 1e-6",
          f"{descent:.1e}",
          descent <= 1e-6,
      )
  ]
  for number, row in average["attention"].items():
    bound = _BOUNDS.get(int(number))
    if bound is None:
      continue
    known = dict(
        zip(_EXPECTED_AT, _EXPECTED["average", "attention"], strict=True)
    )
    told.append(
        claims.row(
            f"attention learns an average from {number} examples",
            f"error {known[int(number)]:g}, at most {bound:g}",
            intervals.text(row),
            row["mean"] <= bound,
        )
    )
  worst = average["network"][max(average["network"], key=int)]
  told.append(
      claims.row(
          "a network of as many random features does not, from as many"
          " examples",
          "error about 1, at least .7, at the most examples",
          intervals.text(worst),
          worst["mean"] >= 0.7,
      )
  )
  return told


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the test error against the number of examples."""
  numbers = np.array(summary["num_examples"], float)
  looks = drawing.looks_of(list(KINDS))
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.8)
    panels = figure.subplots(1, 2, sharey=True).tolist()
    for axes, target in zip(panels, TARGETS, strict=True):
      for kind in KINDS:
        row = summary["errors"][target][kind]
        values = drawing.points([row[str(n)] for n in summary["num_examples"]])
        drawing.draw_points(axes, numbers, values, looks[kind], kind)
        known = _EXPECTED.get((target, kind))
        if known is not None:
          figures.draw_known_points(
              axes,
              np.array(_EXPECTED_AT, float),
              np.array(known),
              look=looks[kind]._replace(linestyle=""),
          )
      axes.set(title=target, xlabel="examples", xscale="log", yscale="log")
    panels[0].set_ylabel("test error / variance")
    entries = figures.legend_entries(panels[0])
    entries["expected"] = figures.known_entry()
    figures.put_legend_above(figure, entries)
  return figure


STUDY = study_lib.Study(
    title="Random-feature attention: examples that it needs",
    config=RandomFeaturesConfig(),
    smoke=dict(
        num_seeds=2,
        size=3,
        num_keys=4,
        num_heads=20,
        num_test=200,
        num_examples=(400,),
    ),
    measure=study_lib.in_parts("random_features", measure),
    draw=draw,
    caption=(
        "Mean squared error on other examples, in units of the target's"
        " variance, of ridge regression on random features of attention and of"
        " a network. Means over seeds and 95 % intervals (Student's t). Open"
        " markers: expected."
    ),
    report_title="Attention systems",
)
