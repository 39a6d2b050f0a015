"""How much of attention do selectors keep, when all may read as much?

Each selector reads the same number of blocks of keys for a query. Between the
blocks of most weight (oracle) and blocks at random stand

  recent    the newest blocks, and the first
  hip       a search in a tree, one key of a block being asked; "rarely" of
            every eighth query (`stride`)
  landmark  the last key of each block, no search
  moba      the mean key of each block
  xattention  sums of antidiagonals, a block of queries together

on keys of known correlation: normal vectors that are alike over `near` of their
neighbours; queries are alike over a block. With `--selection.model=DIR` a
checkpoint is measured too, its first two layers dense: weight kept in each
layer, and the loss of a text that is read so.

The figure shows the weight kept against the correlation, and by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
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
  from joma.studies import once
  from joma.studies import parts
  from joma.studies.systems.subjects import selector_choices as picks
  from joma.systems.reuse import hylra
  from joma.systems.selectors import landmark
  from joma.transformer import config as configs
  from joma.transformer import model as models
  from joma.transformer.hf import pretrained
  from joma.transformer.layers import cross_entropy
  from joma.transformer.rope import rotary
  from joma.transformer.text import corpus as corpus_lib
  from kernels_pallas import selection as selection_lib
  from scansnap_jax.experiment import figures
  from scansnap_jax.experiment import intervals

_BOUNDS = ("oracle", "random")
# Layers that read everything, as is usual: the first ones look everywhere.
_NUM_DENSE = 2
# Between points that stand side by side, as a factor.
_STEP = 1.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionConfig:
  """How much of attention do selectors keep, when all may read as much?

  Attributes:
    num_seeds: Draws of keys and queries.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    near: Neighbours over which keys are alike; 1 is none.
    num_keys: Tokens of a draw, a multiple of `block`.
    num_blocks: Blocks that a query reads.
    block: Keys of a block.
    model: Folder of a checkpoint, or its name on Hugging Face, as
      org/name@revision; measured too where it is given.
    corpus: Text whose validation split the checkpoint reads.
    num_tokens: Tokens that it reads.
    num_first: Tokens before the first whose loss counts.
  """

  num_seeds: int = 4
  first_seed: int = 0
  near: tuple[int, ...] = (1, 4, 16)
  num_keys: int = 512
  num_blocks: int = 6
  block: int = 16
  model: str = ""
  corpus: str = "tinyshakespeare"
  num_tokens: int = 384
  num_first: int = 96

  def __post_init__(self):
    require.at_least("num_seeds", self.num_seeds, 2)
    require.seeds("first_seed", self.first_seed, self.num_seeds)
    require.at_least("num_blocks", self.num_blocks, 3)
    require.between("block", self.block, 4, 1024)
    require.at_least("num_first", self.num_first, 0)
    for length in self.near:
      require.between("near", length, 1, 4096)
    settings_lib.require_multiple("block", self.block, 4)
    if self.num_keys % self.block or self.num_keys < 4 * self.block:
      raise errors.UserError(
          f"num_keys={self.num_keys} must be a multiple of block={self.block},"
          " four or more of them."
      )
    if self.num_tokens <= self.num_first + 1:
      raise errors.UserError(
          f"num_tokens={self.num_tokens} must be more than the"
          f" num_first={self.num_first} whose loss does not count."
      )


def _systems(config: SelectionConfig) -> dict[str, Any]:
  return picks.systems(config.block, config.num_blocks)


def draw_vectors(
    config: SelectionConfig, near: int
) -> tuple[jax.Array, jax.Array]:
  """Queries and keys [R, T, 1, H], logits of standard deviation 2.

  Queries are alike over a block whatever the keys are: some selectors choose
  for a block of them together.
  """
  generators = [
      np.random.default_rng(config.first_seed + number)
      for number in range(config.num_seeds)
  ]
  draw = lambda near: jnp.asarray(
      np.stack([_smooth(rng, config.num_keys, near) for rng in generators]),
      jnp.float32,
  )[:, :, None]
  key = draw(near)
  return 2 * draw(config.block), key


def _smooth(
    rng: np.random.Generator, length: int, near: int, size: int = 16
) -> np.ndarray:
  """Normal vectors [T, H] that are alike over `near` neighbours; 1 is none."""
  reach = 4 * near
  noise = rng.normal(size=(length + 2 * reach, size))
  if near > 1:
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / near) ** 2)
    smooth = lambda x: np.convolve(x, window, mode="valid")
    noise = np.apply_along_axis(smooth, 0, noise)
  noise = noise[:length]
  return noise / noise.std()


def measure(
    config: SelectionConfig, *, part: parts.Part | None = None
) -> dict[str, Any]:
  """Measures keys of known correlation, and a checkpoint if one is named.

  Args:
    config: Sizes.
    part: Keeps what is done.

  Returns:
    "kept" of each selector by correlation, mean over seeds and its interval;
    "layers", weight kept by layer, and "losses" of a checkpoint, empty without
    one; "claims" and "finding".
  """
  part = part or parts.at_once
  drawn = {
      near: part(f"keys {near}", lambda near=near: _of_keys(config, near))
      for near in config.near
  }
  names = [*next(iter(drawn.values()))]
  rows = {
      name: [
          intervals.interval(np.array(row[name]), least=0, most=1)
          for row in drawn.values()
      ]
      for name in names
  }
  real: dict[str, Any] = {"layers": {}, "losses": {}}
  if config.model:
    real = part("checkpoint", lambda: _of_checkpoint(config))
  table = _claims(config, rows, real)
  return {
      "near": list(config.near),
      "kept": rows,
      **real,
      "claims": table,
      "finding": claims.finding(table),
  }


def _choices(
    config: SelectionConfig, *of: Any
) -> dict[str, selection_lib.Selection]:
  return picks.choices(config.block, config.num_blocks, *of)


def _of_keys(config: SelectionConfig, near: int) -> dict[str, list[float]]:
  query, key = draw_vectors(config, near)

  @jax.jit
  def run(query: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    logits = jnp.einsum("BTNH,BSNH->BNTS", query, key) * 0.25
    length = query.shape[1]
    seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
    found = picks.choices(
        config.block, config.num_blocks, query, key, weights, 0.25
    )
    return {name: picks.kept(where, weights) for name, where in found.items()}

  return {k: np.asarray(x).tolist() for k, x in run(query, key).items()}


def _of_checkpoint(config: SelectionConfig) -> dict[str, Any]:
  shape, params = pretrained.load(config.model)
  text = corpus_lib.load(config.corpus, tokenizer=config.model)
  ids = np.asarray(text.valid[: config.num_tokens], np.int32)[None]
  plain = models.Transformer(shape, implementation="xla")
  is_projection = lambda module, _: module.name in ("query", "key")
  run = jax.jit(
      lambda params: plain.apply(
          {"params": params},
          ids,
          mutable="intermediates",
          capture_intermediates=is_projection,
      )[1]["intermediates"]
  )
  seen = run(params)
  layers: dict[str, list[float]] = {}
  for layer in range(_NUM_DENSE, shape.num_layers):
    attn = seen[f"layers_{layer}"]["attn"]
    for name, value in _of_layer(config, shape, layer, attn).items():
      layers.setdefault(name, []).append(float(value))
  loss = lambda entry: float(_loss(config, shape, params, ids, entry))
  return {
      "layers": layers,
      "losses": {name: loss(x) for name, x in _entries(config).items()},
  }


def _of_layer(
    config: SelectionConfig,
    shape: configs.TransformerConfig,
    layer: int,
    attn: Mapping[str, Any],
) -> dict[str, jax.Array]:
  (weights,) = attn["attn_weights"]
  positions = jnp.arange(weights.shape[2])[None]
  turn: Callable[[jax.Array], jax.Array] = lambda x: rotary.rotate_by(
      x, positions, shape.rope_of(layer), shape
  )
  query, key = (turn(attn[name]["__call__"][0]) for name in ("query", "key"))
  return _keeps(config, shape.head_dim**-0.5)(query, key, weights)


@functools.cache
def _keeps(
    config: SelectionConfig, scale: float
) -> Callable[..., dict[str, jax.Array]]:
  """Of a layer's queries, keys and weights: one program for all layers."""

  def run(
      query: jax.Array, key: jax.Array, weights: jax.Array
  ) -> dict[str, jax.Array]:
    found = picks.choices(
        config.block, config.num_blocks, query, key, weights, scale
    )
    return {
        name: picks.kept(where, weights)[0] for name, where in found.items()
    }

  return jax.jit(run)


