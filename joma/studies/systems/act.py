"""Does attention that is taken from loud columns help, and in which heads?

A column behind the first that gets a mean weight above theta gives up all but
beta of it (Attention Calibration, https://arxiv.org/abs/2406.15765). Not all of
them are useless: a planted column that says nothing should be turned down, one
that says the answer should not. With `--act.model=DIR` every head of a
checkpoint that has such columns is tried alone on texts of the train split;
those whose calibration lowers the loss are calibrated together on other texts,
beside all heads, and as many at random. Columns are those of each text's
prompt, losses those of what follows: no row knows a later one's columns.

The figure shows the answer's margin, and perplexity against beta.

Paper's settings: those of the system `act`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from joma.studies import study as study_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import claims
  from joma.studies import drawing
  from joma.studies import parts
  from joma.studies.systems.subjects import calibrated_heads
  from joma.studies.systems.subjects import planted_columns
  from joma.transformer import model as models
  from joma.transformer.hf import pretrained
  from joma.transformer.text import corpus as corpus_lib
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
  """Does attention that is taken from loud columns help, in which heads?

  Attributes:
    num_seeds: Draws of planted columns.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_keys: Keys of a draw.
    theta: Mean weight above which a column is turned down.
    beta: What its weights are multiplied by.
    model: Folder of a checkpoint, or its name on Hugging Face, as
      org/name@revision; measured too where it is given.
    corpus: Text that it reads.
    num_prompt: Tokens of a text that choose columns.
    num_tokens: Tokens of a text, the prompt included.
    num_find: Texts of the train split on which heads are tried.
    num_texts: Texts of the validation split that are measured.
    thetas: Values of theta by which the heads that are found are measured.
    betas: Values of beta by which the heads that are found are measured.
  """

  num_seeds: int = 4
  first_seed: int = 0
  num_keys: int = 32
  theta: float = 0.1
  beta: float = 0.4
  model: str = ""
  corpus: str = "tinyshakespeare"
  num_prompt: int = 96
  num_tokens: int = 192
  num_find: int = 2
  num_texts: int = 6
  thetas: tuple[float, ...] = (0.05, 0.1, 0.2)
  betas: tuple[float, ...] = (0.0, 0.4, 0.7, 1.0)

  def __post_init__(self):
    for name in ("num_seeds", "num_texts"):  # Intervals need two.
      require.at_least(name, getattr(self, name), 2)
    require.seeds("first_seed", self.first_seed, self.num_seeds)
    require.between("num_keys", self.num_keys, 8, 4096)
    require.at_least("num_find", self.num_find, 1)
    require.at_least("num_prompt", self.num_prompt, 2)
    for theta in (self.theta, *self.thetas):
      if not 0 < theta < 1:
        raise errors.UserError(
            f"theta={theta} must lie in (0, 1): a mean weight."
        )
    for beta in (self.beta, *self.betas):
      if not 0 <= beta <= 1:
        raise errors.UserError(f"beta={beta} must lie in [0, 1].")
    if not self.thetas or not self.betas:
      raise errors.UserError("thetas and betas need one value or more each.")
    if self.num_tokens <= self.num_prompt:
      raise errors.UserError(
          f"num_tokens={self.num_tokens} must be more than the"
          f" num_prompt={self.num_prompt} whose loss does not count."
      )


def measure(
    config: CalibrationConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Measures planted columns, and a checkpoint if one is named.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "margins" by kind, "plain" and "calibrated" intervals over draws with their
    "change"; "checkpoint", empty without one: "found" heads as [layer, head],
    "num_loud" of "num_heads" that have columns at all, "plain" perplexity and
    that of "sets" of heads, "apart", each set's loss above plain as intervals
    over texts, and "grid", perplexity of the found heads by theta and beta;
    "claims" and "finding".
  """
  part = part or parts.at_once
  margins = {
      kind: part(kind, lambda kind=kind: _of_planted(config, kind))
      for kind in planted_columns.KINDS
  }
  real: dict[str, Any] = {}
  if config.model:
    real = part("checkpoint", lambda: _of_checkpoint(config))
  table = _of_margins(margins) + (_of_sets(real) if real else [])
  return {
      "margins": margins,
      "checkpoint": real,
      "thetas": list(config.thetas),
      "betas": list(config.betas),
      "claims": table,
      "finding": claims.finding(table),
  }


