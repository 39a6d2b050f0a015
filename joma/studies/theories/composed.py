"""What does a network of quadratic nodes make of modular addition?

Composed global solutions (https://arxiv.org/abs/2410.01779). F nodes read two
numbers of d, one-hot, and vote for their sum modulo d,

  o_c = sum_j w_cj (w_aj(a) + w_bj(b))^2,   loss |P (o - e_{a+b} / 2)|^2,

P taking means over c off. In Fourier space the loss depends on sums over nodes,

  r(k1, k2, k) = sum_j A_j(k1) B_j(k2) conj(C_j(k)),   k1, k2, k != 0,
  s_A(k1, k2, k) = sum_j A_j(k1) A_j(k2) conj(C_j(k)),  and s_B,

and is 0 where (derived here) r is d^2 / 4 at k1 = k2 = k and 0 elsewhere, and
each s sums to 0 over k1 + k2 = m for every m and k. The claims: training with a
little weight decay ends there with nodes of a single frequency each, and of
every frequency with six, a product of a solution of order 2 and one of order 3.

Letters: D numbers, F nodes, K frequencies, R runs (seeds).
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
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np
  import optax

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from scansnap_jax.experiment import figures

_NAMES = ("a", "b", "c")
# Of the largest node's power, what makes a node active.
_ACTIVE = 0.05
_PURE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComposedConfig:
  """What does a network of quadratic nodes make of modular addition?

  Attributes:
    modulus: Numbers that are added, an odd number.
    num_nodes: Nodes of the network.
    num_seeds: Draws of the start.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of Adam on all pairs of numbers.
    rate: Learning rate of Adam.
    decay: Weight decay, a factor of each weight in its gradient.
    start: Deviation of the first weights.
  """

  modulus: int = 7
  num_nodes: int = 64
  num_seeds: int = 6
  first_seed: int = 0
  num_steps: int = 8000
  rate: float = 5e-3
  decay: float = 5e-5
  start: float = 0.1

  def __post_init__(self):
    require.between("num_seeds", self.num_seeds, 2, 100)
    settings_lib.require_seeds(self.first_seed, self.num_seeds)
    if self.modulus % 2 == 0:
      raise errors.UserError(f"modulus must be odd, got {self.modulus}.")
    require.between("modulus", self.modulus, 3, 51)
    require.between("num_nodes", self.num_nodes, 1, 10**4)
    require.between("num_steps", self.num_steps, 1, 10**7)
    require.positive("rate", self.rate)
    require.not_negative("decay", self.decay)
    require.positive("start", self.start)


def outputs(
    weights: dict[str, jax.Array],
) -> jaxtyping.Float[jax.Array, "D D D"]:
  """Votes o for all pairs of numbers, the last axis that of sums."""
  read = weights["a"][:, :, None] + weights["b"][:, None]
  return jnp.einsum("FAB,FC->ABC", jnp.square(read), weights["c"])


def mean_loss(
    weights: dict[str, jax.Array],
) -> jaxtyping.Float[jax.Array, ""]:
  """Over all pairs."""
  found = outputs(weights)
  numbers = jnp.arange(found.shape[0])
  sums = (numbers[:, None] + numbers[None]) % len(numbers)
  error = found - jax.nn.one_hot(sums, len(numbers)) / 2
  error -= error.mean(axis=-1, keepdims=True)
  return jnp.square(error).sum(axis=-1).mean()


def train(
    config: ComposedConfig, seed: jax.Array
) -> tuple[dict[str, jax.Array], jaxtyping.Float[jax.Array, ""]]:
  """Weights after all steps, and the loss there."""
  keys = jax.random.split(jax.random.key(seed), 3)
  shape = (config.num_nodes, config.modulus)
  draw = lambda key: config.start * jax.random.normal(key, shape)
  weights = dict(zip(_NAMES, map(draw, keys), strict=True))
  rule = optax.chain(
      optax.add_decayed_weights(config.decay), optax.adam(config.rate)
  )

  def step(state: Any, _: None) -> tuple[Any, None]:
    weights, moments = state
    slope = jax.grad(mean_loss)(weights)
    changes, moments = rule.update(slope, moments, weights)
    return (optax.apply_updates(weights, changes), moments), None

  start = (weights, rule.init(weights))
  (weights, _), _ = jax.lax.scan(step, start, None, length=config.num_steps)
  return weights, mean_loss(weights)


def spectra(
    weights: dict[str, jaxtyping.Float[np.ndarray, "F D"]],
) -> jaxtyping.Complex[np.ndarray, "3 F D"]:
  """A, B and C of each node, by frequency."""
  return np.fft.fft(np.array([weights[name] for name in _NAMES]), axis=-1)


def violations(
    spectrum: jaxtyping.Complex[np.ndarray, "3 F D"],
) -> dict[str, float]:
  """How far sums over nodes are from those of a solution, over d^2 / 4.

  Returns:
    "same", of r at equal frequencies; "others", of r elsewhere; "squares", of
    both s summed over k1 + k2.
  """
  size = spectrum.shape[-1]
  a, b, c = spectrum
  goal = size**2 / 4
  found = np.einsum("FI,FJ,FK->IJK", a, b, c.conj())[1:, 1:, 1:] / goal
  diagonal = np.arange(size - 1)
  same = np.abs(found[diagonal, diagonal, diagonal] - 1).max()
  found[diagonal, diagonal, diagonal] = 0
  squares = 0.0
  for read in (a, b):
    pairs = np.einsum("FI,FJ,FK->IJK", read, read, c.conj())[:, :, 1:] / goal
    for total in range(size):
      rows = np.arange(size)
      around = pairs[rows, (total - rows) % size].sum(axis=0)
      squares = max(squares, np.abs(around).max())
  return {
      "same": float(same),
      "others": float(np.abs(found).max()),
      "squares": float(squares),
  }


def measure(
    config: ComposedConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains from every seed, and takes the nodes apart.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", one a seed: "loss", "accuracy", "powers" of nodes by frequency,
    active ones first, "num_active", "share" of them on a single frequency,
    "of_frequency", how many each has, and `violations`; "claims" and "finding".
  """
  part = part or parts.at_once
  rows = part("networks", lambda: _run(config))["rows"]
  told = _claims(config, rows)
  return {"rows": rows, "claims": told, "finding": claims.finding(told)}