def _entries(config: SelectionConfig) -> dict[str, str]:
  """Entries of a model's attention; the oracle's is a layer's own weights."""
  written = lambda system: ":".join([
      system.name,
      *(f"{k}={v}" for k, v in dataclasses.asdict(system).items() if v != ""),
  ])
  own = hylra.Hylra(
      full="0",
      k=config.num_blocks * config.block,
      block=config.block,
      reuse=False,
  )
  found = {name: written(x) for name, x in _systems(config).items()}
  # Its keys say nothing of their blocks where nothing has taught them to.
  found.pop(landmark.Landmark.name)
  return {"dense": "", "oracle": written(own), **found}


def _loss(
    config: SelectionConfig,
    shape: configs.TransformerConfig,
    params: Any,
    ids: np.ndarray,
    entry: str,
) -> jax.Array:
  """Mean cross-entropy of the tokens that count."""
  dense = ("softmax",) * _NUM_DENSE
  entries = (*dense, *(entry,) * (shape.num_layers - _NUM_DENSE))
  changed = dataclasses.replace(shape, attention=entries if entry else ())
  model = models.Transformer(changed, implementation="xla")
  run = once.jit(lambda params: model.apply({"params": params}, ids[:, :-1]))
  losses = cross_entropy.token_losses(run(params), jnp.asarray(ids[:, 1:]))
  return losses[0, config.num_first :].mean()


