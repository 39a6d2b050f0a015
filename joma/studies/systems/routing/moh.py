"""Do heads that are routed divide the work, and what does that save?

Two classes of tokens read different places, and heads read the same place
whatever the class is: routing must tell the classes apart
(https://arxiv.org/abs/2410.11842). The mutual information of the heads that a
token chooses and its class is measured, where each class needs two heads of
four, and where each needs one of two: of one routed head the normalised gate is
1 whatever the router says, so that the loss teaches it nothing and the balance
alone moves it. Routed by blocks, tiles of attention are counted and timed. With
`--moh.model=DIR` a checkpoint is read, whose heads are closed by the rule
without parameters, at random, or always the same ones.

The figure shows right answers along training, and perplexity by share of heads.

Paper's settings: those of the system `moh`.
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
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies import training
  from joma.studies.systems.subjects import closed_heads
  from joma.studies.systems.subjects import routed_heads
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

# Places that each class reads, and whether a token chooses its heads.
MODELS: dict[str, tuple[int, bool]] = {
    "2 of 4 heads": (2, True),
    "4 heads, no router": (2, False),
    "1 of 2 heads": (1, True),
}
_PAIRS, _PLAIN, _SINGLE = MODELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class MohConfig:
  """Do heads that are routed divide the work, and what does that save?

  Attributes:
    num_seeds: Runs of each model.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of each run.
    batch_size: Texts of a step.
    seq_len: Tokens of a text.
    num_symbols: Symbols that there are.
    width: Width of the layer.
    rate: Highest learning rate.
    num_test: Texts of each run by which routing is told.
    num_keys: Tokens of the text whose tiles are counted.
    block: Queries of a block, and keys of a tile.
    num_heads: Heads there, half of them active, a quarter shared.
    model: Folder of a checkpoint, or its name on Hugging Face, as
      org/name@revision; measured too where it is given.
    corpus: Text that the checkpoint reads.
    num_tokens: Tokens of each text that it reads.
    num_texts: How many.
  """

  num_seeds: int = 3
  first_seed: int = 0
  num_steps: int = 600
  num_records: int = 20
  batch_size: int = 16
  seq_len: int = 16
  num_symbols: int = 8
  width: int = 32
  rate: float = 0.01
  num_test: int = 256
  num_keys: int = 4096
  block: int = 128
  num_heads: int = 8
  model: str = ""
  corpus: str = "tinyshakespeare"
  num_tokens: int = 256
  num_texts: int = 8

  def __post_init__(self):
    settings_lib.check_trained(
        self, "batch_size", "num_test", "num_texts", "block"
    )
    require.at_least("num_symbols", self.num_symbols, 2)
    # Two heads of four read as far back as four tokens.
    require.at_least("seq_len", self.seq_len, 5)
    require.at_least("width", self.width, 4)
    require.at_least("num_tokens", self.num_tokens, 2)
    settings_lib.require_multiple("num_heads", self.num_heads, 4)
    settings_lib.require_multiple("num_keys", self.num_keys, self.block)


def problem(config: MohConfig, name: str) -> routed_heads.Classes:
  """A model of `MODELS` and its task."""
  num_each, is_routed = MODELS[name]
  sizes = ("num_symbols", "seq_len", "batch_size", "width")
  return routed_heads.Classes(
      num_each=num_each,
      is_routed=is_routed,
      **{size: getattr(config, size) for size in sizes},
  )


def measure(
    config: MohConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains the models, counts tiles, and closes heads of a checkpoint.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "rows", of each model: "accuracy" of the last record and "scores" along
    training, with "information" of routing and class after training and
    "before" it where there is a router, intervals over seeds; "tiles", counts
    and seconds; "checkpoint", empty without one; "steps", "guess", "claims" and
    "finding".
  """
  part = part or parts.at_once
  rows = {name: part(name, lambda n=name: _run(config, n)) for name in MODELS}
  sizes = (config.num_keys, config.block, config.num_heads)
  tiles = part(
      "tiles",
      lambda: routed_heads.tiles(
          *sizes, config.num_heads // 2, config.first_seed
      ),
  )
  closed: dict[str, Any] = {}
  if config.model:
    closed = part(
        "checkpoint",
        lambda: closed_heads.measure(
            config.model, config.corpus, config.num_tokens, config.num_texts
        ),
    )
  told = _claims(rows, tiles) + (_of_checkpoint(closed) if closed else [])
  return {
      "num_seeds": config.num_seeds,
      "guess": 1 / config.num_symbols,
      "steps": rows[_PAIRS]["steps"],
      "rows": rows,
      "tiles": tiles,
      "checkpoint": closed,
      "claims": told,
      "finding": claims.finding(told),
  }


