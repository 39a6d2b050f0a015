"""The training loop of language models.

`train_and_evaluate` trains one run (experiment/loop.py) on a corpus. A batch is
a pure function of (seed, step), and so is what is dropped: a restart needs the
state alone, and continues bitwise.

Letters: S steps, E rows, L layers, M maps, N heads, T positions.
"""

from collections.abc import Callable
import pathlib
import time
from typing import Any, NamedTuple

import jax
from jaxtyping import Float, Int, PyTree
import numpy as np

from joma.transformer.text import batches as batches_lib
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.training import layouts
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import loop
from scansnap_jax.experiment import preemption


class History(NamedTuple):
  """What was recorded; NaN where it is still to come, or was not asked for.

  Attributes:
    losses: Batch loss in nats before each update.
    valid_loss: Mean over the validation text at each row, the first one before
      training.
    entropy: Of attention, see `lm_step.Probes`.
    effective_support: Likewise.
    sink_rate: Likewise.
    stable_rank: Likewise.
    attn_maps: Of one sequence of the training text, at `map_steps`.
  """

  losses: Float[np.ndarray, "1 S"]
  valid_loss: Float[np.ndarray, "1 E"]
  entropy: Float[np.ndarray, "1 E L"]
  sink_rate: Float[np.ndarray, "1 E L"]
  effective_support: Float[np.ndarray, "1 E L"]
  stable_rank: Float[np.ndarray, "1 E L"]
  attn_maps: Float[np.ndarray, "1 M L N T T"]


class Result(NamedTuple):
  """A finished run.

  Attributes:
    steps: Of the rows, from 0 to the last.
    map_steps: Of the maps.
    history: What was recorded.
    params: Final parameters.
  """

  steps: Int[np.ndarray, "E"]
  map_steps: tuple[int, ...]
  history: History
  params: PyTree


def train_and_evaluate(
    config: lm_config.LmConfig,
    corpus: corpus_lib.Corpus,
    workdir: pathlib.Path,
    *,
    on_progress: Callable[[int], None] = lambda num_steps: None,
    on_map: Callable[[int, PyTree], None] | None = None,
) -> Result:
  """Trains and evaluates a run, from its last checkpoint on.

  Args:
    config: The run.
    corpus: What to read; `config.corpus` is only its name.
    workdir: Where `metrics.jsonl` and `checkpoints/` go.
    on_progress: Told how many steps have been taken since.
    on_map: Given the step and the parameters, on the host, at `map_steps`; a
      run that continues comes to a step again if it was stopped close to it.

  Returns:
    The run.

  Raises:
    UserError: If the corpus does not fit the model, batches do not fit the
      devices, the run diverges, or the checkpoints are of another config.
    Stopped: If SIGTERM or Ctrl-C asked to stop; the state has been saved.
  """
  check_vocabulary(config, corpus)
  text = make_batches(config, corpus)
  steps = num_steps(config, text.steps_per_epoch)
  run = _Run(config, corpus, text, steps, on_map)
  setting = loop.Setting(
      name="lm",
      tags={},
      num_steps=steps,
      log_every=config.log_every,
      checkpoint_every=config.checkpoint_every,
      layout=run.layout,
      init=run.init,
      advance=run.advance,
      record=run.record,
      describe=lambda _: f"lr={config.lr:g}, seed={config.seed}",
      rates="lr",
  )
  rows = setting.evaluation_steps
  with preemption.stop_requests() as stop_requested:
    history, params = loop.run(
        setting,
        _start_history(config, steps, len(rows), len(run.map_steps)),
        workdir,
        on_progress=on_progress,
        stop_requested=stop_requested,
    )
  params = jax.tree.map(lambda leaf: leaf[0], params)
  return Result(rows, run.map_steps, history, params)


def num_steps(config: lm_config.LmConfig, steps_per_epoch: int) -> int:
  """Steps of a run, however its length is given."""
  return config.num_steps or (config.num_epochs or 0) * steps_per_epoch


def check_vocabulary(
    config: lm_config.LmConfig, corpus: corpus_lib.Corpus
) -> None:
  """Raises UserError if the model has no embedding for some token."""
  if config.model.vocab_size < corpus.vocab_size:
    raise errors.UserError(
        f"model.vocab_size={config.model.vocab_size} is less than the"
        f" {corpus.vocab_size} tokens of corpus={config.corpus} with"
        f" tokenizer={config.tokenizer}: give it {corpus.vocab_size} or more."
    )


def make_batches(
    config: lm_config.LmConfig, corpus: corpus_lib.Corpus
) -> batches_lib.Batches:
  """The training batches of a run."""
  layouts_of = {
      "random": batches_lib.RandomBatches,
      "sequential": batches_lib.SequentialBatches,
  }
  make = layouts_of[config.batch_layout]
  return make(corpus.train, config.batch_size, config.seq_len)


