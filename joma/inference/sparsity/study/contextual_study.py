"""Quality against weights read: a model under every rule of leaving out.

A text is a prompt, which is read densely, and a continuation, of which each
token computes what its rule chooses; losses and measures are of continuations.
Rules, predictors and thresholds come from the training split, measures from the
validation split.
"""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

from jaxtyping import PyTree

from joma.inference.evaluation.protocols import saved_rows
from joma.inference.sparsity import contextual_config
from joma.inference.sparsity import predictors
from joma.inference.sparsity.study import capture
from joma.inference.sparsity.study import contextual_bench
from joma.inference.sparsity.study import contextual_subject
from joma.inference.sparsity.study import method_rows
from joma.inference.sparsity.study import predictor_training
from joma.transformer import model as models

Config = contextual_config.ContextualConfig

# What a change of perplexity is compared with.
_SMALL = 0.02


def study(
    config: Config,
    workdir: pathlib.Path,
    on_progress: Callable[[int], None] = lambda num_steps: None,
) -> dict[str, Any]:
  """Trains or loads a model, learns to predict its sparsity, measures.

  Args:
    config: Settings.
    workdir: Where model, capture and predictors go; it continues from them.
    on_progress: Told how many steps of training, of the model and of the
      predictors, have been taken since.

  Returns:
    `rows`, one for each rule and share; `methods`, one for each method and
    budget; `dense`, the model as it is; `facts`; `finding`, a sentence.

  Raises:
    UserError: If a text is too short, or as its parts.
    Stopped: As training.
  """
  subject = contextual_subject.load(config, workdir, on_progress)
  found: dict[str, Any] = {"rows": [], "facts": subject.facts}
  if config.with_rules:
    found = _rules(config, subject, workdir, on_progress)
  rows = saved_rows.SavedRows(workdir, {})
  measured = method_rows.measure(config, subject, rows)
  dense, others = measured[0], measured[1:]
  return {
      "finding": _finding([*found["rows"], *others], dense["perplexity"]),
      "dense": {"perplexity": dense["perplexity"]},
      "methods": others,
      "num_eval_tokens": (
          len(subject.texts.valid) * (config.seq_len - config.prompt_len - 1)
      ),
      **found,
  }


def _rules(
    config: Config,
    subject: contextual_subject.Subject,
    workdir: pathlib.Path,
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
  """Rows of the rules, and what is said of them."""
  model = models.Transformer(subject.config)
  settings = dataclasses.replace(
      config.capture, label=contextual_subject.label_of(config, subject)
  )
  shards = capture.write(
      model, subject.params, subject.texts.train, workdir / "capture", settings
  )
  facts = {"block_size": settings.block_size, "label": settings.label}
  data, learned = _learn(config, shards, facts, workdir, on_progress)
  bench = contextual_bench.Bench(config, subject, settings, learned, data)
  dense = bench.measure(None, None, {})
  return {
      "dense": contextual_bench.perplexity(dense.losses),
      "rows": [*bench.unit_rows(dense), *bench.head_rows(dense)],
      **facts,
      "num_eval_tokens": (
          dense.losses.size * (config.seq_len - config.prompt_len - 1)
      ),
      "capture_bytes": shards.manifest["bytes"],
      "capture_tokens": shards.num_rows,
      "facts": subject.facts,
  }


def _learn(
    config: Config,
    shards: capture.Shards,
    facts: dict[str, Any],
    workdir: pathlib.Path,
    on_progress: Callable[[int], None],
) -> tuple[predictor_training.Data, PyTree]:
  """Trains the predictors, and keeps them with what they were made for."""
  data = predictor_training.split(
      shards, config.predictor, config.held_out_fraction
  )
  learned = predictor_training.train(data, workdir / "predictors", on_progress)
  described = dataclasses.asdict(config.predictor) | facts
  predictors.save(workdir / "predictors.npz", learned, described)
  return data, learned


def _finding(rows: list[dict[str, Any]], dense: float) -> str:
  """The least that each rule reads with at most 2 % more perplexity."""
  of_mlps = [row["rule"] for row in rows if "mlp_weights" in row]
  parts = []
  for name in dict.fromkeys(of_mlps):
    read = [
        row["mlp_weights"]
        for row in rows
        if row["rule"] == name
        and "mlp_weights" in row
        and row["change"] <= _SMALL
    ]
    parts.append(f"{name} {100 * min(read):.0f} %" if read else f"{name} none")
  return (
      f"Perplexity {dense:.4g} as it is. Share of the MLP weights that a token"
      " reads, predictors included, at no more than"
      f" {100 * _SMALL:g} % above: {', '.join(parts)}."
  )