def _of_planted(config: CalibrationConfig, kind: str) -> dict[str, Any]:
  run = lambda beta: planted_columns.margins(
      kind, settings_lib.seeds(config), config.num_keys, config.theta, beta
  )
  plain, calibrated = run(1.0), run(config.beta)
  found = {
      "plain": plain,
      "calibrated": calibrated,
      "change": calibrated - plain,
  }
  return {name: intervals.interval(values) for name, values in found.items()}


def _of_checkpoint(config: CalibrationConfig) -> dict[str, Any]:
  shape, params = pretrained.load(config.model)
  text = corpus_lib.load(config.corpus, tokenizer=config.model)
  model = models.Transformer(shape, implementation="xla")
  subject = calibrated_heads.Calibrated(model, params, config.num_prompt)
  train = first_texts(text.train, config.num_find, config.num_tokens)
  test = first_texts(text.valid, config.num_texts, config.num_tokens)
  loud = subject.num_columns(train, config.theta) > 0
  found = find(subject, train, loud, config.theta, config.beta)
  losses = lambda heads, theta=config.theta, beta=config.beta: subject.losses(
      test, heads, theta, beta
  )
  plain = losses(np.zeros_like(loud))
  chosen = {
      "found": found,
      "all": np.ones_like(loud),
      "random": at_random(loud, int(found.sum()), config.first_seed),
  }
  of_sets = {name: losses(heads) for name, heads in chosen.items()}
  perplexity = lambda losses: float(np.exp(losses.mean()))
  return {
      "found": np.argwhere(found).tolist(),
      "num_loud": int(loud.sum()),
      "num_heads": int(loud.size),
      "plain": perplexity(plain),
      "sets": {name: perplexity(each) for name, each in of_sets.items()},
      "apart": {
          name: intervals.interval(each - plain)
          for name, each in of_sets.items()
      },
      "grid": [
          [perplexity(losses(found, theta, beta)) for beta in config.betas]
          for theta in config.thetas
      ],
  }


def find(
    subject: calibrated_heads.Calibrated,
    tokens: jax.Array,
    loud: np.ndarray,
    theta: float,
    beta: float,
) -> np.ndarray:
  """Which heads, calibrated alone, lower the mean loss of texts [L, N].

  Args:
    subject: The checkpoint.
    tokens: Texts to try them on.
    loud: Heads that have columns to calibrate; others are not tried.
    theta: As in `Act`.
    beta: Likewise.
  """
  none = np.zeros_like(loud)
  plain = subject.losses(tokens, none, theta, beta).mean()
  found = none.copy()
  for head in map(tuple, np.argwhere(loud)):
    alone = none.copy()
    alone[head] = True
    found[head] = subject.losses(tokens, alone, theta, beta).mean() < plain
  return found


def at_random(loud: np.ndarray, count: int, seed: int) -> np.ndarray:
  """Draws `count` of the heads that have columns."""
  places = np.argwhere(loud)
  drawn = np.random.default_rng(seed).permutation(places)[:count]
  chosen = np.zeros_like(loud)
  chosen[tuple(drawn.T)] = True
  return chosen


def first_texts(ids: np.ndarray, num_texts: int, num_tokens: int) -> jax.Array:
  """The first texts of a split [B, T + 1]."""
  size = num_texts * (num_tokens + 1)
  if len(ids) < size:
    raise errors.UserError(
        f"The corpus has {len(ids)} tokens in this split; {num_texts} texts of"
        f" {num_tokens} take {size}: ask for fewer."
    )
  return jnp.asarray(np.asarray(ids[:size], np.int32).reshape(num_texts, -1))


