"""The training loop of language models.

`train_and_evaluate` trains one run on a corpus. A batch is a pure function of
(seed, step), and so is what is dropped: a restart needs the state alone, and
continues bitwise.

Letters: E rows, L layers, M maps, N heads, T positions.
"""

from collections.abc import Callable
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
from jaxtyping import Float, Int, PyTree
import numpy as np

from joma.transformer import config as configs
from joma.transformer import layer_hooks
from joma.transformer.text import batches as batches_lib
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.training import divergence
from joma.transformer.training import init as init_lib
from joma.transformer.training import layouts
from joma.transformer.training import lm_config
from joma.transformer.training import lm_probes
from joma.transformer.training import lm_step
from joma.transformer.training import observe
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import loop
from scansnap_jax.experiment import progress
from scansnap_jax.experiment.processes import preemption
from scansnap_jax.experiment.processes import profiling


class History(NamedTuple):
  """What was recorded; NaN where it is still to come, or was not asked for.

  Attributes:
    losses: Batch loss in nats before each update.
    valid_loss: Mean over the validation text at each row, the first one before
      training.
    entropy: Of attention, see `lm_probes.Probes`.
    effective_support: Likewise.
    sink_rate: Likewise.
    stable_rank: Likewise.
    attn_maps: Of one sequence of the training text, at `map_steps`.
    chunk_entropy: Of `entropy_chunk`; None without.
    named: Of `probes` that are asked for by name; None without.
  """

  losses: Float[np.ndarray, "num_steps"]
  valid_loss: Float[np.ndarray, "E"]
  entropy: Float[np.ndarray, "E L"]
  sink_rate: Float[np.ndarray, "E L"]
  effective_support: Float[np.ndarray, "E L"]
  stable_rank: Float[np.ndarray, "E L"]
  attn_maps: Float[np.ndarray, "M L N T T"]
  chunk_entropy: Float[np.ndarray, "E L"] | None = None
  named: dict[str, Float[np.ndarray, "E L"]] | None = None


class Result(NamedTuple):
  """A finished run.

  Attributes:
    steps: Of the rows, from 0 to the last.
    map_steps: Of the maps that were recorded.
    history: What was recorded.
    params: Final parameters.
    last_map: That of the last step, where it is not among `map_steps`; None
      where it is, or no maps are wanted.
  """

  steps: Int[np.ndarray, "E"]
  map_steps: tuple[int, ...]
  history: History
  params: PyTree
  last_map: Float[np.ndarray, "L N T T"] | None = None

  def maps(self) -> tuple[tuple[int, ...], Float[np.ndarray, "M L N T T"]]:
    """Steps and maps, those of the trained model among them."""
    if self.last_map is None:
      return self.map_steps, self.history.attn_maps
    maps = np.concatenate([self.history.attn_maps, self.last_map[None]])
    return (*self.map_steps, int(self.steps[-1])), maps


