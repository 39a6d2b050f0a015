"""Which parts of attention does a language model need?

Deconstructing Attention (https://arxiv.org/abs/2510.11602) relaxes them one at
a time, in all layers or in every other one:

  standard     softmax of queries and keys
  taylor       weights 1 + l + l^2 / 2, another form
  fixed        weights of positions alone: here a learned table of them, where
               the paper runs a fixed text through the stack
  random       the same of a frozen random table, where the paper runs a random
               sequence through it
  static       queries and keys of the token embedding in every layer
  uniform      the mean of all before, ours: no weights at all
  self-gating  scores that ask no query, the paper's non-approximate form
  no mixing    a gated MLP of as many parameters

Hybrids have the first layer so and the second one standard. Small models of two
layers read characters of Shakespeare; losses are on text that they have not
seen. The figure shows them beside the paper's perplexities (500M parameters, 15
billion tokens of web text), with Spearman's correlation of the orders; sinks,
concentration, local focus and diversity of the maps are in the table.

Paper's settings: those of the system `static_qk`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

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
  from joma.studies import once
  from joma.studies import parts
  from joma.studies import texts
  from joma.studies import training
  from joma.systems.probes import maps
  from joma.transformer import config as configs
  from joma.transformer.text import corpus as corpus_lib
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals


class Form(NamedTuple):
  """A relaxed form of attention.

  Attributes:
    entry: As in `TransformerConfig.attention`.
    uniform: The paper's perplexity with it in all layers; None where it has
      none.
    hybrid: The paper's, in every other layer.
  """

  entry: str
  uniform: float | None = None
  hybrid: float | None = None


FORMS: dict[str, Form] = {
    "standard": Form("softmax", 38.1),
    "taylor": Form("pointwise:form=taylor:sums=true", 47.9, 39.4),
    "fixed": Form("positional", 79.1, 38.5),
    "static": Form("static_qk", 79.9, 38.7),
    "random": Form("positional:learned=false", 84.8, 39.3),
    "no mixing": Form("no_mixing", 993.5, 45.8),
    "self-gating": Form("self_gating", 9e4, 39.4),
    "uniform": Form("pointwise:form=uniform:sums=true"),
}
_NUM_TEST = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeconstructConfig:
  """Which parts of attention does a language model need?

  Attributes:
    forms: Which are trained, standard among them.
    has_hybrids: Whether each also has a hybrid with standard attention.
    num_seeds: Runs of each model.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    num_steps: Steps of a run, a multiple of num_records.
    num_records: Records of each run.
    batch_size: Texts of a step.
    seq_len: Characters of a text.
    width: Width of the residual stream.
    rate: Highest learning rate.
  """

  forms: tuple[str, ...] = tuple(FORMS)
  has_hybrids: bool = True
  num_seeds: int = 3
  first_seed: int = 0
  num_steps: int = 400
  num_records: int = 8
  batch_size: int = 8
  seq_len: int = 64
  width: int = 48
  rate: float = 5e-3

  def __post_init__(self):
    settings_lib.check_runs(self)
    settings_lib.require_choices("forms", self.forms, tuple(FORMS))
    if "standard" not in self.forms:
      raise errors.UserError("forms must have standard among them.")
    require.at_least("batch_size", self.batch_size, 1)
    require.between("seq_len", self.seq_len, 4, 4096)
    settings_lib.require_multiple("width", self.width, 4)
    require.positive("rate", self.rate)


@functools.cache
def _characters() -> tuple[np.ndarray, np.ndarray, int]:
  """Shakespeare to train on and to test on, and how many characters it has."""
  corpus = corpus_lib.load()
  known = np.unique(corpus.train)
  place = np.zeros(256, np.uint8)
  place[known] = np.arange(len(known))
  return place[corpus.train], place[corpus.valid], len(known)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shakespeare:
  """Pieces of the text: `texts.Task`.

  Attributes:
    seq_len: T.
    is_test: Whether they are of the part that is not trained on.
  """

  seq_len: int
  is_test: bool = False

  def draw(self, key: jax.Array, num_texts: int) -> texts.Texts:
    """Draws pieces from anywhere."""
    ids = jnp.asarray(_characters()[1 if self.is_test else 0])
    starts = jax.random.randint(key, (num_texts, 1), 0, len(ids) - self.seq_len)
    piece = ids[starts + jnp.arange(self.seq_len + 1)[None]].astype(jnp.int32)
    is_asked = jnp.ones((num_texts, self.seq_len), bool)
    return texts.Texts(piece[:, :-1], piece[:, 1:], is_asked, is_asked)


def learner(
    config: DeconstructConfig, form: str, is_hybrid: bool
) -> texts.Learner:
  """A model and its task."""
  entry = FORMS[form].entry
  model = configs.TransformerConfig(
      vocab_size=_characters()[2],
      num_layers=2,
      embed_dim=config.width,
      num_heads=2,
      num_kv_heads=2,
      head_dim=config.width // 2,
      hidden_dim=2 * config.width,
      max_len=config.seq_len,
      attention=(entry, "softmax") if is_hybrid else (entry,),
  )
  task = Shakespeare(seq_len=config.seq_len)
  return texts.Learner(model=model, task=task, batch_size=config.batch_size)


def measure(
    config: DeconstructConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Trains all forms.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "uniform" and "hybrid": of each form its "loss", an interval over seeds,
    each seed's "losses", and means of probes over seeds and layers, None where
    no layer has weights; "spearman" of both; "claims" and "finding".
  """
  part = part or parts.at_once
  rows: dict[str, dict[str, Any]] = {"uniform": {}, "hybrid": {}}
  for form in config.forms:
    for kind in ("uniform", "hybrid")[: 1 + config.has_hybrids]:
      is_hybrid = kind == "hybrid"
      if not (is_hybrid and form == "standard"):
        rows[kind][form] = part(
            f"{kind} {form}",
            lambda f=form, h=is_hybrid: _run(config, f, h),
        )
  spearman = {kind: _spearman(kind, found) for kind, found in rows.items()}
  told = _claims(rows, spearman)
  return {
      "num_seeds": config.num_seeds,
      **rows,
      "spearman": spearman,
      "claims": told,
      "finding": claims.finding(told),
  }


