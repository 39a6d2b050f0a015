"""Figures, summary and report of a Scan & Snap run, from its results."""

from collections.abc import Mapping
import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib import figure as mpl_figure
import numpy as np

from scansnap_jax import config as config_lib
from scansnap_jax import flow
from scansnap_jax import metrics
from scansnap_jax import model
from scansnap_jax import published
from scansnap_jax import run as run_lib
from scansnap_jax import train
from scansnap_jax.experiment import figures
from scansnap_jax.experiment import report
from scansnap_jax.figures import attention
from scansnap_jax.figures import shared_seeds
from scansnap_jax.figures import sparsity
from scansnap_jax.figures import theory
from scansnap_jax.theorems import table

Configs = Mapping[str, config_lib.ScanSnapConfig]
Results = Mapping[str, list[train.Result]]
Rates = tuple[float, float]  # lr_z, lr_ratio

TITLES = {
    "figure3": "Figure 3: growth of the relative gain",
    "figure4": "Figure 4: attention along training, SGD",
    "figure5": "Figure 5: attention along training, Adam",
    "figure6": "Figure 6: sparsity by learning rates",
    "figure8": "Figure 8: decoder growth",
    "figure9": "Figure 9: exponent of the relative gain",
    "figure11": "Figure 11: recall of distinct tokens by η_Z",
    "figure12": "Figure 12: recall of distinct tokens by η_Y/η_Z",
    "sweep": "Sweep: sparsity by learning rates",
}
# Fields in which a run may differ from a figure's and still be held against
# the authors' values.
_SWEPT = ("num_last", "lr_z", "lr_ratio", "num_seeds", "first_seed")


def write(
    workdir: pathlib.Path,
    configs: Configs,
    results: Results,
    sections: list[report.Section],
    checks: list[table.TheoremCheck],
    facts: Mapping[str, str],
    started: float,
) -> pathlib.Path:
  """Writes summary.json and report.html of a finished run.

  Args:
    workdir: The run's folder.
    configs: What was trained, by experiment.
    results: What came of it.
    sections: Of its figures, by `draw_section`.
    checks: Of every theorem, or none.
    facts: What the report says of the run first.
    started: `time.monotonic()` at the start of the run.

  Returns:
    The path of the report.
  """
  summary = summarize(configs, results, checks)
  report.write_summary(workdir, summary)
  if checks:
    sections = [*sections, _theorem_section(checks)]
  facts = {**facts, **report.run_facts(started)}
  title = "Scan & Snap: one attention layer"
  return report.write(workdir, title, facts, sections)


def summarize(
    configs: Configs, results: Results, checks: list[table.TheoremCheck]
) -> dict[str, Any]:
  """The numbers of a run: a key per experiment, and `theorems`.

  Of a sweep also `..._shared_seeds`: how far its points hang together.
  """
  summary: dict[str, Any] = {}
  for name, settings in results.items():
    if name in ("figure4", "figure5"):
      summary[name] = _by_rate(settings[0], name)
    else:
      show_published = _is_published(name, configs[name])
      summary[name] = [
          row for result in settings for row in cells(result, show_published)
      ]
      shared = [shared_seeds.summarize(result) for result in settings]
      summary[f"{name}_shared_seeds"] = [row for row in shared if row]
  if checks:
    summary["theorems"] = [
        {
            "name": check.name,
            "statement": check.statement,
            # JSON has no NaN; a statement that measures it does not hold.
            "measured": (
                check.measured if math.isfinite(check.measured) else None
            ),
            "bound": check.bound,
            "holds": check.holds,
        }
        for check in checks
    ]
  return summary


def cells(
    result: train.Result, show_published: bool = False
) -> list[dict[str, Any]]:
  """Final values of a data setting, one row a pair of learning rates.

  Means and sample standard deviations (ddof 1) are over seeds; the latter are
  None for a single seed. If asked, the authors' values stand beside ours where
  they are known.
  """
  rows = []
  for (lr_z, lr_ratio), runs in _runs_of_rates(result).items():
    row: dict[str, Any] = {
        "num_last": result.num_last,
        "num_next": result.classes.num_classes,
        "lr_z": lr_z,
        "lr_ratio": lr_ratio,
        "num_seeds": len(runs),
    }
    for name, values in (
        ("entropy", result.history.distinct_entropy[runs, -1]),
        ("common_mass", result.history.common_mass[runs, -1]),
        ("last_batch_loss", result.history.losses[runs, -1]),
    ):
      row[f"{name}_mean"], row[f"{name}_std"] = _mean_and_std(values)
    cell = published.figure6_cell(
        result.num_last, result.classes.num_classes, lr_z, lr_ratio
    )
    if show_published and cell is not None:
      row["published_mean"], row["published_std"] = cell.mean, cell.std
    rows.append(row)
  return rows


