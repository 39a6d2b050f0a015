"""One model on one text: every probe, and the logits if they are wanted.

Texts are arrays of token ids [B, T]. What is longer than a window is cut, and
each window is read on its own, from position 0.

Letters: B texts, T tokens, L layers, N heads, W tokens of a window, V
vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from joma.systems.probes import read as named
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer import probes
from joma.transformer.text import sizes
from scansnap_jax.experiment import errors

# Numbers of the largest arrays of one call: maps of a layer, logits.
_CALL_SIZE = 2**24

WriteLogits = Callable[[int, int, Float[np.ndarray, "W V"]], None]


class Window(NamedTuple):
  """Part of a text.

  Attributes:
    row: Which text.
    start: Its first token.
    stop: One past its last token.
  """

  row: int
  start: int
  stop: int


def check_ids(ids: Int[np.ndarray, "B T"], config: configs.TransformerConfig):
  """Raises UserError if there is no token, or one that the model lacks."""
  if not ids.size:
    raise errors.UserError(f"There is no token to read: ids are {ids.shape}.")
  wrong = np.argwhere((ids < 0) | (ids >= config.vocab_size))
  if wrong.size:
    place = tuple(wrong[0].tolist())
    raise errors.UserError(
        f"Token {ids[place]} at {list(place)} is none of the model's: ids lie"
        f" in [0, {config.vocab_size})."
    )


def cut(shape: tuple[int, int], window: int) -> list[Window]:
  """Cuts texts [B, T] into windows of W tokens, the last of a text shorter."""
  num_texts, num_tokens = shape
  return [
      Window(row, start, min(start + window, num_tokens))
      for row in range(num_texts)
      for start in range(0, num_tokens, window)
  ]


def measure(
    config: configs.TransformerConfig,
    params: Mapping[str, Any],
    ids: Int[np.ndarray, "B T"],
    window: int,
    *,
    names: tuple[str, ...] = (),
    write_logits: WriteLogits | None = None,
    on_progress: Callable[[int], None] = lambda num_windows: None,
) -> dict[str, Any]:
  """Measures a model on texts, all of them.

  Args:
    config: Of the model.
    params: Its parameters.
    ids: Token ids.
    window: W, at least 1.
    names: Probes of `systems.probes.names`, but for those of updates.
    write_logits: Told text, first token and logits of every window.
    on_progress: Told how many windows have been read since.

  Returns:
    Plain numbers and arrays. Under the names of `probes.Attention`, means over
    all tokens, [L, N]; under `uniform`, what attention to all keys alike would
    have, each a number a layer; `sink_rate` [L]; `stable_rank`, each [L];
    `loss` in nats and `perplexity`, of every token but the first of a window,
    null where there is none; `num_tokens`, `num_targets`, `num_windows`;
    `probes` of each name a mean over windows, [L], [L, N] or [L, N, 4]. What
    is of attention weights is NaN in layers that have none.

  Raises:
    UserError: As `check_ids`.
  """
  check_ids(ids, config)
  model = models.Transformer(config)
  windows = cut(ids.shape, window)
  if window >= ids.shape[1]:
    # Few programs for texts of any length: what is behind them is padding.
    window = sizes.window(ids.shape[1], config)
  total, uniform = None, None
  for part, tokens, lengths in _calls(ids, windows, window, config):
    reading = probes.read(
        model,
        params,
        tokens,
        lengths,
        with_logits=write_logits is not None,
        names=names,
    )
    if write_logits is not None:
      logits = np.asarray(reading.logits)
      for one, found in zip(part, logits, strict=False):
        write_logits(one.row, one.start, found[: one.stop - one.start])
    sums = jax.tree.map(np.float64, reading._replace(logits=None))
    total = sums if total is None else jax.tree.map(np.add, total, sums)
    more = _uniform(config, window, lengths)
    uniform = more if uniform is None else jax.tree.map(np.add, uniform, more)
    on_progress(len(part))
  assert total is not None and uniform is not None, "a text has a window"
  return _summary(total, uniform, params, len(windows), config)


def _calls(
    ids: Int[np.ndarray, "B T"],
    windows: list[Window],
    window: int,
    config: configs.TransformerConfig,
) -> Iterator[tuple[list[Window], Int[Array, "B T"], Int[Array, "B"]]]:
  """Puts windows together to arrays of one shape, the last filled up.

  Few windows are read one by one: their number makes no program of its own.
  """
  size = window * max(config.num_heads * window, config.vocab_size)
  num_rows = max(1, _CALL_SIZE // size)
  if num_rows > len(windows):
    num_rows = 1
  for first in range(0, len(windows), num_rows):
    part = windows[first : first + num_rows]
    tokens = np.zeros((num_rows, window), np.int32)
    lengths = np.zeros(num_rows, np.int32)
    for i, one in enumerate(part):
      lengths[i] = one.stop - one.start
      tokens[i, : lengths[i]] = ids[one.row, one.start : one.stop]
    yield part, jnp.asarray(tokens), jnp.asarray(lengths)


def _uniform(
    config: configs.TransformerConfig, window: int, lengths: Int[Array, "B"]
) -> probes.Attention:
  """Sums over tokens of uniform attention's measures, each [L]."""
  # How many texts have a token at each position.
  weights = (np.arange(window)[None] < np.asarray(lengths)[:, None]).sum(axis=0)
  layers = []
  for layer in range(config.num_layers):
    visible = probes.count_visible(window, config.window_of(layer))
    rows = probes.uniform(visible)
    layers.append(jax.tree.map(lambda row: np.float64(row) @ weights, rows))
  return jax.tree.map(lambda *values: np.stack(values), *layers)


def _summary(
    total: probes.Reading,
    uniform: probes.Attention,
    params: PyTree,
    num_windows: int,
    config: configs.TransformerConfig,
) -> dict[str, Any]:
  mean = jax.tree.map(
      lambda x: probes.marked(x / total.num_tokens, config), total.attention
  )
  num_targets = int(total.num_targets)
  loss = float(total.loss) / num_targets if num_targets else None
  return {
      **mean._asdict(),
      "uniform": (
          jax.tree.map(lambda x: x / total.num_tokens, uniform)._asdict()
      ),
      "sink_rate": probes.sink_rate(mean.sink_mass),
      "stable_rank": probes.stable_ranks(params),
      "loss": loss,
      "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
      "num_tokens": int(total.num_tokens),
      "num_targets": num_targets,
      "num_windows": num_windows,
      "probes": probes.marked_by_name(named.means(total.named), config),
  }