class _Run:
  """The compiled functions of a run and its data; no state of training."""

  def __init__(
      self,
      config: lm_config.LmConfig,
      corpus: corpus_lib.Corpus,
      text: batches_lib.Batches,
      num_steps: int,
      on_map: Callable[[int, PyTree], None] | None,
  ):
    self._config, self._text, self._on_map = config, text, on_map
    self.layout = layouts.make_layout(config)
    self.map_steps = tuple(s for s in config.map_steps if s <= num_steps)
    self._num_steps = num_steps
    self._task = lm_step.make_task(config, num_steps, text.steps_per_epoch)
    compiled = lambda fn, **how: self.layout.map(fn, task=self._task, **how)
    self._train = compiled(lm_step.train, donate=True)
    self._evaluate = compiled(lm_step.evaluate)
    self._probe = compiled(lm_step.probe)
    self._attn_maps = compiled(lm_step.attn_maps)
    rows = max(1, config.batch_size // self.layout.num_parts)
    self._valid = valid_batches(config, corpus, rows * self.layout.num_parts)
    self._tokens_per_sec: float | None = None
    self._lengths: set[int] = set()  # Of intervals that are compiled.

  def init(self) -> lm_step.TrainState:
    return self.layout.init(lambda: lm_step.init(self._task))

  def advance(self, state, start: int, end: int):
    before = self._observe(state.params, 0) if start == 0 else {}
    batches = self._draw(range(start, end))
    started = time.monotonic()
    state, losses = self._train(state, batches)
    losses = jax.block_until_ready(losses)
    seconds = time.monotonic() - started
    num_tokens = batches.weights.sum()
    is_compiled = end - start in self._lengths
    self._tokens_per_sec = num_tokens / seconds if is_compiled else None
    self._lengths.add(end - start)
    return state, losses, (before, self._observe(state.params, end))

  def _draw(self, steps: range) -> batches_lib.Batch:
    seed = self._config.seed
    return _stack([self._text.batch(seed, step) for step in steps])

  def _observe(self, params, step: int) -> dict[str, Any]:
    """What is looked at after so many steps."""
    number = self._config.probe_batches or len(self._valid.weights)
    some = jax.tree.map(lambda leaf: leaf[:number], self._valid)
    seen = {"probes": self._probe(params, some)}
    is_last = step == self._num_steps
    if step % self._config.eval_every == 0 or is_last:
      seen["valid_loss"] = self._evaluate(params, self._valid)
    if step in self.map_steps:
      number = self._config.map_batch
      batch = self._draw(range(number, number + 1))
      seen["attn_maps"] = self._attn_maps(params, batch)
      if self._on_map is not None:
        gathered = self.layout.gather(params)
        self._on_map(step, jax.tree.map(lambda leaf: leaf[0], gathered))
    return seen

  def record(
      self, history: History, seen: dict[str, Any], evaluation: int
  ) -> list[dict[str, Any]]:
    """Keeps what was seen at a row; returns its metrics."""
    row: dict[str, Any] = {}
    start, end = self._interval(evaluation)
    if end > start:
      row["train_loss"] = history.losses[0, start:end].mean()
      if self._tokens_per_sec is not None:
        row["tokens_per_sec"] = self._tokens_per_sec
    if "valid_loss" in seen:
      history.valid_loss[:, evaluation] = seen["valid_loss"]
      row["valid_loss"] = seen["valid_loss"][0]
    for name, values in seen["probes"]._asdict().items():
      getattr(history, name)[:, evaluation] = values
      for layer, value in enumerate(values[0]):
        row[f"{name}/layer_{layer}"] = value
    if "attn_maps" in seen:
      history.attn_maps[:, self.map_steps.index(end)] = seen["attn_maps"]
    return [row]

  def _interval(self, evaluation: int) -> tuple[int, int]:
    """First step and end of the interval that a row closes."""
    every = self._config.log_every
    end = min(evaluation * every, self._num_steps)
    return max(0, (evaluation - 1) * every), end


def valid_batches(
    config: lm_config.LmConfig, corpus: corpus_lib.Corpus, num_rows: int
) -> batches_lib.Batch:
  """The validation text as batches of so many rows, leaves [_, num_rows, T].

  It is cut as the papers' code cuts it, into `eval_batch_size` columns and
  these into rows of T; which rows are computed together does not matter.
  """
  text = batches_lib.evaluation(
      corpus.valid, batch_size=config.eval_batch_size, seq_len=config.seq_len
  )
  rows = jax.tree.map(lambda *leaves: np.concatenate(leaves), *text)
  return jax.tree.map(lambda leaf: layouts.split_evenly(leaf, num_rows), rows)


def _stack(batches: list[batches_lib.Batch]) -> batches_lib.Batch:
  return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def _start_history(
    config: lm_config.LmConfig, num_steps: int, num_rows: int, num_maps: int
) -> History:
  empty = lambda *shape: np.full((1, *shape), np.nan, np.float32)
  model = config.model
  maps = (num_maps, model.num_layers, model.num_heads, config.seq_len)
  return History(
      losses=empty(num_steps),
      valid_loss=empty(num_rows),
      entropy=empty(num_rows, model.num_layers),
      sink_rate=empty(num_rows, model.num_layers),
      effective_support=empty(num_rows, model.num_layers),
      stable_rank=empty(num_rows, model.num_layers),
      attn_maps=empty(*maps, config.seq_len),
  )