def _run(config: MohConfig, name: str) -> dict[str, Any]:
  what, seeds = problem(config, name), settings_lib.seeds(config)
  trained = training.train(
      what,
      seeds,
      schedule=training.Schedule(
          num_steps=config.num_steps, num_records=config.num_records
      ),
      rate=config.rate,
  )
  share = lambda values: intervals.interval(values, least=0, most=1)
  found = {
      "accuracy": share(trained.scores[:, -1]),
      "steps": trained.steps,
      "scores": share(trained.scores),
      "curves": trained.curves(),
  }
  if not what.is_routed:
    return found
  test = dataclasses.replace(what, batch_size=config.num_test)
  look = jax.jit(test.routes)

  def told(params: Any, seed: int) -> float:
    # No key of training.
    chosen, kind = look(params, jax.random.key(seed + 2**30))
    return routed_heads.information(np.asarray(chosen), np.asarray(kind))

  after = [told(trained.params_of(run), seed) for run, seed in enumerate(seeds)]
  before = [told(what.init(jax.random.key(seed)), seed) for seed in seeds]
  return found | {
      "information": share(np.array(after)),
      "before": share(np.array(before)),
  }


def _claims(
    rows: dict[str, dict[str, Any]], tiles: dict[str, Any]
) -> list[claims.Row]:
  text = lambda name, key: intervals.text(rows[name][key])
  mean = lambda name, key: rows[name][key]["mean"]
  told = [
      claims.row(
          f"{name} routed: the heads that are chosen tell the class",
          "above .9 of its entropy",
          f"{text(name, 'information')}, before training"
          f" {text(name, 'before')}",
          mean(name, "information") > 0.9,
      )
      for name in (_PAIRS, _SINGLE)
  ]
  share = tiles["visited"] / tiles["every"]
  return told + [
      claims.row(
          "the same heads without gates cannot tell whom to hear",
          "at least .1 below what routed ones answer,"
          f" {text(_PAIRS, 'accuracy')}",
          text(_PLAIN, "accuracy"),
          mean(_PLAIN, "accuracy") < mean(_PAIRS, "accuracy") - 0.1,
      ),
      claims.row(
          "routed by blocks, half of the heads visit half of the tiles",
          f"exactly .5 of {tiles['every']}",
          f"{tiles['visited']}, {share:.4f}",
          2 * tiles["visited"] == tiles["every"],
      ),
      claims.row(
          "and take less time than all heads on the same tiles",
          "at most .75 of it",
          f"{tiles['routed'] / tiles['all_heads']:.2f} of it, and"
          f" {tiles['routed'] / tiles['plain']:.2f} of plain attention's"
          f" {1e3 * tiles['plain']:.0f} ms",
          tiles["routed"] < 0.75 * tiles["all_heads"],
      ),
  ]


def _of_checkpoint(closed: dict[str, Any]) -> list[claims.Row]:
  by_rule = closed["by_rule"]
  told = lambda rule: ", ".join(f"{value:.1f}" for value in by_rule[rule])
  shares = ", ".join(f"{share:.2f}" for share in closed["shares"])
  below = lambda rule: bool(
      (np.array(by_rule["norms"]) < np.array(by_rule[rule])).all()
  )
  return [
      claims.row(
          "a checkpoint's perplexity by the greatest queries is below that of"
          f" {what} heads, at shares {shares}",
          f"at every share below {told(rule)}",
          f"{told('norms')} (all heads {closed['perplexity']:.1f})",
          below(rule),
      )
      for rule, what in (("random", "random"), ("fixed", "the best fixed"))
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws right answers along training; a checkpoint's perplexity beside."""
  closed, looks = summary["checkpoint"], drawing.looks_of([*MODELS])
  steps = np.asarray(summary["steps"])
  with figures.style():
    width = figures.PAGE_WIDTH if closed else figures.COLUMN_WIDTH
    figure = figures.make_figure(width, 2.6)
    panels = figure.subplots(1, 2 if closed else 1, squeeze=False)[0].tolist()
    for name, row in summary["rows"].items():
      drawing.draw_interval(panels[0], steps, row["scores"], looks[name], name)
    panels[0].axhline(summary["guess"], color="black", linestyle=":")
    panels[0].set(
        xlabel="step", ylabel="share of right answers", ylim=(0, 1.03)
    )
    if closed:
      lines = drawing.looks_of([*closed["by_rule"]])
      for rule, values in closed["by_rule"].items():
        x, y = [*closed["shares"], 1], [*values, closed["perplexity"]]
        drawing.draw_curve(panels[1], np.array(x), y, lines[rule], rule)
      panels[1].set(xlabel="share of heads", ylabel="perplexity", yscale="log")
      panels[1].legend()
    figures.put_legend_above(figure, figures.legend_entries(panels[0]))
  return figure


STUDY = study_lib.Study(
    title="Mixture of heads: who is heard, and what it saves",
    config=MohConfig(),
    smoke=dict(
        batch_size=2,
        seq_len=6,
        num_symbols=3,
        width=4,
        num_test=2,
        num_keys=32,
        block=8,
        num_heads=4,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("moh", measure),
    draw=draw,
    caption=(
        "Share of symbols that are said right, along training; dotted, a guess."
        f" {study_lib.BANDS} With a checkpoint, right, its perplexity against"
        " the share of heads that each token has."
    ),
    report_title="Attention systems",
)
