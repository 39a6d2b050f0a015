"""Do rotary positions reach beyond the window of training, and which?

A model is trained on texts of L tokens and reads texts of s L: as it is; with
position interpolation (https://arxiv.org/abs/2306.15595), NTK-aware and YaRN
frequencies (https://arxiv.org/abs/2309.00071), by a factor s and without any
training; and after a short fine-tuning at s L tokens. Losses are by position.

Letters: P positions s L, E bins of positions, B texts, T tokens.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from joma.transformer import model as models
from joma.transformer.layers import cross_entropy
from joma.transformer.rope import extension_config
from joma.transformer.rope.config import RopeConfig
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.training import layouts
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from joma.transformer.training import train as train_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import intervals

# Texts that are read at once.
_NUM_ROWS = 25


def measure(
    config: extension_config.RopeExtensionConfig,
    workdir: pathlib.Path,
    on_progress: Callable[[int], None] = lambda num_steps: None,
) -> dict[str, Any]:
  """Trains, extends and reads.

  Args:
    config: Settings.
    workdir: Where training keeps its checkpoints; it continues from them.
    on_progress: Told how many steps of training have been taken since.

  Returns:
    `positions` [E], middles of the bins, from 1; `curves`, by name, each with
    `loss` [E] in nats, `error` [E], the standard error of its mean over texts,
    and `within` and `beyond`, mean losses of positions L / 2 to L and after L;
    `seen`, the loss of the trained model at positions L / 2 to L, which is what
    reading on should not exceed; `corpus`, facts; `finding`, a sentence.

  Raises:
    UserError: If the validation text is too short, or as training.
    Stopped: As training.
  """
  corpus = corpus_lib.load(config.corpus)
  texts = _texts(config, corpus)
  run = train_lib.train_and_evaluate(
      config.training, corpus, workdir, on_progress=on_progress
  )
  params = run.params
  curves = {}
  for name, rope in extensions(config).items():
    read = _reader(config, rope)
    curves[name] = _curve(config, read(params, texts))
    if name in ("plain", "linear"):
      tuned = fine_tune(config.tuning, rope, params, corpus)
      curves[f"{name}_tuned"] = _curve(config, read(tuned, texts))
  width, length = config.bin_size, texts.shape[1] - 1
  summary = {
      "positions": np.arange(0, length, width) + (width + 1) / 2,
      "window": config.window,
      "factor": config.factor,
      "tuning_steps": config.tuning_steps,
      "num_texts": len(texts),
      "curves": curves,
      "seen": curves["plain"]["within"],
      "corpus": corpus.facts(),
  }
  return {"finding": _finding(summary), **summary}


def extensions(
    config: extension_config.RopeExtensionConfig,
) -> dict[str, RopeConfig]:
  """The rotary frequencies that are compared, by name."""
  factor = float(config.factor)
  return {
      "plain": RopeConfig(),
      "linear": RopeConfig(rope_type="linear", factor=factor),
      "ntk": RopeConfig(rope_type="ntk", factor=factor),
      "yarn": RopeConfig(
          rope_type="yarn", factor=factor, original_max_len=config.window
      ),
  }


def fine_tune(
    config: lm_config.LmConfig,
    rope: RopeConfig,
    params: PyTree,
    corpus: corpus_lib.Corpus,
) -> PyTree:
  """Trains on longer texts with other frequencies, from given parameters.

  Raises:
    UserError: Training diverged.
  """
  model = dataclasses.replace(config.model, rope=rope)
  config = dataclasses.replace(config, model=model)
  text = train_lib.make_batches(config, corpus)
  num_steps = train_lib.num_steps(config, text.steps_per_epoch)
  task = lm_step.make_task(config, num_steps, text.steps_per_epoch)
  state = lm_step.TrainState(
      jnp.zeros((), jnp.int32), params, task.optimizer.init(params)
  )
  drawn = [text.batch(config.seed, step) for step in range(num_steps)]
  batches = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
  train = jax.jit(functools.partial(lm_step.train, task=task))
  state, losses = train(state, batches)
  is_good = np.append(np.isfinite(losses), layouts.is_finite(state.params))
  if not is_good.all():
    raise errors.UserError(
        f"fine-tuning diverged at step {int(np.argmin(is_good))}: use a smaller"
        " tuning_lr, in a new workdir."
    )
  return state.params


def position_losses(
    model: models.Transformer, params: PyTree, texts: Int[Array, "B T"]
) -> Float[Array, "B P"]:
  """Cross-entropy in nats of every token but the first, by text."""
  logits = model.apply({"params": params}, texts[:, :-1])
  return cross_entropy.token_losses(logits, texts[:, 1:])


def _texts(
    config: extension_config.RopeExtensionConfig,
    corpus: corpus_lib.Corpus,
) -> Int[np.ndarray, "B T"]:
  """Takes texts of s L tokens and the next one, side by side."""
  length = config.factor * config.window + 1
  num_texts = min(config.num_texts, len(corpus.valid) // length)
  if num_texts < 2:
    raise errors.UserError(
        f"The validation text of corpus={config.corpus} has"
        f" {len(corpus.valid)} tokens: not two texts of {length}."
    )
  ids = np.asarray(corpus.valid[: num_texts * length], np.int32)
  return ids.reshape(num_texts, length)


def _reader(
    config: extension_config.RopeExtensionConfig, rope: RopeConfig
) -> Callable[[PyTree, Int[np.ndarray, "B T"]], Float[np.ndarray, "B P"]]:
  """Compiles `position_losses` of a kind, a few texts at a time."""
  model = dataclasses.replace(config.training.model, rope=rope)
  compiled = jax.jit(
      functools.partial(position_losses, models.Transformer(model))
  )

  def read(params: PyTree, texts: np.ndarray) -> np.ndarray:
    num_parts = -(-len(texts) // _NUM_ROWS)
    padded = np.resize(texts, (num_parts * _NUM_ROWS, texts.shape[1]))
    parts = [
        compiled(params, jnp.asarray(part))
        for part in np.split(padded, num_parts)
    ]
    return np.concatenate(parts)[: len(texts)].astype(np.float64)

  return read


def _curve(
    config: extension_config.RopeExtensionConfig,
    losses: Float[np.ndarray, "B P"],
) -> dict[str, Any]:
  num_texts = len(losses)
  bins = losses.reshape(num_texts, -1, config.bin_size).mean(axis=-1)
  window = config.window
  interval = intervals.interval(bins)
  return {
      "loss": interval["mean"],
      "low": interval["low"],
      "high": interval["high"],
      "error": bins.std(axis=0, ddof=1) / num_texts**0.5,
      "within": losses[:, window // 2 : window].mean(),
      "beyond": losses[:, window:].mean(),
  }


def _finding(summary: Mapping[str, Any]) -> str:
  perplexity = lambda name: f"{np.exp(summary['curves'][name]['beyond']):.2f}"
  return (
      f"Perplexity of a model trained on {summary['window']} tokens:"
      f" {np.exp(summary['seen']):.2f} on the second half of its window. From"
      f" there to {summary['factor']} times the window:"
      f" {perplexity('plain')} as it is, {perplexity('linear')} with position"
      f" interpolation, {perplexity('ntk')} NTK-aware, {perplexity('yarn')}"
      f" YaRN; after {summary['tuning_steps']} steps of fine-tuning"
      f" {perplexity('linear_tuned')} with position interpolation and"
      f" {perplexity('plain_tuned')} without."
  )
