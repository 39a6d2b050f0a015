"""Reads a text with a model and shows it: `explore` gives a `view.View`.

  view = explore.explore("models/smol", "To be, or not to be", slots=16)
  view                     # in a notebook: the page
  view.write("page.html")
  view.recording.attention.of_head(3, 0)   # a map, as an array

Letters: T tokens.
"""

from collections.abc import Callable
import os
from typing import Any

from jaxtyping import Int
import numpy as np

from joma.inference import generate
from joma.inference import stop_tokens
from joma.inference.evaluation import evaluate_config
from joma.inference.explore import evictions
from joma.inference.explore import explore_config
from joma.inference.explore import measure
from joma.inference.explore import recording
from joma.inference.explore import view as view_lib
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.rope import absolute
from joma.transformer.text import streaming
from joma.transformer.text import tokenizer as tokenizers
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import progress

Config = explore_config.ExploreConfig
OnProgress = Callable[[int], None]


def explore(
    folder: str | os.PathLike[str], text: str, **settings: Any
) -> view_lib.View:
  """Reads a text with a model from a folder; see `of_text`.

  Args:
    folder: Of a model and its tokenizer, or its name on Hugging Face.
    text: Any.
    **settings: Of `ExploreConfig`.
  """
  return of_text(folder, text, Config(**settings))


def of_text(
    folder: str | os.PathLike[str], text: str, config: Config
) -> view_lib.View:
  """Reads a text, lets the model continue it, and reads that by policies.

  Raises:
    UserError: As `check`, `pretrained.load` and `read`.
  """
  tokenizer = tokenizers.from_folder(json_file.local_path(folder))
  check(pretrained.read_config(folder), tokenizer, text, config)
  shape, params = pretrained.load(folder)
  model = models.Transformer(shape)
  ids = tokens_of(tokenizer, text, config)
  whole = continued(model, params, ids, config, stop_tokens.read(folder))
  total = len(whole) * (1 + len(config.policies))
  with progress.bar("reading", total=total, unit="tokens") as on_progress:
    found = read(
        model,
        params,
        whole,
        config,
        name=json_file.local_path(folder).resolve().name,
        pieces=pieces_of(tokenizer, whole),
        num_prompt=len(ids),
        on_progress=on_progress,
    )
  return view_lib.of_recording(found, config.max_mb)


def tokens_of(
    tokenizer: tokenizers.Tokenizer, text: str, config: Config
) -> Int[np.ndarray, "T"]:
  """Returns the ids of a text, of its first `max_tokens`.

  Raises:
    UserError: The text has no token.
  """
  ids = tokenizer.encode(text)[: config.max_tokens]
  if not len(ids):
    raise errors.UserError(
        f"the text {text[:40]!r} has no token: there is nothing to look at."
    )
  return ids


def check(shape: Any, tokenizer: Any, text: str, config: Config) -> None:
  """Says what cannot be before weights are read.

  Raises:
    UserError: The text has no token or more than the model's positions reach,
      a policy does not fit, or there is no step for it.
  """
  num_tokens = len(tokens_of(tokenizer, text, config)) + config.max_new_tokens
  absolute.check_learned_positions(shape, num_tokens)
  _check_steps(num_tokens, config)
  for name in config.policies:
    slots = slots_of(num_tokens, config)
    evictions.caches_of(models.Transformer(shape), name, slots, num_tokens)


def _check_steps(num_tokens: int, config: Config) -> None:
  if config.policies and num_tokens < 2:
    raise errors.UserError(
        "a single token is nothing to evict from: give a longer text, or"
        " max_new_tokens."
    )


def slots_of(num_tokens: int, config: Config) -> int:
  """Returns the slots of a KV head."""
  return config.slots or max(2, num_tokens // 4)


def continued(
    model: models.Transformer,
    params: Any,
    ids: Int[np.ndarray, "T"],
    config: Config,
    eos_ids: tuple[int, ...] = (),
) -> Int[np.ndarray, "T"]:
  """Returns ids with what the model adds to them, greedily."""
  if not config.max_new_tokens:
    return ids
  (new,) = generate.generate(
      model,
      params,
      [ids],
      max_new_tokens=config.max_new_tokens,
      eos_ids=eos_ids,
  )
  return np.concatenate([ids, new])


def pieces_of(
    tokenizer: tokenizers.Tokenizer, ids: Int[np.ndarray, "T"]
) -> tuple[str, ...]:
  """Returns the text of each token; empty where it has none of its own."""
  decoder = streaming.StreamDecoder(tokenizer)
  pieces = [decoder.push(token) for token in ids]
  return (*pieces[:-1], pieces[-1] + decoder.finish())


def read(
    model: models.Transformer,
    params: Any,
    ids: Int[np.ndarray, "T"],
    config: Config,
    *,
    name: str,
    pieces: tuple[str, ...] | None = None,
    num_prompt: int | None = None,
    on_progress: OnProgress = lambda num_tokens: None,
    evaluation: evaluate_config.EvaluateConfig | None = None,
) -> recording.Recording:
  """Reads tokens with all keys, and with every policy.

  Args:
    model: A Transformer.
    params: Its parameters.
    ids: Of the text and what the model has added.
    config: Settings.
    name: Of the model.
    pieces: Text of each token; None shows ids.
    num_prompt: Tokens of the text alone; None is all.
    on_progress: Told how many tokens have been read since, T for each policy
      and T with all keys.
    evaluation: How caches are made; None is as an evaluation does by default.

  Raises:
    UserError: As `measure.attention` and `evictions.record`.
  """
  num_tokens = len(ids)
  num_prompt = num_tokens if num_prompt is None else num_prompt
  _check_steps(num_tokens, config)
  at_once = min(num_prompt, num_tokens - 1) if config.reading == "prompt" else 0
  policies = tuple(
      evictions.record(
          model,
          params,
          ids,
          policy,
          slots_of(num_tokens, config),
          at_once,
          on_progress,
          evaluation,
      )
      for policy in config.policies
  )
  left_at = [policy.left_at for policy in policies]
  attention, losses = measure.attention(model, params, ids, left_at)
  on_progress(num_tokens)
  return recording.Recording(
      model=name,
      pieces=pieces or tuple(f" {token}" for token in ids),
      num_prompt=num_prompt,
      reading=config.reading,
      attention=attention,
      losses=losses,
      policies=policies,
  )
