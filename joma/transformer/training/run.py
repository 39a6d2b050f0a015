"""The parts of `train_lm`: check, train, write."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import pathlib
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree
import numpy as np

from joma.transformer import layer_hooks
from joma.transformer.hf import config_json
from joma.transformer.hf import own_form
from joma.transformer.hf import pretrained
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.text import tokenizer as tokenizer_lib
from joma.transformer.training import lm_config
from joma.transformer.training import report
from joma.transformer.training import summary as summary_lib
from joma.transformer.training import train as train_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import inputs
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment import progress
from scansnap_jax.experiment.processes import devices
from scansnap_jax.experiment.processes import profiling


class Run(NamedTuple):
  """A finished run.

  Attributes:
    config: Its settings.
    corpus: What it read.
    result: What came of it.
  """

  config: lm_config.LmConfig
  corpus: corpus_lib.Corpus
  result: train_lib.Result


def check(
    config: lm_config.LmConfig,
    reference_csv: str | None,
    save_hf: bool,
    profile: str | None = None,
) -> None:
  """Raises UserError before the run for what would fail after it."""
  if profile is not None:
    profiling.parse(profile)
  layer_hooks.check_trainable(config.model)
  if reference_csv is not None:
    summary_lib.read_reference(json_file.local_path(reference_csv))
  if save_hf:
    try:
      config_json.family_of(config.model)
    except errors.UserError as error:
      raise errors.UserError(
          f"--save_hf: {error} Give --save_own in its place, which writes"
          " folders of that form."
      ) from error


def with_vocabulary(
    config: lm_config.LmConfig, workdir: str, data_dir: str | None
) -> tuple[lm_config.LmConfig, corpus_lib.Learned | None]:
  """Gives the model as many tokens as its tokenizer has.

  A run that goes on keeps the number that it began with.

  Args:
    config: The run.
    workdir: Its folder, which may be still to come.
    data_dir: Where the corpus may lie.

  Returns:
    The run, and the tokenizer where it had to be made for that.

  Raises:
    UserError: As `corpus.load`.
  """
  learned, number = None, _recorded_vocabulary(json_file.local_path(workdir))
  if number is None:
    learned = corpus_lib.learn(
        config.corpus,
        tokenizer=config.tokenizer,
        data_dir=data_dir,
        bpe_vocab_size=config.bpe_vocab_size,
    )
    number = learned.tokenizer.vocab_size
  model = dataclasses.replace(config.model, vocab_size=number)
  return dataclasses.replace(config, model=model), learned


def _recorded_vocabulary(workdir: pathlib.Path) -> int | None:
  """The number that a run recorded; None where nothing sound is there."""
  try:
    number = json_file.read_object(workdir / "config.json")["lm"]["model"][
        "vocab_size"
    ]
  except (errors.UserError, KeyError, TypeError):
    return None  # Whoever claims the folder says what is wrong with it.
  return number if type(number) is int and 0 < number < 2**31 else None


def train(
    config: lm_config.LmConfig,
    workdir: pathlib.Path,
    data_dir: str | None,
    forms: Sequence[str] = (),
    *,
    learned: corpus_lib.Learned | None = None,
    profile: str | None = None,
) -> Run:
  """Loads the corpus, says which it is, and trains from the last checkpoint.

  Args:
    config: The run.
    workdir: Its folder.
    data_dir: Where the corpus may lie.
    forms: In which to write the model at each of `map_steps` and at the end:
      `hf`, a Hugging Face folder hf/step0 and so on, or `own`, the project's
      own likewise. A run that is done writes its end alone.
    learned: Its tokenizer, where `with_vocabulary` made it.
    profile: Steps to trace, see `profiling.parse`.

  Raises:
    UserError: As `corpus.load` and `train.train_and_evaluate`.
    Stopped: If asked to stop.
  """
  corpus = corpus_lib.load(
      config.corpus,
      tokenizer=config.tokenizer,
      data_dir=data_dir,
      cache_dir=workdir / "corpus",
      bpe_vocab_size=config.bpe_vocab_size,
      learned=learned,
  )
  facts = corpus.facts()
  inputs.record(
      workdir,
      {
          **facts["files"],
          f"tokenizer {facts['tokenizer']}": facts["tokenizer_sha256"],
      },
  )
  if devices.is_main_process():
    print(describe(facts), flush=True)
  text = train_lib.make_batches(config, corpus)
  num_steps = train_lib.num_steps(config, text.steps_per_epoch)
  save = _save_steps(config, corpus, workdir, forms) if forms else None
  with progress.bar(
      config.corpus,
      total=num_steps,
      unit="tokens",
      per_step=config.batch_size * config.seq_len,
  ) as on_progress:
    result = train_lib.train_and_evaluate(
        config,
        corpus,
        workdir,
        on_progress=on_progress,
        on_map=save,
        profile=None if profile is None else profiling.parse(profile),
    )
  # The tokenizer is written last: where it is, the model is.
  missing = [
      form
      for form in forms
      if not tokenizer_lib.is_in(workdir / form / f"step{num_steps}")
  ]
  _save_steps(config, corpus, workdir, missing)(num_steps, result.params)
  return Run(config, corpus, result)


def _save_steps(
    config: lm_config.LmConfig,
    corpus: corpus_lib.Corpus,
    workdir: pathlib.Path,
    forms: Sequence[str],
) -> Callable[[int, Any], None]:

  def save(step: int, params: PyTree) -> None:
    for form in forms if devices.is_main_process() else ():
      folder = workdir / form / f"step{step}"
      family = own_form.MODEL_TYPE if form == "own" else None
      pretrained.save(folder, config.model, params, family=family)
      tokenizer_lib.save(corpus.tokenizer, folder, config.model.max_len)

  return save


def describe(facts: Mapping[str, Any]) -> str:
  """Says in one line which corpus a run reads."""
  counts = ", ".join(
      f"{split} {number:,}" for split, number in facts["num_tokens"].items()
  )
  digests = ", ".join(digest[:12] for digest in facts["files"].values())
  return (
      f"Corpus {facts['corpus']} (sha256 {digests}) by {facts['tokenizer']},"
      f" vocabulary {facts['vocab_size']:,}: {counts} tokens."
  )


def summarize(run: Run, workdir: pathlib.Path, preset: str) -> dict[str, Any]:
  """Every number of a run but its maps, in plain JSON types."""
  config, result = run.config, run.result
  text = train_lib.make_batches(config, run.corpus)
  mapped = text.batch(config.seed, config.map_batch).inputs[0]
  final = float(result.history.valid_loss[-1])
  about = {
      "preset": preset,
      "corpus": config.corpus,
      "optimizer": config.optimizer,
      "num_layers": config.model.num_layers,
      "lr": config.lr,
      "seq_len": config.seq_len,
      "seed": config.seed,
      "num_params": sum(leaf.size for leaf in jax.tree.leaves(result.params)),
      "corpus_facts": run.corpus.facts(),
      "final_valid_loss": final,
      "final_perplexity": math.exp(final),
      "probes": list(config.probes),
      "map_steps": list(result.maps()[0]),
      "map_text": run.corpus.tokenizer.decode(mapped),
      "map_tokens": [run.corpus.tokenizer.decode([token]) for token in mapped],
  }
  rows = train_lib.metric_rows(result)
  about["named_probes"] = {
      name: [
          [row[f"{name}/layer_{layer}"] for row in rows]
          for layer in range(config.model.num_layers)
      ]
      for name in result.history.named or {}
  }
  speeds = _speeds(workdir)
  for row in rows:
    row["tokens_per_sec"] = speeds.get(row["step"])
  return summary_lib.summarize_run(rows, about)


def _speeds(workdir: pathlib.Path) -> dict[int, float]:
  """Tokens a second by step: all that nothing but the metric rows says."""
  return {
      row["step"]: row["tokens_per_sec"]
      for row in metric_stream.read_rows(workdir / "metrics.jsonl")
      if isinstance(row.get("tokens_per_sec"), float)
  }


def write(
    run: Run,
    workdir: pathlib.Path,
    *,
    preset: str,
    reference_csv: str | None,
    facts: Mapping[str, str],
    started: float,
) -> pathlib.Path:
  """Writes what a finished run is asked for, and says how it went.

  Args:
    run: The run.
    workdir: Its folder.
    preset: What it started from.
    reference_csv: Curves to draw beside.
    facts: What the report says of the run first.
    started: `time.monotonic()` at the start.

  Returns:
    The path of the report.
  """
  steps, maps = run.result.maps()
  steps = np.array(steps, np.int64)
  np.savez_compressed(workdir / "attn_maps.npz", steps=steps, maps=maps)
  summary = summarize(run, workdir, preset)
  print(
      f"Validation loss {summary['final_valid_loss']:.4f} nats a token,"
      f" perplexity {summary['final_perplexity']:.2f}."
  )
  facts = {**facts, "corpus": describe(run.corpus.facts())}
  return report.write(
      workdir,
      summary,
      maps,
      facts=facts,
      started=started,
      reference_csv=reference_csv,
  )
