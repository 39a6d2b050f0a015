"""Policies against budgets: quality, what is kept, bytes and time.

Every policy and budget reads the same examples, so that differences to the full
cache are taken text by text. Intervals are Student's t at 95 % over the texts
of all seeds.

Letters: B texts, T tokens, L layers.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PyTree
import numpy as np

from joma.inference import generate
from joma.inference.cache import kv_cache as kv_cache_lib
from joma.inference.evaluation import evaluate
from joma.inference.evaluation import evaluate_caches
from joma.inference.evaluation import evaluate_config
from joma.inference.evaluation import evaluate_data
from joma.inference.evaluation import tasks
from joma.inference.evaluation.protocols import saved_rows
from joma.systems.cache_policies import names as policy_names
from joma.transformer import config as configs
from joma.transformer import layer_hooks
from joma.transformer import model as models
from joma.transformer.text import tokenizer as tokenizer_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import intervals
from scansnap_jax.experiment import progress

Config = evaluate_config.EvaluateConfig
_WORD_SLACK = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
  """A model to evaluate.

  Attributes:
    model: The Transformer.
    params: Its parameters.
    tokenizer: None where it reads symbols.
  """

  model: models.Transformer
  params: PyTree
  tokenizer: tokenizer_lib.Tokenizer | None = None


def check(config: Config, subject: Subject) -> None:
  """Raises UserError where a policy, a budget or the length cannot be.

  So it does where a cache would pass over a system of the model.
  """
  for name in evaluate_caches.names_of(config, subject.model.config):
    for slots in config.capacities():
      make = functools.partial(
          evaluate_caches.make,
          config,
          subject.model.config,
          name,
          slots,
          1,
      )
      jax.eval_shape(make)
      generate.check_follows(subject.model, 1, make)
  positions = np.zeros((1, config.length), np.int32)
  evaluate.check(subject.model, positions, 1)


def measure(
    config: Config,
    subject: Subject,
    data_dir: str | None = None,
    on_progress: Callable[[int], None] = lambda num_readings: None,
    workdir: pathlib.Path | None = None,
) -> dict[str, list[dict[str, Any]]]:
  """Evaluates all tasks, policies and budgets.

  Args:
    config: Settings.
    subject: The model.
    data_dir: Where a corpus is looked for.
    on_progress: Told how many batches have been read since.
    workdir: Rows are kept there as they are measured, and what is there is not
      measured again; None keeps none.

  Returns:
    By task, rows: `policy`, `budget` (1 for full), `slots`, `quality` with
    `mean`, `low` and `high` (accuracy, or loss in nats), `perplexity` and
    `ratio` to the full cache likewise for perplexity, `recall` and
    `recall_by_layer` (of layers without windows) and `gold_in_sinks` for
    others, `kept_mass`,
    `step_bytes` of the cost model, `cache_bytes`, `ms_per_step` (of all batches
    but the first; None if there is no other, or a policy draws), `num_draws`
    of such a policy if there are several, `compilations`, `num_texts`;
    `failed`, why its quality is NaN, or None.

  Raises:
    UserError: As `check`, or if a text cannot be had, or every policy fails.
  """
  check(config, subject)
  # All texts before the first is read: one that is missing costs no hour.
  of_tasks = {
      task: batches(config, subject, task, data_dir) for task in config.tasks
  }
  found = {}
  for task, read in of_tasks.items():
    is_text = task == evaluate_config.PERPLEXITY
    ask = functools.partial(_perplexity if is_text else _answers, config)
    rows = saved_rows.SavedRows(workdir, {"task": task})
    found[task] = _grid(config, subject, read, ask, on_progress, rows)
    if is_text:
      _compare(found[task])
    for row in found[task]:
      del row["values"]
  return found


def batches(
    config: Config, subject: Subject, task: str, data_dir: str | None
) -> list[Any]:
  """Returns what a task reads, a batch for each seed."""
  if task == evaluate_config.PERPLEXITY:
    if subject.tokenizer is None:
      raise errors.UserError(
          "tasks=perplexity reads a text: give --model, a folder with a"
          " tokenizer."
      )
    return evaluate_data.texts(config, subject.tokenizer, data_dir)
  draw = evaluate_data.drawer(
      config, task, subject.model.config.vocab_size, subject.tokenizer
  )
  return tasks.stack_alike([
      evaluate_data.examples(config, draw, config.first_seed + seed)
      for seed in range(config.num_seeds)
  ])


def num_readings(
    config: Config, shape: configs.TransformerConfig | None = None
) -> int:
  """Batches that `measure` reads."""
  names = config.all_policies()
  if shape is not None:
    names = evaluate_caches.names_of(config, shape)
  settings = 1 + (len(names) - 1) * len(config.capacities())
  seeds = 1 if config.texts else config.num_seeds
  return settings * seeds * len(config.tasks)


def _grid(
    config: Config,
    subject: Subject,
    batches: list[Any],
    ask: Callable[[Subject, Any, Any], dict[str, Any]],
    on_progress: Callable[[int], None],
    saved: saved_rows.SavedRows,
) -> list[dict[str, Any]]:
  settings = [(policy_names.REFERENCE, 1.0, None)]
  for name in evaluate_caches.names_of(config, subject.model.config)[1:]:
    settings += [
        (name, budget, slots) for slots, budget in config.capacities().items()
    ]
  rows = []
  # All batches are of one shape.
  first = batches[0]
  shape = (first[0].tokens if isinstance(first, tuple) else first).shape
  more = max(_num_new(first, subject) - 1, 0)
  for name, budget, slots in settings:
    number = slots or shape[1] + more
    row = saved.find(policy=name, slots=number)
    if row is None:
      row = _setting(
          config, subject, batches, ask, (name, number, more), on_progress
      )
      progress.say(f"{name} with {number} slots: {np.mean(row['values']):.4g}")
      saved.add(row, policy=name, slots=number)
    else:
      on_progress(len(batches))
    rows.append({"policy": name, "budget": budget, "slots": number, **row})
  if all(row["failed"] for row in rows):
    raise errors.UserError(
        f"no policy can be evaluated: {rows[0]['failed']}. The model's weights"
        " or activations are not finite."
    )
  return rows


def _setting(
    config: Config,
    subject: Subject,
    batches: list[Any],
    ask: Callable[[Subject, Any, Any], dict[str, Any]],
    setting: tuple[str, int, int],
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
  """The row of a policy, its slots, and the tokens beyond the text."""
  name, number, more = setting
  first = batches[0]
  shape = (first[0].tokens if isinstance(first, tuple) else first).shape
  parts, before = [], _num_compiled()
  policy = policy_names.parse(name)
  for seed, batch in enumerate(batches):
    caches = evaluate_caches.make(
        config, subject.model.config, name, number, shape[0], seed, more
    )
    parts.append(ask(subject, batch, caches))
    on_progress(1)
  seen, times = _joined(parts)
  compilations = _num_compiled() - before
  # One draw has no interval of its own; its texts have.
  num_draws = len(batches) if policy.draws and len(batches) > 1 else None
  row = _sum_up(seen, num_draws)
  row["gold_in_sinks"] = _gold_in_sinks(batches, policy.num_sinks)
  row |= evaluate_caches.cost(config, subject.model, name, number, shape)
  row["compilations"] = compilations
  # Each draw of a policy is a program of its own.
  is_timed = bool(times) and not policy.draws and not np.isnan(times).any()
  row["ms_per_step"] = float(np.median(times)) if is_timed else None
  row["failed"] = _failed(seen["quality"])
  return row


def _joined(
    parts: list[dict[str, Any]],
) -> tuple[dict[str, np.ndarray], list[float]]:
  """What was seen of all texts; milliseconds a step of each timed batch."""
  # The first batch compiles.
  times = [part.pop("ms_per_step") for part in parts][1:]
  joined = lambda key: np.concatenate([np.asarray(part[key]) for part in parts])
  return {key: joined(key) for key in parts[0]}, times


def _failed(values: Float[np.ndarray, "B"]) -> str | None:
  """Says in how many texts there is no quality; None if there always is."""
  number = int(np.count_nonzero(~np.isfinite(values)))
  if not number:
    return None
  return f"logits are NaN or infinite in {number} of {len(values)} texts"


def _gold_in_sinks(batches: list[Any], num_sinks: int) -> float | None:
  """Share of the gold tokens among the first ones, which never leave."""
  if not isinstance(batches[0], tuple):
    return None
  gold = np.concatenate([batch.gold.ravel() for batch, _ in batches])
  return float((gold[gold >= 0] < num_sinks).mean())


def _num_compiled() -> int:
  """Programs that were compiled for reading and generating."""
  programs: Any = (evaluate.read, evaluate.read_at_once, generate.decode_step)
  return sum(program._cache_size() for program in programs)


def _sum_up(
    seen: Mapping[str, np.ndarray], num_draws: int | None
) -> dict[str, Any]:
  """Means and intervals; texts for which a policy drew alike are one draw."""
  values = seen["quality"]
  # A list, as a row that was saved has it.
  row: dict[str, Any] = {"values": values.tolist(), "num_texts": len(values)}
  row["num_draws"] = num_draws
  if num_draws is not None:
    seen = {
        key: np.stack([part.mean(axis=0) for part in np.split(x, num_draws)])
        for key, x in seen.items()
    }
  row["quality"] = _interval(seen["quality"])
  if "recall" in seen:
    by_layer = seen["recall"]  # [B, L]
    row["recall"] = _interval(by_layer.mean(axis=1))
    row["recall_by_layer"] = by_layer.mean(axis=0).tolist()
  mass = seen["kept_mass"]
  row["kept_mass"] = None if np.isnan(mass).any() else _interval(mass)
  return row


def _interval(values: Float[np.ndarray, "B"]) -> dict[str, float]:
  # Of one text there is no interval; a policy that failed is a row of NaN, and
  # what was measured of the others is kept.
  if len(values) < 2 or not np.isfinite(values).all():
    mean = float(values.mean())
    return dict(mean=mean, low=mean, high=mean)
  return intervals.interval(values)


def _answers(
    config: Config,
    subject: Subject,
    batch: tuple[tasks.Batch, list[tasks.Example]],
    caches: PyTree,
) -> dict[str, Any]:
  """Accuracy and recall of each example of a batch."""
  stacked, examples = batch
  seen = evaluate.answer(
      subject.model,
      subject.params,
      stacked,
      caches,
      reading=config.reading,
      num_new=_num_new(batch, subject),
  )
  is_asked = stacked.targets >= 0
  if examples[0].answers and subject.tokenizer is not None:
    quality = np.array([
        _share_said(subject.tokenizer.decode(ids), example.answers)
        for ids, example in zip(seen.generated, examples, strict=True)
    ])
  else:
    is_right = (seen.predicted == stacked.targets) & is_asked
    quality = is_right.sum(axis=1) / is_asked.sum(axis=1)
  quality = np.where(seen.is_finite, quality, np.nan)
  recall = np.where(is_asked[..., None], seen.recall, np.nan)
  last = stacked.lengths + seen.generated.shape[1] - 1
  # Layers with windows cannot see far, whatever they keep.
  shape = subject.model.config
  far = [
      layer
      for layer in range(shape.num_layers)
      if shape.window_of(layer) is None
  ]
  recall = recall[..., far] if far else recall
  return {
      "ms_per_step": seen.ms_per_step,
      "quality": quality,
      "recall": _mean_of_numbers(recall),
      "kept_mass": _kept_mass(seen.kv_cache, last),
  }


def _mean_of_numbers(
    recall: Float[np.ndarray, "B T *l"],
) -> Float[np.ndarray, "B *l"]:
  """Means over tokens; NaN where there is no number, as of a mixer's state."""
  count = np.isfinite(recall).sum(axis=1)
  total = np.nansum(recall, axis=1) / np.maximum(count, 1)
  return np.where(count > 0, total, np.nan)