def train_and_evaluate(
    config: lm_config.LmConfig,
    corpus: corpus_lib.Corpus,
    workdir: pathlib.Path,
    *,
    on_progress: Callable[[int], None] = lambda num_steps: None,
    on_map: Callable[[int, PyTree], None] | None = None,
    profile: profiling.Steps | None = None,
) -> Result:
  """Trains and evaluates a run, from its last checkpoint on.

  Args:
    config: The run.
    corpus: What to read; `config.corpus` is only its name.
    workdir: Where `metrics.jsonl` and `checkpoints/` go.
    on_progress: Told how many steps have been taken since.
    on_map: Given the step and the parameters, on the host, at `map_steps`; a
      run that continues comes to a step again if it was stopped close to it.
    profile: Steps that are traced, below `profile/`.

  Returns:
    The run.

  Raises:
    UserError: If the corpus does not fit the model, batches do not fit the
      devices, the run diverges, or the checkpoints are of another config.
    Stopped: If SIGTERM or Ctrl-C asked to stop; the state has been saved.
  """
  check_vocabulary(config, corpus)
  text = make_batches(config, corpus)
  schedule = _make_schedule(config, text)
  steps = schedule.num_steps
  task = lm_step.make_task(config, steps, text.steps_per_epoch)
  layout = layouts.make_layout(config)
  init = lambda: layout.init(lm_step.init, task=task)
  train = _timed(layout.map(lm_step.train, donate=True, task=task))
  observer = observe.Observer(layout, task, corpus, text, steps, on_map)
  with (
      preemption.stop_requests() as stop_requested,
      _make_recorder(config, workdir) as recorder,
      profiling.Profiler(profile, workdir / "profile") as profiler,
  ):
    template = layout.to_restore(jax.eval_shape(init))
    start, saved, recorded = recorder.resume(
        template, _start_history(config, schedule, observer)
    )
    history = _only(recorded)  # What is written to it, `recorded` holds too.
    state = init() if start == 0 else layout.from_saved(saved)

    def restore() -> PyTree:
      saved = recorder.restore(template, recorded)
      return init() if saved is None else layout.from_saved(saved)

    guard = divergence.Guard(config, layout, recorder, restore)
    on_progress(start)
    for interval in schedule.intervals(start):
      is_first = interval.start == 0
      before = observer.observe(state.params, 0) if is_first else None
      batches = observe.draw(text, config.seed, interval.steps)
      limit = guard.limit(history.losses, interval.start)
      shared = (limit,) if config.on_nan == "skip" else ()
      profiler.begin(interval.start, interval.end)
      state, losses, tokens_per_sec = train(state, batches, *shared)
      profiler.finish(interval.end)
      history.losses[interval.steps] = losses = layout.gather(losses)
      mended = guard.mend(interval, state, losses, limit)
      state = mended.state
      after = observer.observe(state.params, interval.end)
      is_good = layouts.is_finite(_with_weights(after, config.model))
      recorder.check_finite(interval, recorded.losses, is_good)
      # Rows after the check: a run that diverged leaves none behind.
      record = functools.partial(_record, history, observer.map_steps)
      if before is not None:
        recorder.write(0, [record(before, 0, 0)])
      trained = _trained_row(losses, tokens_per_sec, mended.num_skipped)
      seen = record(after, interval.evaluation, interval.end)
      recorder.write(interval.end, [trained | seen], losses[-1:])
      if after.attn_maps is not None:
        recorder.draw(interval.end, "attn_maps", _picture(after.attn_maps))
      progress.show(loss=float(losses[-1]))
      on_progress(len(interval.steps))
      stop = preemption.on_any_process(stop_requested())
      # What was rolled back to is that of an earlier step: this one has it too.
      if stop or interval.is_saved or mended.is_rolled_back:
        saved = layout.to_save(state)
        is_finite = layouts.is_finite(saved.params)
        recorder.save(interval, saved, recorded, is_finite)
      if stop:
        recorder.stop(interval, steps)
  params = layout.gather(state.params)
  return Result(
      schedule.evaluation_steps,
      observer.map_steps,
      history,
      params,
      observer.last_map(state.params),
  )


def _with_weights(
    seen: observe.Observation, model: configs.TransformerConfig
) -> observe.Observation:
  """Leaves out layers whose mixer has no attention weights, only NaN."""
  layers = range(model.num_layers)
  has = [layer_hooks.of_layer(model, n).mixer is None for n in layers]
  return jax.tree.map(lambda leaf: leaf[has] if leaf.ndim else leaf, seen)