def _run(config: ComposedConfig) -> dict[str, Any]:
  seeds = jnp.array(settings_lib.seeds(config))
  follow = jax.jit(jax.vmap(train, in_axes=(None, 0)), static_argnums=0)
  weights, losses = follow(config, seeds)
  if not np.isfinite(losses).all():
    raise errors.UserError(
        f"training diverged with rate={config.rate:g}: use a smaller one, in a"
        " new workdir."
    )
  rows = []
  for run, loss in enumerate(np.asarray(losses)):
    one = {name: np.asarray(weights[name][run]) for name in _NAMES}
    rows.append({"loss": float(loss), **_apart(one)})
  return {"rows": rows}


def _apart(weights: dict[str, np.ndarray]) -> dict[str, Any]:
  """What a network's nodes are."""
  size = weights["a"].shape[1]
  found = np.asarray(outputs(jax.tree.map(jnp.asarray, weights)))
  numbers = np.arange(size)
  is_right = found.argmax(axis=-1) == (numbers[:, None] + numbers) % size
  spectrum = spectra(weights)
  # A real function has the same at k and d - k.
  powers = (np.abs(spectrum) ** 2).sum(axis=0)[:, 1 : (size + 1) // 2]
  total = powers.sum(axis=1)
  powers = powers[np.argsort(-total)]
  total = powers.sum(axis=1)
  is_active = total > _ACTIVE * total[0]
  own = powers[is_active].argmax(axis=1)
  pure = powers[is_active].max(axis=1) / total[is_active] > _PURE
  return {
      "accuracy": float(is_right.mean()),
      "powers": powers.tolist(),
      "num_active": int(is_active.sum()),
      "share": float(pure.mean()),
      "of_frequency": np.bincount(own, minlength=powers.shape[1]).tolist(),
      **violations(spectrum),
  }


def _claims(
    config: ComposedConfig, rows: list[dict[str, Any]]
) -> list[claims.Row]:
  least = min(row["share"] for row in rows)
  sixes = [all(n == 6 for n in row["of_frequency"]) for row in rows]
  worst = {
      name: max(row[name] for row in rows)
      for name in ("same", "others", "squares")
  }
  return [
      claims.row(
          "all sums are learned",
          "accuracy 1 from every seed",
          ", ".join(f"{row['accuracy']:.3f}" for row in rows),
          all(row["accuracy"] == 1 for row in rows),
      ),
      claims.row(
          "active nodes have a single frequency",
          "95 % of them have more than .95 of their power on one",
          f"least share {least:.3f}",
          least >= 0.95,
      ),
      claims.row(
          "each frequency has six nodes, 2 x 3",
          "in most seeds",
          f"{sum(sixes)} of {len(rows)}; active nodes "
          + ", ".join(str(row["num_active"]) for row in rows),
          sum(sixes) > len(rows) / 2,
      ),
      claims.row(
          "their sums in Fourier space are those of a solution",
          "within .02 of d^2 / 4 everywhere, from every seed",
          ", ".join(f"{name} {value:.4f}" for name, value in worst.items()),
          max(worst.values()) < 0.02,
      ),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the power of the first seed's nodes, and nodes of all seeds."""
  rows = summary["rows"]
  looks = drawing.looks(len(rows[0]["of_frequency"]))
  count = len(looks)
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.6)
    left, right = figure.subplots(1, 2)
    powers = np.array(rows[0]["powers"][: rows[0]["num_active"]])
    order = np.lexsort((-powers.sum(axis=1), powers.argmax(axis=1)))
    bottom = np.zeros(len(order))
    for k, look in enumerate(looks):
      left.bar(
          np.arange(len(order)),
          powers[order, k],
          bottom=bottom,
          color=look.color,
          label=f"frequency {k + 1}",
      )
      bottom += powers[order, k]
    left.set(xlabel="active node, first seed", ylabel="power")
    left.set_xticks(np.arange(0, len(order), max(1, len(order) // 6)))
    for k, look in enumerate(looks):
      place = np.arange(len(rows)) + 0.8 * (k - (count - 1) / 2) / count
      numbers = [row["of_frequency"][k] for row in rows]
      right.bar(place, numbers, width=0.8 / count, color=look.color)
    right.axhline(6, color="black", linestyle=":")
    right.set(xlabel="seed", ylabel="nodes of each frequency")
    right.set_xticks(np.arange(len(rows)))
    figures.put_legend_above(figure, figures.legend_entries(left))
  return figure


STUDY = study_lib.Study(
    title="Composed global solutions of modular addition",
    config=ComposedConfig(),
    smoke=dict(modulus=5, num_nodes=4, num_seeds=2, num_steps=4),
    measure=study_lib.in_parts("composed", measure),
    draw=draw,
    caption=(
        "Left: power of each active node by frequency, of both readers and the"
        " vote. Right: active nodes by their main frequency; dotted, the 2 x 3"
        " of a composed solution."
    ),
    report_title="Theories of attention",
)