def _claims(
    config: SelectionConfig,
    rows: dict[str, list[dict[str, float]]],
    real: dict[str, Any],
) -> list[claims.Row]:
  table = []
  for name in (*_systems(config), "recent"):
    for i, near in enumerate(config.near):
      if near < 4 or name == "recent":
        continue
      low, own, high = (rows[x][i]["mean"] for x in ("random", name, "oracle"))
      table.append(
          claims.row(
              f"{name}: keys alike over {near} neighbours",
              f"above random {low:.3f}, at most oracle {high:.3f}",
              intervals.text(rows[name][i], 3),
              low < own <= high + 1e-6,
          )
      )
  for name in _systems(config) if real["layers"] else ():
    values = {x: np.array(real["layers"][x]) for x in (*_BOUNDS, name)}
    above = values[name] > values["random"]
    table.append(
        claims.row(
            f"{name}: weight kept in layers of the checkpoint",
            "above random in every layer",
            f"in {int(above.sum())} of {len(above)}; mean"
            f" {values[name].mean():.3f} (random {values['random'].mean():.3f},"
            f" oracle {values['oracle'].mean():.3f})",
            bool(above.all()),
        )
    )
  losses = real["losses"]
  for name in set(_systems(config)) & set(losses):
    table.append(
        claims.row(
            f"{name}: loss of the checkpoint that reads so",
            f"not below the oracle's {losses['oracle']:.3f}",
            f"{losses[name]:.3f} (dense {losses['dense']:.3f})",
            losses[name] >= losses["oracle"] - 1e-3,
        )
    )
  return sorted(table, key=lambda row: row["claim"])


def _looks(names: list[str]) -> dict[str, figures.CurveStyle]:
  """Colours for selectors, black and grey for what they lie between."""
  bounds = {"oracle": "0", "random": "0.6", "recent": "0.4"}
  looks = drawing.looks_of([name for name in names if name not in bounds])
  markers = zip(bounds, ("x", "+", "."), strict=True)
  plain = {
      name: (
          looks[names[0]]._replace(
              color=bounds[name], linestyle=":", marker=marker
          )
      )
      for name, marker in markers
  }
  return looks | plain


def draw(summary: study_lib.Summary) -> mpl_figure.Figure:
  """Draws the weight kept against correlation, and by layer."""
  near, layers = np.array(summary["near"], float), summary["layers"]
  looks = _looks(list(summary["kept"]))
  with figures.style():
    figure = figures.make_figure(figures.PAGE_WIDTH, 2.8)
    panels = figure.subplots(1, 2 if layers else 1, squeeze=False)[0].tolist()
    for place, (name, row) in enumerate(summary["kept"].items()):
      values = drawing.points(row)
      # Side by side: bars at one value would hide each other.
      x = near * _STEP ** (place - (len(summary["kept"]) - 1) / 2)
      drawing.draw_points(panels[0], x, values, looks[name], name)
    panels[0].set(
        xlabel="neighbours that keys are alike over",
        ylabel="weight kept",
        xscale="log",
    )
    panels[0].set_xticks(near, [f"{x:g}" for x in near], minor=False)
    panels[0].set_xticks([], minor=True)
    for name, values in layers.items():
      x = _NUM_DENSE + np.arange(len(values))
      drawing.draw_curve(panels[1], x, values, looks[name], name)
    if layers:
      panels[1].set(xlabel="layer of the checkpoint")
    figures.put_legend_above(figure, figures.legend_entries(panels[0]))
  return figure


STUDY = study_lib.Study(
    title="Selectors at one budget",
    config=SelectionConfig(),
    smoke=dict(num_seeds=2, near=(4,), num_keys=64, num_blocks=3, block=8),
    measure=study_lib.in_parts("selection", measure),
    draw=draw,
    caption=(
        "Share of the attention weight that selectors keep, all of which read"
        " as many blocks: mean over draws and its 95 % interval (Student's t);"
        " right, a checkpoint's layers, of one text. Points of one number of"
        " neighbours stand side by side."
    ),
    report_title="Attention systems",
)
