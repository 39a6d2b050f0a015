"""Numbers of language-model runs: of one, of several seeds, of the authors.

Everything is plain JSON types, with null where nothing was measured. What the
figures of `drawing` show is what is here.

Letters: R runs (seeds), E rows of metrics, L layers.
"""

from collections.abc import Mapping, Sequence
import csv
import math
import pathlib
from typing import Any

import numpy as np

from scansnap_jax.experiment import json_file
from scansnap_jax.experiment.errors import UserError

# Per layer, as `training.train` names them: NAME/layer_0 and so on.
PROBES = (
    "entropy",
    "chunk_entropy",
    "sink_rate",
    "effective_support",
    "stable_rank",
)

_LOSSES = ("train_loss", "valid_loss")
# Settings in which the runs of a group agree.
_SHARED = ("preset", "corpus", "optimizer", "num_layers", "lr", "seq_len")


def summarize_run(
    rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> dict[str, Any]:
  """Collects the curves of a run out of its metrics.

  Args:
    rows: Of metrics.jsonl, as `metric_stream.read_rows` gives them: `step` and,
      where measured, `train_loss`, `valid_loss`, `tokens_per_sec` and
      `entropy/layer_0` and its like.
    about: What the run was: `preset`, `corpus`, `optimizer`, `num_layers`,
      `lr`, `seq_len`, `seed` and whatever else is worth a record.

  Returns:
    `about` with `steps`, a list [E] a loss, and a list [L][E] a probe.
  """
  column = lambda name: [row.get(name) for row in rows]
  layers = range(about["num_layers"])
  return {
      **about,
      "steps": [row["step"] for row in rows],
      "tokens_per_sec": column("tokens_per_sec"),
      **{name: column(name) for name in _LOSSES},
      **{
          name: [column(f"{name}/layer_{layer}") for layer in layers]
          for name in PROBES
      },
  }


def group_runs(
    runs: Sequence[Mapping[str, Any]],
    reference: Mapping[tuple[int, float], Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
  """Puts runs together that differ in their seed alone.

  Args:
    runs: Summaries of runs.
    reference: The authors' curves by number of layers and rate.

  Returns:
    One summary a group, by layers, then rate: mean and sample standard
    deviation over seeds of every curve at the steps that all runs have, the
    extremes of the mean, and the authors' numbers where they are known.

  Raises:
    UserError: A seed occurs twice in a group, or its runs share no step.
  """
  members: dict[tuple, list[Mapping[str, Any]]] = {}
  for run in runs:
    members.setdefault(tuple(run[name] for name in _SHARED), []).append(run)
  groups = [_group(group) for group in members.values()]
  for group in groups:
    group["authors"] = _authors(group, reference or {})
  return sorted(groups, key=lambda group: (group["num_layers"], group["lr"]))


def _group(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  seeds = [run["seed"] for run in runs]
  if len(set(seeds)) < len(seeds):
    raise UserError(f"Runs of the same settings have seeds {sorted(seeds)}.")
  steps = sorted(set.intersection(*(set(run["steps"]) for run in runs)))
  if not steps:
    raise UserError(f"Runs with seeds {sorted(seeds)} share no step.")
  places = [[run["steps"].index(step) for step in steps] for run in runs]
  curves = {
      name: np.array([
          np.array(run[name], float)[..., place]
          for run, place in zip(runs, places, strict=True)
      ])
      for name in (*_LOSSES, *PROBES)
  }
  return {
      **{name: runs[0][name] for name in _SHARED},
      "seeds": sorted(seeds),
      "steps": steps,
      "tokens_per_sec": _speed(runs),
      # Mean over queries of the logarithm of the keys that they see.
      "uniform_entropy": (
          math.lgamma(runs[0]["seq_len"] + 1) / runs[0]["seq_len"]
      ),
      **{name: _spread(values) for name, values in curves.items()},
      "final_entropy": _spread(_over_layers(curves["entropy"][..., -1])),
      **_extremes(
          steps,
          curves["valid_loss"].mean(axis=0),
          curves["entropy"].mean(axis=0),
      ),
  }


def _over_layers(values: np.ndarray) -> np.ndarray:
  """Mean [R] of values [R, L] over layers; NaN are those without weights."""
  has = np.isfinite(values).any(axis=0)
  return values[:, has].mean(axis=1) if has.any() else values.mean(axis=1)


def _speed(runs: Sequence[Mapping[str, Any]]) -> float | None:
  """Median over the rows of all runs that measured it."""
  rows = [speed for run in runs for speed in run["tokens_per_sec"]]
  known = [speed for speed in rows if speed is not None]
  return float(np.median(known)) if known else None


def _extremes(
    steps: Sequence[int], valid_loss: np.ndarray, entropy: np.ndarray
) -> dict[str, Any]:
  """Best validation loss [E], and where each layer's entropy [L, E] turns."""
  found: dict[str, Any] = {"best_valid_loss": None}
  if np.isfinite(valid_loss).any():
    best = int(np.nanargmin(valid_loss))
    found["best_valid_loss"] = {
        "value": float(valid_loss[best]),
        "step": int(steps[best]),
    }
  found["layers"] = []
  for layer, curve in enumerate(entropy):
    known = np.flatnonzero(np.isfinite(curve))
    if len(known):
      least = int(np.nanargmin(curve))
      start, low, end = (float(curve[i]) for i in (known[0], least, known[-1]))
      found["layers"].append({
          "layer": layer,
          "start": start,
          "min": low,
          "min_step": int(steps[least]),
          "end": end,
          "rebound": end - low,
      })
  return found


def _authors(
    group: Mapping[str, Any],
    reference: Mapping[tuple[int, float], Mapping[str, Any]],
) -> dict[str, Any] | None:
  """The authors' numbers for a group, as far as it goes, and the distance."""
  for (num_layers, lr), found in reference.items():
    if num_layers == group["num_layers"] and np.isclose(lr, group["lr"]):
      found = _until(found, group["steps"][-1])
      if found["steps"]:
        return {**found, "differences": _differences(group, found)}
  return None


def _until(found: Mapping[str, Any], last_step: int) -> dict[str, Any]:
  """Leaves out what comes after a step."""
  steps = [step for step in found["steps"] if step <= last_step]
  cut = {
      name: {
          kind: np.array(values, float)[..., : len(steps)]
          for kind, values in found[name].items()
      }
      for name in ("valid_loss", "entropy")
  }
  return {
      "num_seeds": found["num_seeds"],
      "steps": steps,
      **{
          name: {kind: _to_json(values) for kind, values in spread.items()}
          for name, spread in cut.items()
      },
      **_extremes(steps, cut["valid_loss"]["mean"], cut["entropy"]["mean"]),
  }


def _differences(
    group: Mapping[str, Any], authors: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """Ours minus theirs at each step that both have."""
  rows = []
  for i, step in enumerate(group["steps"]):
    if step not in authors["steps"]:
      continue
    j = authors["steps"].index(step)
    gap = lambda ours, theirs, i=i, j=j: (
        None if None in (ours[i], theirs[j]) else ours[i] - theirs[j]
    )
    rows.append({
        "step": step,
        "valid_loss": gap(
            group["valid_loss"]["mean"], authors["valid_loss"]["mean"]
        ),
        **{
            name: [
                gap(ours, theirs)
                for ours, theirs in zip(
                    group[name]["mean"], authors["entropy"]["mean"], strict=True
                )
            ]
            for name in ("entropy", "chunk_entropy")
        },
    })
  return rows


def read_reference(
    path: pathlib.Path,
) -> dict[tuple[int, float], dict[str, Any]]:
  """Reads the authors' curves.

  Args:
    path: A CSV with a row a run and minibatch: columns `nlayers`, `lr`, `seed`,
      `minibatch`, `val_loss` and `attn_entropy_layer0` to the last, empty for
      layers that a run lacks.

  Returns:
    By number of layers and rate: `num_seeds`, `steps`, mean and spread over
    seeds of `valid_loss` and `entropy`, and their extremes.

  Raises:
    UserError: The file is not there, or is another table.
  """
  lines = json_file.read_text(path).splitlines()
  try:
    rows = list(csv.DictReader(lines))
    table: dict[tuple[int, float], dict[int, dict[int, list[float]]]] = {}
    for row in rows:
      key = int(row["nlayers"]), float(row["lr"])
      if key[0] > len(row):
        raise KeyError(f"attn_entropy_layer{key[0] - 1}")
      names = ["val_loss"]
      names += [f"attn_entropy_layer{layer}" for layer in range(key[0])]
      seeds = table.setdefault(key, {})
      curve = seeds.setdefault(int(row["seed"]), {})
      curve[int(row["minibatch"])] = [float(row[name]) for name in names]
  except (KeyError, ValueError, TypeError, csv.Error) as error:
    raise UserError(
        f"{path} is no table of nlayers, lr, seed, minibatch, val_loss,"
        f" attn_entropy_layer0, ...: {type(error).__name__}: {error}."
    ) from error
  return {key: _reference(seeds) for key, seeds in sorted(table.items())}


def _reference(
    seeds: Mapping[int, Mapping[int, list[float]]],
) -> dict[str, Any]:
  steps = sorted(set.intersection(*map(set, seeds.values())))
  curves = np.array(
      [[curve[step] for step in steps] for curve in seeds.values()]
  )
  valid_loss = curves[..., 0]
  entropy = np.moveaxis(curves[..., 1:], -1, 1)
  return {
      "num_seeds": len(seeds),
      "steps": steps,
      "valid_loss": _spread(valid_loss),
      "entropy": _spread(entropy),
      **_extremes(steps, valid_loss.mean(axis=0), entropy.mean(axis=0)),
  }


def summarize_maps(
    maps: np.ndarray, steps: Sequence[int]
) -> list[dict[str, Any]]:
  """Says in numbers what attention maps show.

  Args:
    maps: Attention weights [M, L, N, T, T], rows of queries.
    steps: When each of the M was taken.

  Returns:
    For each step, layer and head the means over queries of the entropy in nats,
    of the largest weight, and of the weight of the first key; None of a layer
    that has no weights.
  """
  plogp = maps * np.log(np.where(maps == 0, 1, maps))  # NaN stays.
  numbers = {
      "entropy": -plogp.sum(axis=-1).mean(axis=-1),
      "largest_weight": maps.max(axis=-1).mean(axis=-1),
      "first_key": maps[..., 0].mean(axis=-1),
  }
  return [
      {
          "step": int(step),
          "layer": layer,
          "head": head,
          **{
              name: _to_json(np.float64(value[i, layer, head]))
              for name, value in numbers.items()
          },
      }
      for i, step in enumerate(steps)
      for layer in range(maps.shape[1])
      for head in range(maps.shape[2])
  ]


def _spread(values: np.ndarray) -> dict[str, Any]:
  """Mean and sample standard deviation over the first axis."""
  std = np.full(values.shape[1:], np.nan)
  if len(values) > 1:
    std = values.std(axis=0, ddof=1)
  return {"mean": _to_json(values.mean(axis=0)), "std": _to_json(std)}


def _to_json(values: np.ndarray | np.number) -> Any:
  """Nested lists or a number, with None for what is not finite."""
  found = np.array(values, object)
  found[~np.isfinite(values)] = None
  return found.tolist()
