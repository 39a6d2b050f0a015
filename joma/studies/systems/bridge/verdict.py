"""What the rungs say together: claims, changes from rung to rung, the verdict.

Letters: R records, S seeds.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from matplotlib import figure as mpl_figure
import numpy as np

from joma.studies import claims
from joma.studies import drawing
from joma.studies.systems.bridge import rungs
from scansnap_jax.experiment import figures
from scansnap_jax.experiment import intervals

# Shown of all predictors; the summary holds every one.
_SHOWN = (
    "settled velocity",
    "flow",
    "frequency",
    "velocity",
    "minus frequency",
)
# What an optimizer's own form of the velocity is.
_OWN = {"adam": "velocity over size", "sign": "sign of velocity"}
FIRST, LAST = 0, -1
# What the verdict follows down the ladder.
_FOLLOWED = (
    ("settled velocity", FIRST, "first"),
    ("velocity", FIRST, "first"),
    ("flow", LAST, "last"),
)

Rows = Mapping[str, Mapping[str, Any]]


def conclude(rows: Rows) -> dict[str, Any]:
  """Compares predictors on each rung, and rungs with those that they change.

  Args:
    rows: By rung, in order, as `bridge_ladder.measure` has them.

  Returns:
    "table", a row a rung; "claims"; and "verdict", a paragraph.
  """
  used = [rung for rung in rungs.RUNGS if rung.name in rows]
  return {
      "table": [_row(rows, rung) for rung in used],
      "claims": [row for rung in used for row in _claims_of(rows, rung)],
      "verdict": _verdict(rows, used),
  }


def at(rows: Rows, rung: str, name: str, record: int) -> Float[np.ndarray, "S"]:
  """Recalls of a predictor on a rung, one a seed."""
  return np.asarray(rows[rung]["recall"][name])[:, record]


def change(
    rows: Rows, rung: rungs.Rung, name: str, record: int
) -> dict[str, float]:
  """What a rung changes in the recall of a predictor, seed by seed."""
  here, before = (
      at(rows, each, name, record) for each in (rung.name, rung.after)
  )
  return intervals.interval(here - before)


def _over_frequency(
    rows: Rows, rung: str, name: str, record: int
) -> dict[str, float]:
  gain = at(rows, rung, name, record) - at(rows, rung, "frequency", record)
  return intervals.interval(gain)


def _row(rows: Rows, rung: rungs.Rung) -> dict[str, Any]:
  row: dict[str, Any] = {"rung": rung.name, "after": rung.after or "–"}
  row["loss"] = float(np.mean(np.asarray(rows[rung.name]["loss"])[:, LAST]))
  for name in (*_SHOWN, "type"):
    for record, when in ((FIRST, "first"), (LAST, "last")):
      values = at(rows, rung.name, name, record)
      row[f"{name}, {when}"] = intervals.interval(values, least=0, most=1)
  for record, when in ((FIRST, "first"), (LAST, "last")):
    values = np.asarray(rows[rung.name]["partial"])[:, record]
    row[f"partial, {when}"] = intervals.interval(values, least=-1, most=1)
  if rung.after in rows:
    for name, record, when in _FOLLOWED:
      row[f"change of {name}, {when}"] = change(rows, rung, name, record)
  return row


def _claims_of(rows: Rows, rung: rungs.Rung) -> list[claims.Row]:
  found = []
  for name, record, when in (
      ("velocity", FIRST, "at the first record"),
      ("flow", LAST, "at the last"),
  ):
    if rung.is_decoder_first and record == FIRST:
      continue  # Attention is held still by then.
    gain = _over_frequency(rows, rung.name, name, record)
    found.append(
        claims.row(
            f"{rung.name}: the {name} names more heavy hitters than frequency"
            f" {when}",
            "a difference above 0, seed by seed",
            intervals.text(gain),
            gain["low"] > 0,
        )
    )
  if rung.optimizer in _OWN:
    own = _OWN[rung.optimizer]
    gain = intervals.interval(
        at(rows, rung.name, own, FIRST) - at(rows, rung.name, "velocity", FIRST)
    )
    found.append(
        claims.row(
            f"{rung.name}: the {own} names more than the velocity",
            "a difference above 0 at the first record, seed by seed",
            intervals.text(gain),
            gain["low"] > 0,
        )
    )
  if rung.is_decoder_first:
    gain = intervals.interval(
        at(rows, rung.name, "settled velocity", LAST)
        - at(rows, rung.name, "frequency", LAST)
    )
    found.append(
        claims.row(
            f"{rung.name}: the settled velocity names more than frequency",
            "a difference above 0 at the last record, seed by seed",
            intervals.text(gain),
            gain["low"] > 0,
        )
    )
  return found


def _verdict(rows: Rows, used: list[rungs.Rung]) -> str:
  """Names the rungs of the ladder that cost the prediction most."""
  told = []
  for name, record, when in _FOLLOWED:
    falls = {
        rung: change(rows, rung, name, record)
        for rung in used
        if rung in rungs.LADDER[1:]
    }
    worst = min(falls, key=lambda rung: falls[rung]["mean"])
    before, here = (
        at(rows, each, name, record).mean()
        for each in (worst.after, worst.name)
    )
    told.append(
        f"Down the ladder the recall of the {name} at the {when} record falls"
        f" most from {worst.after} to {worst.name}: from {before:.3f} to"
        f" {here:.3f}, by seed {intervals.text(falls[worst])}."
    )
  return " ".join(told)


def draw(summary: Mapping[str, Any]) -> mpl_figure.Figure:
  """Draws recalls by rung: the first record left, the last right."""
  rows, names = summary["rows"], list(summary["rows"])
  places = np.arange(len(names), dtype=float)
  looks = drawing.looks_of(_SHOWN)
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 1.4 + 0.34 * len(names))
    both = figure.subplots(1, 2, sharey=True)
    for axes, record in zip(both, (FIRST, LAST), strict=True):
      shifts = drawing.shifts(len(looks))
      for shift, (name, look) in zip(shifts, looks.items(), strict=True):
        found = drawing.points([
            intervals.interval(at(rows, rung, name, record), least=0, most=1)
            for rung in names
        ])
        mean = found[0]
        spread = np.stack([mean - found[1], found[2] - mean])
        mark = look._replace(linestyle="")
        axes.errorbar(
            mean,
            places + shift,
            xerr=spread,
            **mark._asdict(),
            label=name,
            elinewidth=0.7,
            markersize=3,
            capsize=0,
        )
      axes.axvline(summary["chance"], color="black", ls=":", lw=0.8)
      axes.set(xlim=(0, 1), xlabel="recall of the heavy hitters")
      axes.set_title(f"step {summary['steps'][record]}")
    both[0].set_yticks(places, names)
    both[0].set_ylim(len(names) - 0.5, -0.5)
    figures.put_legend_above(figure, figures.legend_entries(both[0]))
  return figure
