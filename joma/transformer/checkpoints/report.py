"""Figures, summary and report of inspected models."""

from collections.abc import Callable, Mapping, Sequence
import math
import pathlib
from typing import Any

import numpy as np

from joma.systems.probes import names as probe_names
from joma.systems.probes import read as named
from joma.transformer import probes
from joma.transformer.checkpoints import drawing
from scansnap_jax.experiment import figures
from scansnap_jax.experiment import report

Model = Mapping[str, Any]
# What a layer whose mixer has no attention weights does not have.
_OF_WEIGHTS = (*probes.Attention._fields, "sink_rate")

_TEXT = (
    "Every number is a mean over all queries of the text. The best 20 % are"
    " the keys with the largest weights, a fifth of those that the query sees;"
    " negligible are weights below 1 % of the query's largest. A head is a sink"
    " if the first token has more than .3 of its attention. The stable rank"
    " ‖W‖²_F / ‖W‖²_2 is between 1 and the rank. What is longer than the window"
    " is cut, and each window starts at position 0."
)


def write(
    workdir: pathlib.Path,
    summary: Mapping[str, Any],
    facts: Mapping[str, str],
    started: float,
) -> pathlib.Path:
  """Writes figures/, summary.json and report.html.

  Args:
    workdir: The run's folder.
    summary: `models`, a list of what was measured of each, or `failed`, why
      it could not be.
    facts: What the report says of the run first.
    started: `time.monotonic()` at the start of the run.

  Returns:
    The path of the report.
  """
  # What a layer does not have is null in JSON and NaN in a table.
  plain = {**summary, "models": [_with_nulls(m) for m in summary["models"]]}
  written = report.write_summary(
      workdir, {"finding": finding(summary["models"]), **plain}
  )["models"]
  written = [_with_nans(model) for model in written]
  models = [model for model in written if "failed" not in model]
  sections = [
      report.Section(
          "Attention sparsity and stable ranks",
          report.as_is(finding(written)) + "\n\n" + _TEXT,
          [*_overview(models, workdir / "figures"), _models_table(models)],
      )
  ]
  for model in _most(models):
    png, _ = figures.save(
        drawing.heads(model),
        workdir / "figures",
        f"heads_{written.index(model)}",
    )
    caption = drawing.CAPTIONS["heads"]
    items = [report.Figure(caption, png), _layers_table(model)]
    if model.get("probes"):
      items.append(_probes_table(model))
    sections.append(report.Section(report.as_is(model["name"]), items=items))
  facts = {**facts, **report.run_facts(started)}
  title = "Inside Transformers: attention sparsity and MLP ranks"
  return report.write(workdir, title, facts, sections)


def _with_nulls(model: Model) -> Model:
  """Replaces NaN in what layers without attention weights do not have."""

  def nullable(values: Any) -> Any:
    values = np.asarray(values, np.float64)
    found = values.astype(object)
    found[np.isnan(values)] = None
    return found.tolist()

  return _converted(model, nullable)


def _with_nans(model: Model) -> Model:
  """The reverse of `_with_nulls`, as lists."""
  return _converted(model, lambda x: np.array(x, np.float64).tolist())


def _converted(model: Model, convert: Callable[[Any], Any]) -> Model:
  """Converts the measures that a layer may lack."""
  found = {n: convert(model[n]) for n in _OF_WEIGHTS if n in model}
  if "probes" in model:
    found["probes"] = {n: convert(v) for n, v in model["probes"].items()}
  return {**model, **found}


def _mean(values: Any) -> float:
  """Over the layers and heads that have it; NaN where none has."""
  found = np.asarray(values, np.float64)
  found = found[~np.isnan(found)]
  return float(found.mean()) if found.size else math.nan


def _shown(values: Any, spec: str = ".3f") -> str:
  mean = _mean(values)
  return "–" if math.isnan(mean) else f"{mean:{spec}}"


