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

The figure shows losses of plans, and of the student after each stage.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.systems.profiles import layer_overlap
  from joma.systems.profiles import layer_plan
  from joma.systems.reuse import distillation
  from joma.systems.reuse import echo_att
  from joma.systems.reuse import hylra
  from joma.transformer import config as configs
  from joma.transformer import model as models
  from joma.transformer.hf import pretrained
  from joma.transformer.text import corpus as corpus_lib
  from joma.transformer.training import lm_step
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

PLANS = ("dense", "plan", "random", "own")
STAGES = ("teacher", "before", "stage_1", "stage_2", "text_alone")
_TITLES = {
    "dense": "all read all",
    "plan": "planned",
    "random": "random plans",
    "own": "own choices",
    "teacher": "teacher",
    "before": "student",
    "stage_1": "stage 1",
    "stage_2": "stage 2",
    "text_alone": "text alone",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReuseConfig:
  """What may layers take from others?

  Attributes:
    num_seeds: Models that are trained, and draws of texts.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    model: Folder of a Hugging Face model; none trains models.
    corpus: The text.
    num_layers: Layers of the models that are trained.
    width: Size of the residual stream of the models that are trained, a
      multiple of 16.
    num_steps: Steps of training of each model.
    seq_len: Tokens of a text.
    batch_size: Texts of a step, and texts that losses are of.
    rate: Learning rate of training; a third of it distils.
    block: Keys of a block.
    num_blocks: Blocks that layers read which are not full.
    theta: Least overlap of the plan.
    num_random: Random plans.
    num_distil: Steps of each stage.
  """

  num_seeds: int = 3
  first_seed: int = 0
  model: str = ""
  corpus: str = "tinyshakespeare"
  num_layers: int = 6
  width: int = 64
  num_steps: int = 300
  seq_len: int = 96
  batch_size: int = 16
  rate: float = 3e-3
  block: int = 8
  num_blocks: int = 4
  theta: float = 0.7
  num_random: int = 5
  num_distil: int = 40

  def __post_init__(self):
    require.at_least("num_seeds", self.num_seeds, 2)
    require.seeds("first_seed", self.first_seed, self.num_seeds)
    for name in ("num_layers", "num_blocks"):
      require.at_least(name, getattr(self, name), 2)
    for name in ("num_steps", "num_distil", "num_random", "batch_size"):
      require.at_least(name, getattr(self, name), 1)
    require.positive("rate", self.rate)
    require.between("block", self.block, 1, self.seq_len)
    settings_lib.require_multiple("width", self.width, 16)

  @property
  def num_first(self) -> int:
    """Tokens whose loss does not count: they see no more than is read."""
    return min(self.block * self.num_blocks, self.seq_len - 2)


class Subject:
  """A model and the text that it is asked about.

  Attributes:
    config: Settings.
    model: The Transformer.
    params: Its parameters.
    test: Texts [B, T + 1] that it was not trained on.
  """

  def __init__(self, config: ReuseConfig, seed: int):
    self.config, self.seed = config, seed
    text = corpus_lib.load(config.corpus, tokenizer=config.model or "bytes")
    self._train, held = np.asarray(text.train), np.asarray(text.valid)
    (self.test,) = self._draw(held, 1, 1)
    if config.model:
      shape, self.params = pretrained.load(config.model)
      self.model = models.Transformer(shape, implementation="xla")
      return
    heads = config.width // 16
    shape = configs.TransformerConfig(
        vocab_size=text.tokenizer.vocab_size,
        num_layers=config.num_layers,
        embed_dim=config.width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=16,
        hidden_dim=2 * config.width,
    )
    self.model = models.Transformer(shape, implementation="xla")
    draw = jax.jit(lambda key: self.model.init(key, self.test[:1, :2]))
    params = draw(jax.random.key(seed))["params"]
    texts = self.texts(config.num_steps, 2)
    self.params, _ = distillation.train(self.model, params, texts, config.rate)

  def texts(self, num: int, stream: int) -> Iterator[jax.Array]:
    """Draws texts of the train split; one stream, one sequence of draws."""
    return self._draw(self._train, num, stream)

  def _draw(
      self, ids: np.ndarray, num: int, stream: int
  ) -> Iterator[jax.Array]:
    rng = np.random.default_rng((self.seed, stream))
    length = self.config.seq_len + 1
    for _ in range(num):
      starts = rng.integers(0, len(ids) - length, self.config.batch_size)
      yield jnp.asarray(
          np.stack([ids[start : start + length] for start in starts]), jnp.int32
      )

  def over(self, entry: str) -> models.Transformer:
    """The model with a system in every layer."""
    shape = dataclasses.replace(self.model.config, attention=(entry,))
    return self.model.clone(config=shape)

  def loss(self, model: models.Transformer, params: Any) -> float:
    """Mean cross-entropy of the test's tokens that count."""
    return float(_loss(model, params, self.test, self.config.num_first))


@functools.cache
def _jitted() -> Any:
  def loss(model: Any, params: Any, tokens: Any, num_first: int) -> Any:
    logits = model.apply({"params": params}, tokens[:, :-1])
    losses = lm_step.token_losses(logits, tokens[:, 1:])
    return losses[:, num_first:].mean()

  return jax.jit(loss, static_argnums=(0, 3))


def _loss(
    model: models.Transformer, params: Any, tokens: jax.Array, num_first: int
) -> jax.Array:
  return _jitted()(model, params, tokens, num_first)


def measure(
    config: ReuseConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Plans and distils models of several seeds.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "plans" and "stages": losses by name, mean over seeds and interval;
    "num_full" layers of each seed's plan; "overlap" of the layers that take, as
    profiled and under the plan; "claims" and "finding".
  """
  part = part or parts.at_once
  runs = [
      part(f"seed {seed}", lambda seed=seed: _of_seed(config, seed))
      for seed in range(config.first_seed, config.first_seed + config.num_seeds)
  ]
  collect = lambda key, names: {
      name: intervals.interval(np.array([run[key][name] for run in runs]))
      for name in names
  }
  found = {
      "plans": collect("plans", PLANS),
      "stages": collect("stages", STAGES),
      "overlap": collect("overlap", ("profiled", "under the plan", "random")),
      "num_full": [run["num_full"] for run in runs],
      "num_layers": runs[0]["num_layers"],
  }
  rows = _claims(found)
  return {**found, "claims": rows, "finding": claims.finding(rows)}


def _of_seed(config: ReuseConfig, seed: int) -> dict[str, Any]:
  subject = Subject(config, seed)
  return {
      "num_layers": subject.model.config.num_layers,
      **_planned(subject),
      "stages": _distilled(subject),
  }


def _planned(subject: Subject) -> dict[str, Any]:
  config, params = subject.config, subject.params
  num_layers = subject.model.config.num_layers
  profile = layer_overlap.measure(
      subject.model,
      params,
      subject.test[:, :-1],
      config.block,
      config.num_blocks,
      config.num_first,
  )
  overlap = np.asarray(profile.overlap, np.float64)
  plan = layer_plan.fewest(overlap, config.theta)
  num_taking = max(num_layers - len(plan.full), 1)
  rng = np.random.default_rng((subject.seed, 3))
  drawn = [
      (0, *sorted((1 + rng.permutation(num_layers - 1))[: len(plan.full) - 1]))
      for _ in range(config.num_random)
  ]
  run = lambda full, **options: subject.loss(
      subject.over(_entry(config, full, **options)), params
  )
  own = _entry(config, plan.full, reuse=False)
  return {
      "num_full": len(plan.full),
      "plans": {
          "dense": subject.loss(subject.model, params),
          "plan": run(plan.full),
          "random": float(np.mean([run(full) for full in drawn])),
          "own": subject.loss(subject.over(own), params),
      },
      "overlap": {
          "profiled": plan.total / num_taking,
          "under the plan": _again(subject, plan.full),
          "random": float(np.mean([_mean(overlap, full) for full in drawn])),
      },
  }


def _entry(
    config: ReuseConfig, full: tuple[int, ...], reuse: bool = True
) -> str:
  system = hylra.Hylra(
      full=".".join(map(str, full)),
      k=config.block * config.num_blocks,
      block=config.block,
      reuse=reuse,
  )
  options = dataclasses.asdict(system).items()
  return ":".join([system.name, *(f"{k}={v}" for k, v in options)])


def _mean(overlap: np.ndarray, full: tuple[int, ...]) -> float:
  """Mean overlap of the layers that take; 1 where none does."""
  last, shared = 0, []
  for layer in range(len(overlap)):
    last = layer if layer in full else last
    shared += [] if layer in full else [overlap[last, layer]]
  return float(np.mean(shared)) if shared else 1.0


def _again(subject: Subject, full: tuple[int, ...]) -> float:
  """Mean overlap of the layers that take, under the plan; 1 where none does."""
  model = subject.over(_entry(subject.config, full))
  run = jax.jit(functools.partial(model.apply, mutable="intermediates"))
  seen = run({"params": subject.params}, subject.test[:, :-1])[1]
  key, first = f"{hylra.Hylra.name}_overlap", subject.config.num_first
  found = [
      float(layer["attn"][key][0][:, first:].mean())
      for name, layer in seen["intermediates"].items()
      if name.startswith("layers_") and key in layer["attn"]
  ]
  return float(np.mean(found)) if found else 1.0


def _distilled(subject: Subject) -> dict[str, float]:
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
  plans, stages, overlap = (found[k] for k in ("plans", "stages", "overlap"))
  text = lambda x: intervals.text(x, 3)
  below = lambda claim, rows, one, other: claims.row(
      claim,
      f"below {_TITLES[other]}, {text(rows[other])}",
      text(rows[one]),
      rows[one]["mean"] < rows[other]["mean"],
  )
  return [
      below("HyLRA: loss of the plan", plans, "plan", "random"),
      claims.row(
          "HyLRA: what layers share under the plan",
          f"as profiled, {text(overlap['profiled'])}, or .1 less",
          text(overlap["under the plan"]),
          overlap["under the plan"]["mean"]
          >= overlap["profiled"]["mean"] - 0.1,
      ),
      claims.row(
          "HyLRA: loss of the plan beside own choices of as many layers",
          f"within .05 of {text(plans['own'])}",
          text(plans["plan"]),
          plans["plan"]["mean"] < plans["own"]["mean"] + 0.05,
      ),
      below("EchoAtt: loss after stage 1", stages, "stage_1", "before"),
      below("EchoAtt: loss after stage 2", stages, "stage_2", "stage_1"),
      below("EchoAtt: loss by equal tokens", stages, "stage_2", "text_alone"),
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the losses of plans and of stages."""
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.4)
    panels = figure.subplots(1, 2).tolist()
    sides = (("plans", PLANS, "HyLRA"), ("stages", STAGES, "EchoAtt"))
    for axes, (key, names, title) in zip(panels, sides, strict=True):
      rows = [summary[key][name] for name in names]
      look = drawing.WITH._replace(linestyle="")
      x = np.arange(len(names), dtype=float)
      drawing.draw_points(axes, x, drawing.points(rows), look, "")
      axes.set(title=title, ylabel="loss [nats]")
      axes.set_xticks(x, [_TITLES[name] for name in names], rotation=30)
  return figure


STUDY = study_lib.Study(
    title="What layers take from layers",
    config=ReuseConfig(),
    measure=study_lib.in_parts("reuse", measure),
    draw=draw,
    caption=(
        "Losses of held-out text: mean over seeds and its 95 % interval"
        " (Student's t). Left, a few layers read everything and others what"
        " these chose; right, layers that share attention, distilled."
    ),
    report_title="Attention systems",
)
