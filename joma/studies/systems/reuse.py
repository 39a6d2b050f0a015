"""What may layers take from others: choices of keys, queries and keys?

HyLRA (https://arxiv.org/abs/2602.00777): a plan, made of how much layers share
of what they like best, says which layers read everything and hand on what they
chose. It is compared with plans at random of as many full layers, and with
layers that all choose for themselves; overlaps are measured again under it.

EchoAtt (https://arxiv.org/abs/2409.14595): middle layers take queries and keys
of the one before, and the model is distilled in two stages. It is compared with
fine-tuning on the text by as many tokens.

Both of small language models, trained here on the embedded text, or, with
`--reuse.model=DIR`, of a checkpoint, which is one for all seeds.

The figure shows what plans, and the student after each stage, lose beside the
model itself.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from etils import epy

from joma.studies import study as study_lib
from joma.studies.systems.subjects import reuse_subject as subjects

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import once
  from joma.studies import parts
  from joma.systems.profiles import layer_overlap
  from joma.systems.profiles import layer_plan
  from joma.systems.reuse import distillation
  from joma.systems.reuse import echo_att
  from joma.systems.reuse import hylra
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

PLANS = ("dense", "plan", "random", "own")
STAGES = ("teacher", "before", "stage_1", "stage_2", "text_alone")
_TITLES = {
    "plan": "planned",
    "random": "random plans",
    "own": "own choices",
    "before": "student",
    "stage_1": "stage 1",
    "stage_2": "stage 2",
    "text_alone": "text alone",
}


def measure(
    config: subjects.ReuseConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Plans and distils models of several seeds.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "plans" and "stages": losses by name, mean over seeds and interval; "above":
    what each loses beside the model itself, seed by seed, likewise; "losses" of
    every seed;
    "full" layers of each seed's plan; "overlap" of the layers that take, as
    profiled and under the plan; "claims" and "finding".
  """
  part = part or parts.at_once
  runs = [
      part(f"seed {seed}", lambda seed=seed: _of_seed(config, seed))
      for seed in range(config.first_seed, config.first_seed + config.num_seeds)
  ]
  of_seeds = lambda key, name: np.array([run[key][name] for run in runs])
  collect = lambda key, names: {
      name: intervals.interval(of_seeds(key, name)) for name in names
  }
  # Seeds differ in their texts, which is not what is asked.
  above = lambda key, names: {
      name: intervals.interval(of_seeds(key, name) - of_seeds(key, names[0]))
      for name in names[1:]
  }
  found = {
      "plans": collect("plans", PLANS),
      "stages": collect("stages", STAGES),
      "above": above("plans", PLANS) | above("stages", STAGES),
      "losses": {
          name: of_seeds(key, name).tolist()
          for key, names in (("plans", PLANS), ("stages", STAGES))
          for name in names
      },
      "overlap": collect("overlap", ("profiled", "under the plan", "random")),
      "full": [run["full"] for run in runs],
      "num_layers": runs[0]["num_layers"],
  }
  rows = _claims(found)
  return {**found, "claims": rows, "finding": claims.finding(rows)}


def _of_seed(config: subjects.ReuseConfig, seed: int) -> dict[str, Any]:
  subject = subjects.Subject(config, seed)
  return {
      "num_layers": subject.model.config.num_layers,
      **_planned(subject),
      "stages": _distilled(subject),
  }


def _planned(subject: subjects.Subject) -> dict[str, Any]:
  config, params = subject.config, subject.params
  profile = layer_overlap.measure(
      subject.model,
      params,
      subject.test[:, :-1],
      config.block,
      config.num_blocks,
      config.num_first,
  )
  overlap = np.asarray(profile.overlap, np.float64)
  plan = layer_plan.widest(overlap, config.num_full)
  drawn = _others(subject, plan.full)
  run = lambda full, **options: subject.loss(
      subject.over(_entry(config, full, **options)), params
  )
  own = _entry(config, plan.full, reuse=False)
  return {
      "full": list(plan.full),
      "plans": {
          "dense": subject.loss(subject.model, params),
          "plan": run(plan.full),
          "random": float(np.mean([run(full) for full in drawn])),
          "own": subject.loss(subject.over(own), params),
      },
      "overlap": {
          "profiled": _mean(overlap, plan.full),
          "under the plan": _again(subject, plan.full),
          "random": float(np.mean([_mean(overlap, full) for full in drawn])),
      },
  }


def _entry(
    config: subjects.ReuseConfig, full: tuple[int, ...], reuse: bool = True
) -> str:
  system = hylra.Hylra(
      full=".".join(map(str, full)),
      k=config.block * config.num_blocks,
      block=config.block,
      reuse=reuse,
  )
  options = dataclasses.asdict(system).items()
  return ":".join([system.name, *(f"{k}={v}" for k, v in options)])


