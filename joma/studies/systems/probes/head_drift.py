"""Do heads that drift in a conflict say which layers to update?

Texts have an instruction of a system and, in half of them, another one of a
user. A head's drift is how far the asking token's attention to the two spans
moves by the conflict (`systems.probes.drift`, after SAIL's localizing step).

First a head that looks at instructions is planted in a model that was drawn, a
place and a model a seed: it is to rank first. Then models are trained to obey
the user. Each is updated for a few steps to obey the system, one layer alone,
`update_layers` of the optimizer: the layer of the head that drifts most, and
each of the others, as layers drawn at random would be.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  import jaxtyping
  from matplotlib import figure as mpl_figure
  from matplotlib import ticker as mpl_ticker
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import once
  from joma.studies import parts
  from joma.studies import texts
  from joma.studies import training
  from joma.studies.systems.subjects import instructions
  from joma.systems.probes import drift
  from joma.transformer import config as configs
  from joma.transformer import probes
  from joma.transformer.training import lm_config
  from joma.transformer.training import optimizer as optimizer_lib
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

_ALL = "all layers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriftConfig:
  """Do heads that drift in a conflict say which layers to update?

  Attributes:
    num_planted: Models that a head is planted in.
    num_seeds: Models that are trained.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of each run.
    batch_size: Texts of a step.
    num_values: What an instruction may say.
    span: Words of each role.
    num_layers: Layers of the model.
    num_heads: Heads of a layer.
    width: Width of the residual stream.
    rate: Highest learning rate.
    num_update: Steps of an update.
    update_rate: Learning rate of the update.
    num_test: Texts that drift and answers are measured on.
  """

  num_planted: int = 10
  num_seeds: int = 3
  first_seed: int = 0
  num_steps: int = 400
  num_records: int = 10
  batch_size: int = 64
  num_values: int = 16
  span: int = 4
  num_layers: int = 4
  num_heads: int = 4
  width: int = 64
  rate: float = 3e-3
  num_update: int = 40
  update_rate: float = 1e-3
  num_test: int = 256

  def __post_init__(self):
    settings_lib.check_trained(
        self, "num_planted", "span", "num_update", "num_test"
    )
    for name in ("batch_size", "num_values", "num_layers"):
      require.at_least(name, getattr(self, name), 2)
    require.at_least("num_heads", self.num_heads, 1)
    settings_lib.require_multiple("width", self.width, 2 * self.num_heads)
    require.positive("update_rate", self.update_rate)


def learner(config: DriftConfig, obeys: int = 1) -> texts.Learner:
  """The model, and texts whose answers follow one of the roles."""
  task = instructions.Instructions(
      num_values=config.num_values, span=config.span, obeys=obeys
  )
  model = configs.TransformerConfig(
      vocab_size=task.vocab_size,
      num_layers=config.num_layers,
      embed_dim=config.width,
      num_heads=config.num_heads,
      num_kv_heads=config.num_heads,
      head_dim=config.width // config.num_heads,
      hidden_dim=2 * config.width,
      max_len=task.length,
      positions="learned",
      tie_embeddings=False,
  )
  return texts.Learner(model=model, task=task, batch_size=config.batch_size)


def measure(
    config: DriftConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Plants heads, trains models, and updates a layer of them at a time.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "planted": of each seed the "rank" of the head, from 1, its "ratio" to the
    largest drift of the others, and its rank "before" it was planted.
    "updated": of each model the "drift" of its heads, "focal" layer, and
    answers that are the system's in a conflict, "before", after an update of
    each layer ("layers"), and of "all"; "is_kept", whether other layers stay
    to the bit.
    "claims" and "finding".
  """
  part = part or parts.at_once
  planted = part("planted", lambda: _planted(config))
  updated = part("updated", lambda: _updated(config))
  told = _claims(planted, updated)
  return {
      "planted": planted,
      "updated": updated,
      "claims": told,
      "finding": claims.finding(told),
  }