def _run(
    config: DeconstructConfig, form: str, is_hybrid: bool
) -> dict[str, Any]:
  one = learner(config, form, is_hybrid)
  seeds = settings_lib.seeds(config)
  trained = training.train(
      one,
      seeds,
      schedule=training.Schedule(
          num_steps=config.num_steps, num_records=config.num_records
      ),
      rate=config.rate,
  )
  test = dataclasses.replace(
      one, task=Shakespeare(seq_len=config.seq_len, is_test=True)
  )
  look = once.jit(test.look, static_argnums=2)
  losses, looked = [], []
  for run in range(len(seeds)):
    # The same texts for all.
    loss, _, _, seen = look(
        trained.params_of(run), jax.random.key(0), _NUM_TEST
    )
    losses.append(float(loss))
    looked.append(_looked(seen, one.model.num_layers))
  return {
      "losses": losses,
      "loss": intervals.interval(np.array(losses)),
      "probes": {
          name: float(np.mean([one[name] for one in looked]))
          for name in looked[0]
      },
      "steps": trained.steps,
      "curves": trained.curves(),
  }


def _looked(seen: Any, num_layers: int) -> dict[str, float]:
  """Means of probes over layers that have weights, and their heads."""
  names = ("sinks", "concentration", "diversity", "local")
  found: dict[str, list[float]] = {name: [] for name in names}
  for layer in range(num_layers):
    attn = seen[f"layers_{layer}"]["attn"]
    if "attn_weights" in attn:
      for name, value in maps.of_maps(names, attn["attn_weights"][0]).items():
        # Of local focus the narrowest: the query's own key.
        value = value[..., 0] if name == "local" else value
        found[name].append(float(value.mean()))
  return {name: float(np.mean(each)) for name, each in found.items() if each}


def _spearman(kind: str, found: dict[str, Any]) -> float | None:
  """Rank correlation of losses and the paper's perplexities."""
  pairs = [
      (row["loss"]["mean"], getattr(FORMS[form], kind))
      for form, row in found.items()
      if getattr(FORMS[form], kind) is not None
  ]
  if len(pairs) < 3:
    return None
  # Equal ones share the mean of their ranks.
  rank = lambda x: np.array([(np.sum(x < v) + np.sum(x <= v)) / 2 for v in x])
  ours, theirs = (rank(np.array(x)) for x in zip(*pairs, strict=True))
  return float(np.corrcoef(ours, theirs)[0, 1])