def _others(
    subject: subjects.Subject, plan: tuple[int, ...]
) -> list[tuple[int, ...]]:
  """Different plans at random of as many full layers as are asked for."""
  config, num_layers = subject.config, subject.model.config.num_layers
  rng = np.random.default_rng((subject.seed, 3))
  found: dict[tuple[int, ...], None] = {}
  for _ in range(20 * config.num_random):  # There may be few.
    upper = 1 + rng.permutation(num_layers - 1)[: config.num_full - 1]
    drawn = (0, *sorted(upper.tolist()))
    if drawn != plan and len(found) < config.num_random:
      found[drawn] = None
  return list(found)


def _mean(overlap: np.ndarray, full: tuple[int, ...]) -> float:
  """Mean overlap of the layers that take; 1 where none does."""
  last, shared = 0, []
  for layer in range(len(overlap)):
    last = layer if layer in full else last
    shared += [] if layer in full else [overlap[last, layer]]
  return float(np.mean(shared)) if shared else 1.0


def _again(subject: subjects.Subject, full: tuple[int, ...]) -> float:
  """Mean overlap of the layers that take, under the plan; 1 where none does."""
  model = subject.over(_entry(subject.config, full))
  run = once.jit(functools.partial(model.apply, mutable="intermediates"))
  seen = run({"params": subject.params}, subject.test[:, :-1])[1]
  key, first = f"{hylra.Hylra.name}_overlap", subject.config.num_first
  found = [
      float(layer["attn"][key][0][:, first:].mean())
      for name, layer in seen["intermediates"].items()
      if name.startswith("layers_") and key in layer["attn"]
  ]
  return float(np.mean(found)) if found else 1.0


def _distilled(subject: subjects.Subject) -> dict[str, float]:
  config, teacher = subject.config, (subject.model, subject.params)
  model = subject.over(echo_att.EchoAtt.name)
  start = distillation.student_of(model, subject.params)
  num, rate = config.num_distil, config.rate / 3
  train = functools.partial(distillation.train, model, lr=rate)
  stage_1, _ = train(start, subject.texts(num, 4), teacher=teacher)
  stage_2, _ = train(stage_1, subject.texts(num, 5))
  alone, _ = train(start, subject.texts(2 * num, 4))
  students = (start, stage_1, stage_2, alone)
  found = {"teacher": subject.loss(*teacher)}
  for name, params in zip(STAGES[1:], students, strict=True):
    found[name] = subject.loss(model, params)
  return found


def _claims(found: dict[str, Any]) -> list[claims.Row]:
  overlap, losses = found["overlap"], found["losses"]
  text = lambda x: intervals.text(x, 3)
  gap = lambda one, other: intervals.interval(
      np.subtract(losses[other], losses[one])
  )
  below = lambda claim, one, other: claims.row(
      f"{claim} is below that of {_TITLES[other]}",
      "a gap whose interval over seeds is above 0",
      f"{text(gap(one, other))} nats",
      gap(one, other)["low"] > 0,
  )
  own = gap("own", "plan")
  return [
      below("HyLRA: loss of the plan", "plan", "random"),
      claims.row(
          "HyLRA: what layers share under the plan",
          f"as profiled, {text(overlap['profiled'])}, or .1 less",
          text(overlap["under the plan"]),
          overlap["under the plan"]["mean"]
          >= overlap["profiled"]["mean"] - 0.1,
      ),
      claims.row(
          "HyLRA: the plan loses little beside own choices of as many layers",
          "at most .05 nats",
          f"{text(own)} nats",
          own["mean"] <= 0.05,
      ),
      below("EchoAtt: loss after stage 1", "stage_1", "before"),
      below("EchoAtt: loss after stage 2", "stage_2", "stage_1"),
      below("EchoAtt: loss by equal tokens", "stage_2", "text_alone"),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws what plans and stages lose beside the model itself."""
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.4)
    panels = figure.subplots(1, 2).tolist()
    sides = ((PLANS, "HyLRA"), (STAGES, "EchoAtt"))
    for axes, (names, title) in zip(panels, sides, strict=True):
      names = names[1:]
      rows = [summary["above"][name] for name in names]
      look = drawing.WITH._replace(linestyle="")
      x = np.arange(len(names), dtype=float)
      drawing.draw_points(axes, x, drawing.points(rows), look, "")
      axes.axhline(0, color="0.5", linewidth=0.8)
      axes.set(title=title, ylabel="loss above the model's (nats)")
      labels = [_TITLES[name] for name in names]
      axes.set_xticks(x, labels, rotation=30, ha="right")
  return figure


STUDY = study_lib.Study(
    title="What layers take from layers",
    config=subjects.ReuseConfig(),
    smoke=dict(
        num_seeds=2,
        num_layers=4,
        width=16,
        num_steps=2,
        seq_len=24,
        batch_size=2,
        block=4,
        num_blocks=2,
        num_random=1,
        num_distil=1,
    ),
    measure=study_lib.in_parts("reuse", measure),
    draw=draw,
    caption=(
        "Loss of held-out text above that of the model itself, seed by seed:"
        " mean and 95 % interval (Student's t). Left, a few layers read"
        " everything and others what these chose; right, layers that share"
        " attention, distilled."
    ),
    report_title="Attention systems",
)