def _drift(config: DriftConfig) -> Any:
  """Parameters to the drift of every head."""
  one = learner(config)
  task: Any = one.task
  drawn = task.pairs(jax.random.key(10**6), config.num_test)
  at = jnp.full(config.num_test, task.length - 1)

  def maps(params: jaxtyping.PyTree, tokens: jax.Array) -> list[jax.Array]:
    _, seen = one.transformer.apply(
        {"params": params}, tokens, mutable="intermediates"
    )
    return [
        probes.weights_of(seen, layer, one.model, tokens.shape)
        for layer in range(config.num_layers)
    ]

  return once.jit(
      lambda params: drift.scores(
          maps(params, drawn.without),
          maps(params, drawn.conflict),
          drawn.roles,
          at,
          instructions.NUM_ROLES,
      )
  )


def _planted(config: DriftConfig) -> dict[str, Any]:
  one, scores = learner(config), _drift(config)
  task: Any = one.task
  init = once.jit(one.init)
  found: dict[str, list[float]] = {"rank": [], "ratio": [], "before": []}
  first = config.first_seed
  for seed in range(first, first + config.num_planted):
    keys = jax.random.split(jax.random.key(seed), 2)
    draw = np.random.default_rng(seed)
    layer, head = (
        int(draw.integers(n)) for n in (config.num_layers, config.num_heads)
    )
    params = init(keys[0])
    before = drift.ranked(np.asarray(scores(params)))
    found["before"].append(before.index((layer, head)) + 1)
    params = instructions.plant(params, one.model, task, layer, head, keys[1])
    values = np.array(scores(params))
    found["rank"].append(drift.ranked(values).index((layer, head)) + 1)
    own, values[layer, head] = values[layer, head], 0
    found["ratio"].append(float(own / values.max()))
  return {**found, "num_heads": config.num_layers * config.num_heads}


def _updated(config: DriftConfig) -> dict[str, Any]:
  trained = training.train(
      learner(config, instructions.USER),
      settings_lib.seeds(config),
      schedule=training.Schedule(
          num_steps=config.num_steps, num_records=config.num_records
      ),
      rate=config.rate,
  )
  start = jax.device_put(trained.params)
  of_run = lambda run: jax.tree.map(lambda leaf: leaf[run], start)
  scores, obeyed = _drift(config), _obeyed(config)
  runs = range(config.num_seeds)
  heads = [np.asarray(scores(of_run(run))) for run in runs]
  places = [drift.ranked(x)[0] for x in heads]
  answers: dict[str, Any] = {"before": obeyed(start), "layers": []}
  is_kept = True
  for layer in range(config.num_layers):
    after = _update(config, start, (layer,))
    answers["layers"].append(obeyed(after))
    is_kept &= _is_kept(start, after, layer)
  answers["all"] = obeyed(_update(config, start, ()))
  return {
      **answers,
      "layers": np.array(answers["layers"]).T,
      "drift": np.array(heads),
      "focal": [layer for layer, _ in places],
      "is_kept": bool(is_kept),
      "steps": trained.steps,
      "curves": trained.curves(),
  }


def _obeyed(config: DriftConfig) -> Any:
  """Parameters of runs to the share of conflicts that the system wins."""
  one = learner(config)
  task: Any = one.task
  drawn = task.pairs(jax.random.key(10**6 + 1), config.num_test)

  def run(params: jaxtyping.PyTree) -> jax.Array:
    logits: Any = one.transformer.apply({"params": params}, drawn.conflict)
    return (logits[:, -1].argmax(axis=-1) == drawn.system).mean()

  share = once.jit(lambda params: jax.lax.map(run, params))
  return lambda params: np.asarray(share(params))


def _update(
    config: DriftConfig, start: jaxtyping.PyTree, layers: tuple[int, ...]
) -> jaxtyping.PyTree:
  """Trains all runs to obey the system, some layers of them alone."""
  one = learner(config, instructions.SYSTEM)
  settings = lm_config.LmConfig(
      model=one.model,
      lr=config.update_rate,
      num_steps=config.num_update,
      warmup_steps=0,
      schedule="constant",
      update_layers=layers,
      map_steps=(),
      seq_len=one.model.max_len,
  )
  rule = optimizer_lib.make_optimizer(settings, config.num_update, 1)
  grad = jax.grad(lambda params, key: one.loss(params, key)[0])

  def step(state: Any, number: jax.Array) -> tuple[Any, None]:
    params, moments = state
    # The same texts for all runs and layers.
    grads = grad(params, jax.random.fold_in(jax.random.key(10**6 + 2), number))
    return rule.update(grads, moments, params, number), None

  def run(params: jaxtyping.PyTree) -> jaxtyping.PyTree:
    state = (params, rule.init(params))
    return jax.lax.scan(step, state, jnp.arange(config.num_update))[0][0]

  updated = jax.jit(lambda start: jax.lax.map(run, start))(start)
  leaves = jax.tree.leaves(updated)
  require.bounded("update_rate", config.update_rate, leaves)
  return updated