def finding(models: Sequence[Model]) -> str:
  """A sentence a model, of a series the first and the last; and who failed."""
  measured = [model for model in models if "failed" not in model]
  failed = [model for model in models if "failed" in model]
  said = [_sentence(model) for model in _ends(measured)]
  said += [f"{model['name']} failed: {model['failed']}" for model in failed]
  return " ".join(said)


def _sentence(model: Model) -> str:
  top, sinks = _mean(model["top_mass"]), _mean(model["sink_rate"])
  support = _mean(model["effective_support"])
  ranks = [
      f"{min(model['stable_rank'][name]):.1f} to"
      f" {max(model['stable_rank'][name]):.1f} ({name})"
      for name in ("gate", "up")
      if name in model["stable_rank"]
  ]
  loss = ""
  if model["loss"] is not None:
    loss = f"perplexity {model['perplexity']:.4g}, "
  weights = "no layer has attention weights"
  if not math.isnan(top):
    weights = (
        f"{100 * top:.0f} % of attention on the best fifth of the keys, spread"
        f" over {support:.1f} keys, {100 * sinks:.0f} % of heads are sinks"
    )
  return f"{model['name']}: {loss}{weights}, stable ranks {', '.join(ranks)}."


def _overview(
    models: Sequence[Model], folder: pathlib.Path
) -> list[report.Figure]:
  names = ["layers"] if len(models[0]["entropy"]) > 1 else []
  names += ["series"] if drawing.is_series(models) else []
  found = []
  for name in names:
    png, _ = figures.save(getattr(drawing, name)(models), folder, name)
    found.append(report.Figure(drawing.CAPTIONS[name], png))
  return found


def _models_table(models: Sequence[Model]) -> report.Table:
  header = ("model", "layers", "heads", "window", "tokens", "perplexity")
  header += ("entropy", "support", "best 20 %", "negligible", "sinks")
  rows = []
  for model in models:
    perplexity = model["perplexity"]
    rows.append((
        report.as_is(model["name"]),
        *np.shape(model["entropy"]),
        model["window"],
        model["num_tokens"],
        "–" if perplexity is None else f"{perplexity:.4g}",
        *(
            _shown(model[name])
            for name in (
                "entropy",
                "effective_support",
                "top_mass",
                "negligible",
                "sink_rate",
            )
        ),
    ))
  return report.Table("Means over layers and heads.", header, rows)


def _layers_table(model: Model) -> report.Table:
  names = ("entropy", "effective_support", "top_mass", "negligible")
  names += ("sink_mass",)
  ranks = model["stable_rank"]
  header = ("layer", *(n.replace("_", " ") for n in names), "sink rate")
  header += tuple(f"stable rank, {name}" for name in ranks)
  rows = [
      (
          layer,
          *(_shown(model[name][layer]) for name in names),
          _shown(model["sink_rate"][layer], ".2f"),
          *(f"{values[layer]:.2f}" for values in ranks.values()),
      )
      for layer in range(len(model["entropy"]))
  ]
  return report.Table("Layers, means over heads.", header, rows)


def _probes_table(model: Model) -> report.Table:
  rows = named.rows({n: np.array(v) for n, v in model["probes"].items()})
  names = [n for n in probe_names.PROBES if any(r.startswith(n) for r in rows)]
  return report.Table(
      f"Probes of layers, means over heads. {probe_names.captions(names)}",
      ("layer", *(name.replace("_", " ") for name in rows)),
      [
          (layer, *(_shown(values[layer], ".4g") for values in rows.values()))
          for layer in range(len(model["entropy"]))
      ],
  )


def _ends(models: Sequence[Model]) -> list[Model]:
  return list(models) if len(models) <= 3 else [models[0], models[-1]]


def _most(models: Sequence[Model]) -> list[Model]:
  """Models with a section of their own: of many, the first and the last."""
  return list(models) if len(models) <= 4 else [models[0], models[-1]]