def metric_rows(result: Result) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl again, out of what was recorded.

  The file is for reading along, and anybody may have edited it; what was
  recorded has been checked with its checkpoint.

  Returns:
    One an evaluation: `step`, `train_loss` (the mean since the row before),
    `valid_loss` and `entropy/layer_0` and its like; None where nothing was
    measured.
  """
  history, steps, rows = result.history, result.steps, []
  known = lambda x: float(x) if np.isfinite(x) else None
  for e, step in enumerate(steps):
    probes = lm_probes.Probes(
        entropy=history.entropy[e],
        effective_support=history.effective_support[e],
        sink_rate=history.sink_rate[e],
        stable_rank=history.stable_rank[e],
    )
    row: dict[str, Any] = {"step": int(step)}
    row["train_loss"] = (
        known(divergence.mean_of(history.losses[steps[e - 1] : step]))
        if e
        else None
    )
    row["valid_loss"] = known(history.valid_loss[e])
    named = {n: curve[e] for n, curve in (history.named or {}).items()}
    for name, values in (probes._asdict() | named).items():
      for layer, value in enumerate(values):
        row[f"{name}/layer_{layer}"] = known(value)
    if history.chunk_entropy is not None:
      for layer, value in enumerate(history.chunk_entropy[e]):
        row[f"chunk_entropy/layer_{layer}"] = known(value)
    rows.append(row)
  return rows


def _make_schedule(
    config: lm_config.LmConfig, text: batches_lib.Batches
) -> loop.Schedule:
  return loop.Schedule(
      num_steps=num_steps(config, text.steps_per_epoch),
      log_every=config.log_every,
      checkpoint_every=config.checkpoint_every,
  )


def _make_recorder(
    config: lm_config.LmConfig, workdir: pathlib.Path
) -> loop.Recorder:
  return loop.Recorder(
      workdir,
      "lm",
      tags={},
      runs=[f"lr={config.lr:g}, seed={config.seed}"],
      rates="lr",
      refuses_nan=config.on_nan == "stop",
  )


def _picture(
    attn_maps: Float[np.ndarray, "L N T T"],
) -> Float[np.ndarray, "H W"]:
  """Maps side by side, a row a layer, each as bright as its largest weight."""
  highest = attn_maps.max(axis=(2, 3), keepdims=True)
  maps = attn_maps / np.maximum(highest, 1e-30)
  layers, heads, length, _ = maps.shape
  rows = maps.swapaxes(1, 2).reshape(layers * length, heads * length)
  return np.nan_to_num(rows)


def _timed(
    train: Callable[..., tuple[Any, Any]],
) -> Callable[..., tuple[Any, Any, float | None]]:
  """Adds tokens a second to what a training function returns.

  None where it may have been compiled meanwhile: a new number of steps is a new
  program.
  """
  lengths: set[int] = set()

  def timed(
      state: PyTree, batches: PyTree, *shared: Any
  ) -> tuple[PyTree, PyTree, float | None]:
    started = time.monotonic()
    state, losses = train(state, batches, *shared)
    losses = jax.block_until_ready(losses)
    seconds = time.monotonic() - started
    is_compiled = len(batches.weights) in lengths
    lengths.add(len(batches.weights))
    num_tokens = batches.weights.sum()
    rate = float(num_tokens / seconds) if is_compiled else None
    return state, losses, rate

  return timed


def num_steps(config: lm_config.LmConfig, steps_per_epoch: int) -> int:
  """Steps of a run, however its length is given."""
  return config.num_steps or (config.num_epochs or 0) * steps_per_epoch


def check_vocabulary(
    config: lm_config.LmConfig, corpus: corpus_lib.Corpus
) -> None:
  """Raises UserError if a token has no embedding, or no memory the model."""
  init_lib.check_memory(config.model)
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


def _start_history(
    config: lm_config.LmConfig,
    schedule: loop.Schedule,
    observer: observe.Observer,
) -> History:
  """An empty history as checkpoints hold it: below an axis of one run."""
  model, num_rows = config.model, len(schedule.evaluation_steps)
  empty = lambda *shape: np.full((1, *shape), np.nan, np.float32)
  of_layers = lambda: empty(num_rows, model.num_layers)
  maps = (len(observer.map_steps), model.num_layers, model.num_heads)
  curves = {name: of_layers() for name in observer.named}
  return History(
      losses=empty(schedule.num_steps),
      valid_loss=empty(num_rows),
      entropy=of_layers(),
      sink_rate=of_layers(),
      effective_support=of_layers(),
      stable_rank=of_layers(),
      attn_maps=empty(*maps, config.seq_len, config.seq_len),
      chunk_entropy=None if config.entropy_chunk is None else of_layers(),
      named=curves or None,
  )


def _only(recorded: History) -> History:
  """The history of the one run, views of what a checkpoint holds."""
  return jax.tree.map(lambda leaf: leaf[0], recorded)


def _trained_row(
    losses: Float[np.ndarray, "N"],
    tokens_per_sec: float | None,
    num_skipped: int,
) -> dict[str, Any]:
  """What the metric row of an interval says of its steps."""
  row: dict[str, Any] = {"train_loss": divergence.mean_of(losses)}
  if num_skipped:
    row["num_skipped"] = num_skipped
  if tokens_per_sec is not None:
    row["tokens_per_sec"] = tokens_per_sec
  return row


def _record(
    history: History,
    map_steps: tuple[int, ...],
    seen: observe.Observation,
    row: int,
    step: int,
) -> dict[str, Any]:
  """Keeps what was seen at a step; returns its metrics.

  Args:
    history: Filled at index `row`.
    map_steps: Steps of the maps.
    seen: What was seen.
    row: Index of the evaluation.
    step: Its step.
  """
  metrics: dict[str, Any] = {}
  if seen.valid_loss is not None:
    history.valid_loss[row] = metrics["valid_loss"] = seen.valid_loss
  history.entropy[row] = seen.probes.entropy
  history.effective_support[row] = seen.probes.effective_support
  history.sink_rate[row] = seen.probes.sink_rate
  history.stable_rank[row] = seen.probes.stable_rank
  named = seen.named or {}
  for name, values in named.items():
    (history.named or {})[name][row] = values
  for name, values in (seen.probes._asdict() | named).items():
    for layer, value in enumerate(values):
      metrics[f"{name}/layer_{layer}"] = value
  if history.chunk_entropy is not None and seen.chunk_entropy is not None:
    history.chunk_entropy[row] = seen.chunk_entropy
    for layer, value in enumerate(seen.chunk_entropy):
      metrics[f"chunk_entropy/layer_{layer}"] = value
  if seen.attn_maps is not None:
    history.attn_maps[map_steps.index(step)] = seen.attn_maps
  return metrics