def _by_rate(result: train.Result, name: str) -> dict[str, Any]:
  """Figures 4 and 5: final values by eta_Y / eta_Z, or by eta_Z."""
  summary = {}
  for row in cells(result):
    key = row["lr_ratio" if name == "figure4" else "lr_z"]
    summary[f"{key:g}"] = {
        "distinct_entropy": row["entropy_mean"],
        "distinct_entropy_std": row["entropy_std"],
        "common_mass": row["common_mass_mean"],
        "common_mass_std": row["common_mass_std"],
        "last_batch_loss": row["last_batch_loss_mean"],
        "lr_z": row["lr_z"],
        "lr_ratio": row["lr_ratio"],
        "num_seeds": row["num_seeds"],
        "leading_ranks": _leading_ranks(
            result, _runs_of_rates(result)[row["lr_z"], row["lr_ratio"]]
        ),
    }
  return summary


def _leading_ranks(result: train.Result, runs: list[int]) -> list[int]:
  """How often each rank leads, the most frequent first; of runs and classes."""
  probs, is_distinct = map(
      jnp.asarray, (result.classes.probs, result.classes.is_distinct)
  )
  last = jnp.asarray(result.history.attended[:, -1])
  ranks = [metrics.leading_rank(last[r], probs, is_distinct) for r in runs]
  most = int(is_distinct.sum(axis=1).max())
  return np.bincount(np.concatenate(ranks), minlength=most + 1)[1:].tolist()


def _runs_of_rates(
    result: train.Result,
) -> dict[tuple[float, float], list[int]]:
  """Positions of the runs of each (lr_z, lr_ratio), in order."""
  groups: dict[tuple[float, float], list[int]] = {}
  rates = zip(result.runs.lr_z, result.runs.lr_ratio, strict=True)
  for r, (lr_z, lr_ratio) in enumerate(rates):
    groups.setdefault((float(lr_z), float(lr_ratio)), []).append(r)
  return groups


def _mean_and_std(values: np.ndarray) -> tuple[float, float | None]:
  values = np.asarray(values, np.float64)
  std = float(values.std(ddof=1)) if len(values) > 1 else None
  return float(values.mean()), std


def draw_section(
    workdir: pathlib.Path,
    name: str,
    config: config_lib.ScanSnapConfig | None = None,
    results: list[train.Result] | None = None,
) -> report.Section:
  """Draws one figure, saves it, and lays it out with its numbers.

  Args:
    workdir: The run's folder; the figure goes to figures/ in it.
    name: Of the experiment or of a figure of the theory alone, in `TITLES`.
    config: What was trained, if anything.
    results: What came of it.
  """
  if config is not None and results is not None:
    figure, caption = _draw(name, config, results)
    tables = [_cell_table(results, _is_published(name, config))]
  else:
    figure = getattr(theory, name)()
    caption, tables = theory.CAPTIONS[name], []
  png, _ = figures.save(figure, workdir / "figures", name)
  return report.Section(
      TITLES[name], items=[report.Figure(caption, png), *tables]
  )


def _draw(
    name: str, config: config_lib.ScanSnapConfig, results: list[train.Result]
) -> tuple[mpl_figure.Figure, str]:
  """Draws the figure of trained runs; returns it with its caption."""
  show_published = _is_published(name, config)
  if name == "figure4":
    prediction = predict_by_flow(config, results[0])
    figure = attention.figure4(
        results[0], prediction, show_published=show_published
    )
  elif name == "figure5":
    # SGD's flow at one rate of both, over the steps of the runs.
    momentum = config_lib.figure4().optimizer
    config = dataclasses.replace(config, optimizer=momentum, lr_z=(1.0,))
    prediction = predict_by_flow(config, results[0])
    figure = attention.figure5(results[0], prediction)
  elif name in ("figure11", "figure12"):
    figure = getattr(sparsity, name)(results)
  else:
    figure = sparsity.figure6(results, show_published=show_published)
  captions = {**attention.CAPTIONS, **sparsity.CAPTIONS}
  return figure, captions.get(name, captions["figure6"])