def _is_kept(
    start: jaxtyping.PyTree, after: jaxtyping.PyTree, layer: int
) -> bool:
  """Whether all but one layer are the same to the bit, and that one is not."""
  name = f"layers_{layer}"
  is_same = lambda one, two: all(
      np.array_equal(x, y)
      for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
  )
  rest = lambda tree: {key: tree[key] for key in tree if key != name}
  return is_same(rest(start), rest(after)) and not is_same(
      start[name], after[name]
  )


def _claims(
    planted: dict[str, Any], updated: dict[str, Any]
) -> list[claims.Row]:
  rank, ratio = planted["rank"], planted["ratio"]
  layers, focal = np.array(updated["layers"]), np.array(updated["focal"])
  rows = np.arange(len(layers))
  chosen = layers[rows, focal]
  others = (layers.sum(axis=1) - chosen) / (layers.shape[1] - 1)
  gain = intervals.interval(chosen - others)
  of = lambda x: intervals.text(intervals.interval(np.array(x)))
  return [
      claims.row(
          "a planted head drifts most of all heads",
          f"rank 1 from {len(rank)} of {len(rank)} seeds",
          f"from {rank.count(1)}; {min(ratio):.1f} times the next or more, rank"
          f" {np.mean(planted['before']):.1f} of {planted['num_heads']} before"
          " it was planted",
          rank.count(1) == len(rank),
      ),
      claims.row(
          "an update of one layer leaves all others to the last bit",
          "every layer, every seed",
          "all" if updated["is_kept"] else "not all",
          updated["is_kept"],
      ),
      claims.row(
          "an update of the layer that drifts most brings more answers back to"
          " the system than one of another layer",
          "a difference above 0, interval too",
          f"{intervals.text(gain)}: {of(chosen)} (layers"
          f" {', '.join(map(str, focal))}) against {of(others)}; before"
          f" {of(updated['before'])}, all layers {of(updated['all'])}",
          gain["low"] > 0,
      ),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the drift of heads, and answers after updates of each layer."""
  updated = summary["updated"]
  heads, layers = np.asarray(updated["drift"]), np.asarray(updated["layers"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.4)
    left, right = figure.subplots(1, 2)
    looks = drawing.looks(len(heads))
    places = np.arange(layers.shape[1])
    for run, look in enumerate(looks):
      left.plot(places, heads[run].max(axis=1), **look._asdict())
      right.plot(places, layers[run], **look._asdict(), label=f"model {run}")
      focal = updated["focal"][run]
      right.plot(
          focal, layers[run, focal], "o", color=look.color, ms=9, mfc="none"
      )
    right.axhline(np.mean(updated["all"]), color="black", linestyle=":")
    left.set(xlabel="layer", ylabel="largest drift of a head")
    for axes in (left, right):
      axes.xaxis.set_major_locator(mpl_ticker.MaxNLocator(integer=True))
    right.set(
        xlabel="layer that is updated", ylabel="share of the system's answers"
    )
    right.set_ylim(-0.03, 1.03)
    figures.put_legend_above(figure, figures.legend_entries(right))
  return figure


STUDY = study_lib.Study(
    title="Drift: which layers to update where instructions conflict",
    config=DriftConfig(),
    smoke=dict(
        num_planted=2,
        batch_size=2,
        num_values=4,
        span=2,
        num_layers=2,
        num_heads=2,
        width=8,
        num_update=2,
        num_test=4,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("drift", measure),
    draw=draw,
    caption=(
        "Left: Jensen-Shannon divergence of a head's attention to the system's"
        " and the user's span without and with a conflict, the largest of each"
        " layer. Right: conflicts that are answered as the system says after"
        " an update of one layer; ringed the layer of the head that drifts"
        " most, dotted all layers at once."
    ),
    report_title="Attention systems",
)