def _of_margins(margins: dict[str, dict[str, Any]]) -> list[claims.Row]:
  changes = {kind: row["change"] for kind, row in margins.items()}
  useless, useful = (changes[kind] for kind in planted_columns.KINDS)
  told = lambda kind: intervals.text(margins[kind]["plain"])
  return [
      claims.row(
          "turning down a loud column that says nothing raises the answer's"
          " margin",
          f"above 0 of {told('useless')}",
          intervals.text(useless),
          useless["low"] > 0,
      ),
      claims.row(
          "turning down one that says the answer lowers it",
          f"below 0 of {told('useful')}",
          intervals.text(useful),
          useful["high"] < 0,
      ),
  ]


def _of_sets(real: dict[str, Any]) -> list[claims.Row]:
  apart, perplexity = real["apart"], real["sets"]
  told = lambda name: (
      f"{intervals.text(apart[name], 4)}, perplexity {perplexity[name]:.2f}"
  )
  count = f"{len(real['found'])} of {real['num_loud']} heads that have columns"
  rows = [
      claims.row(
          f"the heads found on other text, {count}, lower the loss",
          f"interval below 0 of plain attention's {real['plain']:.2f}",
          told("found"),
          apart["found"]["high"] < 0,
      )
  ]
  return rows + [
      claims.row(
          f"they do better than {what}",
          f"below {told(name)}",
          told("found"),
          apart["found"]["mean"] < apart[name]["mean"],
      )
      for name, what in (
          ("all", "all heads at once"),
          ("random", "as many such heads at random"),
      )
  ]


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws margins, and a checkpoint's perplexity against beta."""
  real, kinds = summary["checkpoint"], planted_columns.KINDS
  with figures.style():
    width = figures.PAGE_WIDTH if real else figures.COLUMN_WIDTH
    figure = figures.make_figure(width, 2.6)
    panels = figure.subplots(1, 2 if real else 1, squeeze=False)[0].tolist()
    looks = drawing.looks_of(["plain", "calibrated"])
    for shift, (name, look) in zip(
        drawing.shifts(2), looks.items(), strict=True
    ):
      values = drawing.points([summary["margins"][k][name] for k in kinds])
      mark = look._replace(linestyle="")
      drawing.draw_points(panels[0], np.arange(2.0) + shift, values, mark, name)
    panels[0].set(xlabel="planted column", ylabel="answer's margin")
    panels[0].set_xticks([0, 1], kinds)
    panels[0].set_xlim(-0.5, 1.5)
    panels[0].legend()
    if real:
      _draw_grid(panels[1], summary)
  return figure


def _draw_grid(axes: Any, summary: study_lib.Summary) -> None:
  real, betas = summary["checkpoint"], np.array(summary["betas"], float)
  names = [f"theta {theta:g}" for theta in summary["thetas"]]
  looks = drawing.looks_of(names)
  for name, values in zip(names, real["grid"], strict=True):
    drawing.draw_curve(axes, betas, values, looks[name], name)
  axes.axhline(real["plain"], color="black", linestyle=":")
  axes.set(xlabel="beta", ylabel="perplexity")
  axes.legend()


STUDY = study_lib.Study(
    title="Attention calibration: which loud columns are useless",
    config=CalibrationConfig(),
    smoke=dict(num_seeds=2, num_keys=16),
    measure=study_lib.in_parts("act", measure),
    draw=draw,
    caption=(
        "The answer's lead at a head with a planted column, plain and"
        " calibrated: mean over draws and its 95 % interval (Student's t)."
        " With a checkpoint, right, its perplexity with the heads that were"
        " found on other text; dotted, without calibration."
    ),
    report_title="Attention systems",
)
