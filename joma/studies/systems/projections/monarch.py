"""What should an MLP read less of: Monarch's slices, rank, or neurons?

Three ways to read a share of an MLP's weights, at equal bytes a token:

  low rank   each matrix is the nearest one of some rank
  Monarch    each slice of a matrix, of `blocks` x `blocks`, is the nearest one
             of its own rank (https://arxiv.org/abs/2204.00595)
  Deja Vu    each token computes the neurons that a predictor, whose weights
             count, expects to matter (https://arxiv.org/abs/2310.17157)
  oracle     as Deja Vu, with the neurons that truly matter and no predictor

The first two are shown as projected, and after some steps of training on other
text ("tuned"), which the dense model gets too. One small ReLU model is trained,
or with `--monarch.model=DIR` a checkpoint is read.

The figure shows loss above the dense model's against the bytes.
"""

from __future__ import annotations

import functools
from typing import Any

from etils import epy

from joma.studies import study as study_lib
from joma.studies.systems.projections import monarch_subject as subjects

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies.systems.projections import compressed_mlps
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals


def measure(
    config: subjects.MonarchConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Measures every way at every share.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", a way at a share each: "bytes" that it reads of the MLPs' weights,
    "perplexity" and "loss above dense", an interval over texts; "dense"
    perplexity; "apart", by pair of ways, intervals of the first's loss above
    the second's at each share; "off", the largest relative difference of a
    squared error and its discarded singular values; "claims" and "finding".
  """
  part = part or parts.at_once
  # What is kept needs no model: it is made for what is missing alone.
  made = functools.cache(lambda: subjects.make(config))
  found = [
      part(f"share {share}", lambda share=share: _at(config, share, *made()))
      for share in config.shares
  ]
  whole = part("dense", lambda: _of_dense(config, *made()))
  summary = {
      **whole,
      "num_texts": config.num_texts,
      "rows": [row for each in found for row in each["rows"]],
      "off": max(each["off"] for each in found),
      "apart": {
          pair: [each["apart"][pair] for each in found]
          for pair in found[0]["apart"]
      },
      "shares": [each["share"] for each in found],
  }
  table = _claims(summary)
  return {**summary, "claims": table, "finding": claims.finding(table)}


def _at(
    config: subjects.MonarchConfig,
    share: float,
    subject: compressed_mlps.Compressed,
    text: Any,
    dense: Any,
    learned: Any,
) -> dict[str, Any]:
  """All ways at one share."""
  rank = subjects.rank_of(config, subject, share)
  num_weights = rank * subjects.per_rank(config, subject)
  factored, off = subjects.factored(config, subject, text, rank)
  chosen = subjects.chosen(config, subject, num_weights, learned)
  ways = {**factored, **chosen}
  rows = [
      {
          "way": name,
          "bytes": read / subject.shape.weights,
          "perplexity": float(np.exp(values.mean())),
          "loss above dense": intervals.interval(values - dense),
      }
      for name, (values, read) in ways.items()
  ]
  apart = {
      f"{one} - {other}": intervals.interval(ways[one][0] - ways[other][0])
      for one, other in _PAIRS
      if one in ways and other in ways
  }
  of_all = num_weights / subject.shape.weights
  return {"rows": rows, "off": off, "apart": apart, "share": of_all}


def _of_dense(
    config: subjects.MonarchConfig,
    subject: compressed_mlps.Compressed,
    text: Any,
    dense: Any,
    learned: Any,
) -> dict[str, Any]:
  """The dense model, and the same trained on where factors are."""
  del learned
  found: dict[str, Any] = {"dense": float(np.exp(dense.mean()))}
  if config.num_tune:
    tuned = subject.losses(subjects.tune(config, subject, text))
    above = intervals.interval(tuned - dense)
    found["loss of the tuned dense model above dense"] = above
  return found


_PAIRS = (
    ("low rank", "Monarch"),
    ("low rank, tuned", "Monarch, tuned"),
    ("Monarch", "Deja Vu"),
    ("Monarch, tuned", "Deja Vu"),
)


def _claims(found: dict[str, Any]) -> list[claims.Row]:
  off = found["off"]
  rows = [
      claims.row(
          "the squared error of a projection is that of the singular values"
          " left out",
          "within 1e-5 of the matrix's square",
          f"{off:.1e}",
          off < 1e-5,
      )
  ]
  for one, other in _PAIRS:
    gaps = found["apart"].get(f"{one} - {other}")
    if gaps is not None:
      rows.append(_loses_less(one, other, found["shares"], gaps))
  return rows


def _loses_less(
    one: str, other: str, shares: list[float], gaps: list[dict[str, Any]]
) -> claims.Row:
  told = "; ".join(
      f"{share:.3g}: {intervals.text(gap)}"
      for share, gap in zip(shares, gaps, strict=True)
  )
  return claims.row(
      f"{other} loses less than {one} at equal bytes",
      "gaps whose intervals over texts are above 0 at every share",
      f"{told} nats",
      all(gap["low"] > 0 for gap in gaps),
  )


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws loss above the dense model's against bytes."""
  names = list(dict.fromkeys(row["way"] for row in summary["rows"]))
  looks = drawing.looks_of([*subjects.FACTORED, *subjects.CHOOSING])
  with figures.style():
    figure = figures.make_figure(figures.COLUMN_WIDTH, 3.0)
    axes = figure.subplots()
    for name in names:
      rows = [row for row in summary["rows"] if row["way"] == name]
      line = "-" if name in subjects.FACTORED else ":"
      if name in subjects.CHOOSING:
        line = (0, (5, 1.2))
      look = looks[name.partition(",")[0]]._replace(linestyle=line)
      values = drawing.points([row["loss above dense"] for row in rows])
      drawing.draw_points(
          axes, [row["bytes"] for row in rows], values, look, name
      )
    axes.axhline(0, color="0.5", linewidth=0.8)
    tuned = summary.get("loss of the tuned dense model above dense")
    if tuned:
      axes.axhline(tuned["mean"], color="0.5", linestyle=":", linewidth=0.8)
    axes.set(
        xlabel="share of the MLPs' weights that a token reads",
        ylabel="loss above the dense model's (nats)",
    )
    axes.set_yscale("symlog", linthresh=0.1)
    figures.put_legend_above(figure, figures.legend_entries(axes))
  return figure


STUDY = study_lib.Study(
    title="MLPs that read less: Monarch, low rank, Deja Vu",
    config=subjects.MonarchConfig(),
    smoke=dict(
        shares=(0.4, 0.7),
        blocks=2,
        num_layers=1,
        width=16,
        num_steps=2,
        seq_len=8,
        batch_size=2,
        num_tune=1,
        num_texts=2,
        num_capture=2,
        predictor_rank=1,
        predictor_steps=1,
    ),
    measure=study_lib.in_parts("monarch", measure),
    draw=draw,
    caption=(
        "Loss of held-out texts above that of the dense model, where MLPs read"
        " a share of their weights: mean over texts and its 95 % interval"
        " (Student's t). Tuned: trained on other text after the projection; the"
        " dotted grey line is the dense model, trained so too. Deja Vu's bytes"
        " are those of its predictor too; the oracle has none. The axis of"
        " losses is linear up to 0.1 nats and logarithmic from there."
    ),
    report_title="Attention systems",
)
