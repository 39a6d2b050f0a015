"""Theorem 5 of JoMA: near relatives in a latent tree occur together.

P(y_l = 1 | y_m = 1) of leaves of a hierarchical binary latent tree, against the
depth H of their lowest common ancestor (https://arxiv.org/abs/2310.00535,
Section 5): by the theorem, by summing over all values of all ancestors, and by
sampling the tree. Leaves that meet at the root only, H = -1, are outside the
theorem; for them `cooccurrence.exact_cooccurrence` takes its place.

Letters as in `joma.studies`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from joma.studies import study as study_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import drawing
  from joma.theory import cooccurrence
  from joma.theory import data
  from scansnap_jax.experiment import figures

# Samples drawn at once.
_BATCH = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class HbltConfig:
  """Theorem 5: tokens that co-occur in a hierarchical binary latent tree.

  Attributes:
    num_depths: Number of depths L with nodes; leaves are at depth L - 1.
    branching: Children of every node.
    polarity: rho of the edges, one curve each.
    root_probs: P(y_a = 1 | y_0) for each class y_0, of every node right under
      the root.
    num_top_nodes: Nodes right under the root.
    batch_size: Sequences sampled.
    seed: Random seed for the sampled sequences.
  """

  num_depths: int = 5
  branching: int = 2
  polarity: tuple[float, ...] = (0.5, 0.8, 0.95)
  root_probs: tuple[float, ...] = (0.2, 0.7)
  num_top_nodes: int = 2
  batch_size: int = 100_000
  seed: int = 0

  def __post_init__(self):
    require.between("num_depths", self.num_depths, 2, 10)
    require.between("branching", self.branching, 2, 10)
    require.between("num_top_nodes", self.num_top_nodes, 1, 10)
    num_leaves = self.num_top_nodes * self.branching ** (self.num_depths - 1)
    if num_leaves > 2048:
      raise errors.UserError(
          f"num_depths={self.num_depths}, branching={self.branching} and"
          f" num_top_nodes={self.num_top_nodes} make {num_leaves} leaves; up to"
          " 2048 are compared in pairs."
      )
    if not self.polarity or not self.root_probs:
      raise errors.UserError("polarity and root_probs need a value each.")
    for rho in self.polarity:
      if not -1 <= rho <= 1:
        raise errors.UserError(f"polarity must lie in [-1, 1], got {rho}.")
    for prob in self.root_probs:
      if not 0 < prob < 1:
        raise errors.UserError(f"root_probs must lie in (0, 1), got {prob}.")
    require.between("batch_size", self.batch_size, 1, 10**7)
    require.seeds("seed", self.seed)


def make_tree(config: HbltConfig, polarity: float) -> data.Hblt:
  """Builds the tree with one polarity on all edges."""
  on = np.array(config.root_probs)[:, None]
  return data.make_hblt(
      np.repeat(on, config.num_top_nodes, axis=1),
      [config.branching] * (config.num_depths - 1),
      polarity,
  )


def measure(
    config: HbltConfig,
    *,
    on_metrics: study_lib.OnMetrics | None = None,
) -> dict[str, Any]:
  """Compares the theorem with enumeration and with samples.

  Args:
    config: The settings.
    on_metrics: Called with the place of each H and what each way gives there.

  Returns:
    `rows`, one for each polarity: `depths` H from the farthest pair to L - 1
    (the leaf itself), with `theorem` (None at the root), `exact`, `enumerated`,
    `sampled` (mean over pairs) and `sampled_error`, the standard error of the
    latter; `largest_enumeration_error` and `largest_z_score`; and the finding.
  """
  keys = jax.random.split(jax.random.key(config.seed), len(config.polarity))
  rows = [
      _row(config, polarity, key)
      for polarity, key in zip(config.polarity, keys, strict=True)
  ]
  curves = {
      f"{name}_{row['polarity']:g}": row[name]
      for row in rows
      for name in ("exact", "enumerated", "sampled")
  }
  depths = rows[0]["depths"]
  study_lib.emit(on_metrics, range(len(depths)), {"depth": depths, **curves})
  summary = {
      "num_depths": config.num_depths,
      "rows": rows,
      "largest_enumeration_error": max(
          abs(law - enumerated)
          for row in rows
          for law, enumerated in zip(
              row["theorem"], row["enumerated"], strict=True
          )
          if law is not None
      ),
      "largest_z_score": max(
          abs(sampled - exact) / error
          for row in rows
          for sampled, exact, error in zip(
              *(row["sampled"], row["exact"], row["sampled_error"]), strict=True
          )
          if error > 0
      ),
  }
  return {**summary, "finding": _finding(summary)}


def _row(config: HbltConfig, polarity: float, key: jax.Array) -> dict[str, Any]:
  tree = make_tree(config, polarity)
  depth = data.common_depth(tree)
  # Of the first leaf with a relative at each depth: all polarities are equal,
  # so that pairs of one depth are alike.
  exact = cooccurrence.exact_cooccurrence(tree)
  rho_0 = float(cooccurrence.root_polarity(tree)[0])
  depths = np.unique(depth).tolist()
  # The first leaf has a relative at every depth.
  relatives = [int(np.flatnonzero(depth[0] == h)[0]) for h in depths]
  sampled, error = _sample(key, tree, depth, depths, config.batch_size)
  law = lambda h: cooccurrence.cooccurrence(
      polarity, rho_0, config.num_depths, h
  )
  return {
      "polarity": polarity,
      "root_polarity": rho_0,
      "depths": depths,
      "theorem": [None if h < 0 else law(h) for h in depths],
      "exact": [float(exact[0, m]) for m in relatives],
      "enumerated": [
          cooccurrence.enumerated_cooccurrence(tree, 0, m) for m in relatives
      ],
      "sampled": sampled.tolist(),
      "sampled_error": error.tolist(),
  }


def _sample(
    key: jax.Array,
    tree: data.Hblt,
    depth: np.ndarray,
    depths: list[int],
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Estimates P(both) / P(one) at each depth, and its standard error."""
  # Pairs at each depth [H, M, M], averaged.
  pairs = np.array([depth == h for h in depths], np.float32)
  pairs /= pairs.sum(axis=(1, 2), keepdims=True)
  num_batches = -(-batch_size // _BATCH)
  draw_batch = jax.jit(_draw_batch)
  batches = [
      draw_batch(each, tree, jnp.asarray(pairs))
      for each in jax.random.split(key, num_batches)
  ]
  both, one = (
      np.concatenate(parts)[:batch_size].astype(np.float64)
      for parts in zip(*batches, strict=True)
  )
  ratio = both.mean(axis=0) / one.mean()
  # Delta method: the error of a ratio of means of the same samples.
  scatter = (both - ratio * one[:, None]).std(axis=0)
  return ratio, scatter / one.mean() / np.sqrt(len(one))


def _draw_batch(
    key: jax.Array, tree: data.Hblt, pairs: jaxtyping.Float[jax.Array, "H M M"]
) -> tuple[jaxtyping.Float[jax.Array, "B H"], jaxtyping.Float[jax.Array, "B"]]:
  """Averages y_l y_m over the pairs of each depth, and y_m over leaves."""
  leaves = data.sample_hblt(key, tree, batch_size=_BATCH).nodes[-1]
  # As numbers, so that a mean over all pairs of a depth is one contraction.
  y = leaves.astype(pairs.dtype)
  return jnp.einsum("Bl,Hlm,Bm->BH", y, pairs, y), y.mean(axis=1)


def _finding(summary: dict[str, Any]) -> str:
  error, z_score = (
      summary["largest_enumeration_error"],
      summary["largest_z_score"],
  )
  verb = "equals" if error < 1e-10 else "differs from"
  agree = "agree" if z_score < 4 else "disagree"
  rising = all(
      np.all(np.diff([p for p in row["theorem"] if p is not None]) >= -1e-12)
      for row in summary["rows"]
  )
  order = "the nearer" if rising else "not always the nearer"
  return (
      f"Theorem 5 {verb} enumeration (largest difference {error:.0e}), and"
      f" samples {agree} with it (within {z_score:.1f} standard errors):"
      f" {order} the common ancestor, the more often leaves occur together."
  )


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws co-occurrence against the depth of the common ancestor."""
  rows = summary["rows"]
  looks = drawing.looks(len(rows))
  with figures.style():
    figure = figures.make_figure(figures.COLUMN_WIDTH, 3.0)
    axes = figure.subplots()
    for row, look in zip(rows, looks, strict=True):
      # No line to the root, of which the theorem does not speak.
      known = [
          h for h, law in zip(row["depths"], row["theorem"], strict=True) if law
      ]
      axes.plot(
          known,
          [law for law in row["theorem"] if law],
          color=look.color,
          linestyle=look.linestyle,
          label=rf"$\rho={row['polarity']:g}$",
      )
      axes.plot(row["depths"], row["enumerated"], "x", color=look.color)
      axes.errorbar(
          row["depths"],
          row["sampled"],
          4 * np.asarray(row["sampled_error"]),
          color=look.color,
          marker="o",
          linestyle="",
          markersize=6,
          markerfacecolor="none",
          elinewidth=0.7,
      )
    depths = rows[0]["depths"]
    labels = ["root" if h < 0 else str(h) for h in depths]
    axes.set_xticks(depths, labels)
    axes.set(
        xlabel="depth $H$ of the common ancestor",
        ylabel="$P(y_l=1\\,|\\,y_m=1)$",
        ylim=(None, 1.03),
    )
    entries = figures.legend_entries(axes)
    figures.put_legend_above(figure, entries)
  return figure


STUDY = study_lib.Study(
    title="Theorem 5: tokens that co-occur",
    config=HbltConfig(),
    measure=study_lib.streamed("hblt", measure),
    draw=draw,
    caption=(
        "Probability that a token occurs if another one does, against the depth"
        " H of their lowest common ancestor. Lines: Theorem 5, which does not"
        " speak of the root; crosses: enumeration; open circles: samples, with"
        " four standard errors."
    ),
)
