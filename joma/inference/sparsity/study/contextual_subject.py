"""The model of a study of contextual sparsity, and the texts that it reads."""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int, Integer, PyTree
import numpy as np

from joma.inference.sparsity import contextual_config
from joma.transformer import config as configs
from joma.transformer.hf import pretrained
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.training import train as train_lib
from scansnap_jax.experiment import errors

Config = contextual_config.ContextualConfig


class Texts(NamedTuple):
  """Token ids, each text read from position 0."""

  train: Int[np.ndarray, "B T"]
  valid: Int[np.ndarray, "B T"]


class Subject(NamedTuple):
  """What is studied."""

  config: configs.TransformerConfig
  params: PyTree
  texts: Texts
  facts: Mapping[str, Any]


def load(
    config: Config,
    workdir: pathlib.Path,
    on_progress: Callable[[int], None] = lambda num_steps: None,
) -> Subject:
  """Reads a model, or trains one, and cuts texts.

  Raises:
    UserError: If a text is too short, or as its parts.
  """
  tokenizer = config.tokenizer if config.model is None else config.model
  corpus = corpus_lib.load(
      config.corpus,
      tokenizer=tokenizer,
      data_dir=config.data_dir,
      cache_dir=workdir / "corpus",
      bpe_vocab_size=config.bpe_vocab_size,
  )
  texts = Texts(
      _cut("train", corpus.train, config.num_texts, config),
      _cut("valid", corpus.valid, config.num_eval_texts, config),
  )
  facts: dict[str, Any] = {"corpus": corpus.facts()}
  if config.model is not None:
    shape, params = pretrained.load(config.model)
    facts["model"] = pathlib.Path(config.model).name
  else:
    training = config.training
    shape = dataclasses.replace(training.model, vocab_size=corpus.vocab_size)
    training = dataclasses.replace(training, model=shape)
    run = train_lib.train_and_evaluate(
        training, corpus, workdir / "model", on_progress=on_progress
    )
    params = run.params
    facts["model"] = f"trained for {training.num_steps} steps"
    facts["valid_loss"] = float(run.history.valid_loss[-1])
  params = jax.tree.map(jnp.asarray, params)
  return Subject(shape, params, texts, facts)


def label_of(config: Config, subject: Subject) -> contextual_config.Label:
  """Returns what counts as a unit at work in this model."""
  if config.label != "auto":
    return config.label
  shape = subject.config
  is_relu = shape.activation == "relu" and not shape.use_gated_mlp
  return "sign" if is_relu else "contribution"


def _cut(
    split: str,
    ids: Integer[np.ndarray, "_"],
    num_texts: int,
    config: Config,
) -> Int[np.ndarray, "B T"]:
  """Texts at even distances of a split."""
  length = config.seq_len
  there_are = len(ids) // length
  if there_are < 2 or num_texts < 2:
    raise errors.UserError(
        f"The {split} split of corpus={config.corpus} has {len(ids)} tokens:"
        f" not two texts of seq_len={length}."
    )
  starts = np.linspace(0, there_are - 1, min(num_texts, there_are)).astype(int)
  return np.stack([ids[i * length : (i + 1) * length] for i in starts]).astype(
      np.int32
  )