def _num_new(batch: Any, subject: Subject) -> int:
  """Tokens to generate: some more than the answer has."""
  if not isinstance(batch, tuple):
    return 0
  stacked, examples = batch
  if examples[0].answers and subject.tokenizer is not None:
    return stacked.num_new + _WORD_SLACK
  return 1


def _share_said(text: str, answers: tuple[str, ...]) -> float:
  return float(np.mean([answer in text for answer in answers]))


def _perplexity(
    config: Config,
    subject: Subject,
    ids: Int[np.ndarray, "B T"],
    caches: PyTree,
) -> dict[str, Any]:
  """Mean loss of each text behind the first tokens."""
  evaluate.check(subject.model, ids, 0)
  lengths = np.full(len(ids), ids.shape[1], np.int32)
  gold = np.full((*ids.shape, 1), -1, np.int32)
  seen, ms_per_step = evaluate.timed_read(
      subject.model,
      subject.params,
      ids,
      np.zeros_like(lengths),
      lengths,
      gold,
      caches,
  )
  losses = np.asarray(seen.losses, np.float64)[:, config.skip - 1 : -1]
  return {
      "ms_per_step": ms_per_step,
      "quality": losses.mean(axis=1),
      "kept_mass": _kept_mass(seen.kv_cache, lengths),
  }


def _kept_mass(kv_cache: PyTree, position: Int[np.ndarray, "B"]) -> np.ndarray:
  """Share of attention so far that is on what is kept, mean over layers.

  NaN where a layer's cache does not know it.
  """
  masses = []
  for cache in map(layer_hooks.inner, kv_cache):
    is_slots = isinstance(cache, kv_cache_lib.SlotCache)
    found = kv_cache_lib.stats(cache, jnp.asarray(position)) if is_slots else {}
    if "kept_mass" not in found:
      return np.full(len(position), np.nan)
    masses.append(np.asarray(found["kept_mass"]).mean(axis=1))
  return np.mean(masses, axis=0)


def _compare(rows: list[dict[str, Any]]) -> None:
  """Adds perplexity, and its ratio to the full cache's, text by text."""
  full = np.array(rows[0]["values"])
  for row in rows:
    exp = lambda parts: {k: float(np.exp(v)) for k, v in parts.items()}
    row["perplexity"] = exp(row["quality"])
    ratios = np.array(row["values"]) - full
    if row["num_draws"] is not None:
      parts = np.split(ratios, row["num_draws"])
      ratios = np.array([part.mean() for part in parts])
    row["ratio"] = exp(_interval(ratios))