def _is_published(name: str, config: config_lib.ScanSnapConfig) -> bool:
  """True if the authors' values are of this experiment, swept fields aside."""
  base = {
      "figure4": config_lib.figure4(),
      "figure6": config_lib.figure6(),
      "figure11": config_lib.figure6(),
      "figure12": config_lib.figure6(),
  }.get(name)
  if base is None:
    return False
  # What is swept or recorded does not make it another experiment.
  ignored = (*_SWEPT, "log_every", "checkpoint_every", "record_attention")
  same = {field: getattr(base, field) for field in ignored}
  return dataclasses.replace(config, **same) == base


def _cell_table(
    settings: list[train.Result], show_published: bool
) -> report.Table:
  """The final values of every pair of learning rates."""
  rows = [row for result in settings for row in cells(result, show_published)]
  columns = {
      "queries": [row["num_last"] for row in rows],
      "next tokens": [row["num_next"] for row in rows],
      "η_Z": [f"{row['lr_z']:g}" for row in rows],
      "η_Y/η_Z": [f"{row['lr_ratio']:g}" for row in rows],
      "entropy (nats)": [_with_std(row, "entropy") for row in rows],
      "authors' entropy": [_with_std(row, "published") for row in rows],
      "common mass": [_with_std(row, "common_mass") for row in rows],
      "last batch's loss (nats)": [
          f"{row['last_batch_loss_mean']:.3g}" for row in rows
      ],
  }
  columns = {name: cells for name, cells in columns.items() if any(cells)}
  num_seeds = len(np.unique(settings[0].runs.seed))
  caption = (
      f"After training: mean ± sample standard deviation, {num_seeds} seeds."
  )
  shared = [shared_seeds.summarize(result) for result in settings]
  effective = [f"{row['effective_cells']:.1f}" for row in shared if row]
  if effective:
    caption += (
        " The pairs of rates of a setting share their seeds: they vary like"
        f" {', '.join(effective)} independent ones."
    )
  return report.Table(
      caption, [*columns], [*zip(*columns.values(), strict=True)]
  )


def _with_std(row: Mapping[str, Any], name: str) -> str:
  """Such as `1.936 ± 0.007`; nothing where the row lacks the value."""
  mean, std = row.get(f"{name}_mean"), row.get(f"{name}_std")
  if mean is None:
    return ""
  return f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}"


def _theorem_section(checks: list[table.TheoremCheck]) -> report.Section:
  rows = [
      (
          check.name,
          check.statement,
          f"{check.measured:.3g}",
          f"{check.bound:.3g}",
          "yes" if check.holds else "NO",
      )
      for check in checks
  ]
  holding = sum(check.holds for check in checks)
  caption = f"{holding} of {len(checks)} statements hold within their bounds."
  header = ("statement of", "what is measured", "measured", "bound", "holds")
  return report.Section("Theorems", items=[report.Table(caption, header, rows)])


def predict_by_flow(
    config: config_lib.ScanSnapConfig, result: train.Result
) -> attention.Flow | None:
  """What gradient flow predicts for infinitely long sequences.

  Returns:
    By eta_Y / eta_Z, at the first eta_Z: steps, distinct entropy and common
    mass. None for Adam and for models that the flow does not describe.
  """
  is_described = config.model == config_lib.ModelConfig()
  if config.optimizer.name == "adam" or not is_described:
    return None
  is_momentum = config.optimizer.name == "momentum"
  classes = jax.tree.map(jnp.asarray, train.share(result.classes))
  start = jnp.zeros((result.classes.num_tokens,) * 2)
  layer = model.make_layer(config.model, result.classes.num_tokens)

  @jax.jit
  def predict(
      eta_y: jax.Array, eta_z: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    decoder, attn_logits = flow.integrate(
        jnp.asarray(result.steps, jnp.float32),
        start,
        start,
        classes.probs,
        classes.query,
        classes.label,
        eta_y=eta_y,
        eta_z=eta_z,
        momentum=config.optimizer.momentum if is_momentum else 0.0,
        class_weights=jnp.asarray(result.classes.class_probs, jnp.float32),
    )
    observe = lambda y, z: run_lib.observe({"Y": y, "Z": z}, layer, classes)
    seen = jax.vmap(observe)(decoder, attn_logits)
    return seen.distinct_entropy, seen.common_mass

  # The rates are traced: one program integrates every ratio.
  curves = {}
  for ratio in config.lr_ratio:
    entropy, mass = predict(config.lr_z[0] * ratio, config.lr_z[0])
    curves[ratio] = (result.steps, np.asarray(entropy), np.asarray(mass))
  return curves