def _claims(
    rows: dict[str, dict[str, Any]], spearman: dict[str, float | None]
) -> list[claims.Row]:
  uniform, hybrid = rows["uniform"], rows["hybrid"]
  told = []
  order = ("standard", "taylor", "fixed", "random", "no mixing")
  for before, after in zip(order, order[1:], strict=False):
    if before in uniform and after in uniform:
      gaps = np.subtract(uniform[after]["losses"], uniform[before]["losses"])
      gap = intervals.interval(gaps)
      told.append(
          claims.row(
              f"in all layers {before} has a smaller loss than {after}",
              "a gap whose interval over seeds is above 0",
              f"{intervals.text(gap)} nats",
              gap["low"] > 0,
          )
      )
  if "fixed" in uniform and "static" in uniform:
    gap = uniform["static"]["loss"]["mean"] - uniform["fixed"]["loss"]["mean"]
    told.append(
        claims.row(
            "in all layers static is about as good as fixed",
            "means within .05 nats (the paper's are .01 apart)",
            f"{gap:+.3f} nats",
            abs(gap) <= 0.05,
        )
    )
  if hybrid:
    standard = uniform["standard"]["loss"]["mean"]
    means = {form: row["loss"]["mean"] for form, row in hybrid.items()}
    worst = max(means, key=lambda form: means[form])
    told.append(
        claims.row(
            "every hybrid is within a few per cent of standard",
            "losses at most 6 % larger (the paper's at most 5.1 %)",
            f"worst {worst}: {means[worst]:.3f}, standard {standard:.3f}",
            means[worst] <= 1.06 * standard,
        )
    )
    if "no mixing" in hybrid:
      told.append(
          claims.row(
              "of the hybrids no mixing is the worst",
              "no mixing",
              worst,
              worst == "no mixing",
          )
      )
  for kind, value in spearman.items():
    if value is not None:
      told.append(
          claims.row(
              f"the order of {kind} models is the paper's",
              "Spearman's correlation above .7",
              f"{value:.2f}",
              value > 0.7,
          )
      )
  return told


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws losses, and losses against the paper's perplexities."""
  kinds = dict(
      zip(("uniform", "hybrid"), (drawing.WITH, drawing.WITHOUT), strict=True)
  )
  labels = {"uniform": "in all layers", "hybrid": "in every other layer"}
  names = list(summary["uniform"])
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.9)
    left, right = figure.subplots(1, 2, sharey=True)
    shifts = drawing.shifts(len(kinds))
    for shift, (kind, look) in zip(shifts, kinds.items(), strict=True):
      found = summary[kind]
      shown = [name for name in names if name in found]
      if not shown:
        continue
      look = look._replace(linestyle="")
      values = drawing.points([found[name]["loss"] for name in shown])
      places = shift + np.array([names.index(name) for name in shown], float)
      drawing.draw_points(left, places, values, look, labels[kind])
      known = [getattr(FORMS[name], kind) for name in shown]
      has = [value is not None for value in known]
      theirs = np.array([value for value in known if value is not None], float)
      drawing.draw_points(right, theirs, values[:, has], look, "")
    left.set_xticks(range(len(names)), names, rotation=60, ha="right")
    left.set(ylabel="loss (nats per character)")
    right.set(xlabel="perplexity in the paper", xscale="log")
    figures.put_legend_above(figure, figures.legend_entries(left))
  return figure


STUDY = study_lib.Study(
    title="Deconstructing attention: which parts a model needs",
    config=DeconstructConfig(),
    smoke=dict(
        forms=("standard", "no mixing"),
        batch_size=2,
        seq_len=4,
        width=8,
        num_seeds=2,
        num_steps=2,
        num_records=2,
    ),
    measure=study_lib.in_parts("deconstruct", measure),
    draw=draw,
    caption=(
        "Loss on text not trained on, of models of two layers with each form of"
        " attention, and the same against the paper's perplexity. Means over"
        " seeds and 95 % intervals (Student's t)."
    ),
    report_title="Attention systems",
)
