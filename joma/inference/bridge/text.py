"""The bridge on text: heavy hitters of Transformers, from co-occurrence.

`bridge_theory` predicts from the training text alone; sequences of the
validation text are measured.

Letters: B sequences, N heads of all layers, C candidates, T positions,
V vocabulary.
"""

from collections.abc import Callable
import functools
import json
import pathlib
from typing import Any
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, PyTree
import numpy as np

from joma.inference.bridge import config as bridge_config
from joma.inference.bridge import recall
from joma.inference.bridge import theory
from joma.transformer import model as models
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.training import lm_config
from joma.transformer.training import train as train_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import workdir as workdir_lib

# Sequences that are read at once.
_NUM_ROWS = 32
# Occurrences of a type whose attention is told from noise.
_NUM_SEEN = 8
# Types that are named.
_NUM_NAMED, _NUM_FREQUENT = 12, 200


def measure(
    config: bridge_config.BridgeConfig,
    corpus: corpus_lib.Corpus,
    workdir: pathlib.Path,
    on_progress: Callable[[int], None] = lambda num_steps: None,
) -> dict[str, Any]:
  """Trains Transformers and follows the recall of every predictor.

  What was measured at a step is kept in the run's folder: a run that continues
  does not lose it.

  Args:
    config: Settings.
    corpus: What to read.
    workdir: Of the trainings, one folder each.
    on_progress: Told how many steps have been taken since.

  Returns:
    Under each of `config.positions`, what `bridge.along_training` gives, with
    `discriminancy` among the predictors; `valid_loss`, one a run, in nats a
    token; and `partial` [R, E], the rank correlation over types of the theory
    and the attention they get, given frequency. `named`: types that the theory
    ranks `highest` and `lowest` of the frequent ones.

  Raises:
    UserError: If the text is too short, or as training.
    Stopped: As training.
  """
  subject = Subject(config, corpus)
  found: dict[str, Any] = {}
  for positions in config.positions:
    runs = []
    for run in range(config.num_lm_seeds):
      lm = config.training(positions, run)
      folder = workdir / f"{positions}-{run}"
      runs.append(_train(subject, corpus, lm, folder, on_progress))
    steps, rows, losses = zip(*runs, strict=True)
    curves = recall.along_training(
        steps[0],
        rows,
        num_candidates=subject.num_candidates,
        num_kept=subject.num_kept,
    )
    curves["partial"] = curves["recall"].pop("partial")
    found[positions] = {**curves, "valid_loss": np.array(losses)}
  return {**found, "named": subject.named()}


class Subject:
  """The sequences of a text, and what its statistics say of their tokens.

  Attributes:
    num_candidates: C.
    num_kept: k.
    by_type: Scores of each type, [V] by predictor.

  Raises:
    UserError: The text is too short for two sequences.
  """

  def __init__(
      self, config: bridge_config.BridgeConfig, corpus: corpus_lib.Corpus
  ):
    length, number = config.lm.seq_len, config.num_sequences
    self._tokens = cut(corpus.valid, length, number, "validation")
    windows = cut(corpus.train, length + 1, config.num_windows, "training")
    # Whose attention tells what types get: none of the text that is measured.
    every = max(1, len(windows) // (2 * number))
    self._calibration = windows[::every][: 2 * number, :-1]
    self._tokenizer = corpus.tokenizer
    self.num_candidates = length // 2
    self.num_kept = recall.count_kept(config.budget, self.num_candidates)
    vocab_size = config.lm.model.vocab_size
    grown = theory.growth(windows, vocab_size)
    count = np.bincount(windows.ravel(), minlength=vocab_size)
    self.by_type = {
        "theory": theory.type_scores(grown),
        "discriminancy": theory.discriminancy(grown),
        "frequency": count.astype(np.float64),
    }

  def measure(
      self, model: models.Transformer, params: PyTree
  ) -> dict[str, float]:
    """Returns the recalls of a model and its `partial` correlation."""
    size, middle = model.config.vocab_size, self.num_candidates
    candidates, known = self._tokens[:, :middle], self._calibration[:, :middle]
    calibrated, _ = read(model, params, self._calibration)
    mass, running = read(model, params, self._tokens)
    mean = recall.mean_by_type(calibrated, known, size)
    scores = {
        name: values[candidates][:, None]
        for name, values in self.by_type.items()
    }
    scores["type"] = mean[:, candidates].swapaxes(0, 1)
    scores[bridge_config.RUNNING_SUM] = running
    ages = np.arange(middle, 0, -1)
    scores[bridge_config.RUNNING_MEAN] = running / ages
    seen = np.bincount(known.ravel(), minlength=size) >= _NUM_SEEN
    partial = recall.partial_rank_correlation(
        self.by_type["theory"][seen],
        mean.mean(axis=0)[seen],
        self.by_type["frequency"][seen],
    )
    found = recall.recalls(scores, mass, self.num_kept)
    return {**found, "partial": partial}

  def named(self) -> dict[str, list[str]]:
    """Names frequent types with the highest and the lowest scores."""
    frequent = np.argsort(-self.by_type["frequency"])[:_NUM_FREQUENT]
    ranked = frequent[np.argsort(-self.by_type["theory"][frequent])]
    name = lambda ids: [self._tokenizer.decode([int(i)]) for i in ids]
    return {
        "highest": name(ranked[:_NUM_NAMED]),
        "lowest": name(ranked[::-1][:_NUM_NAMED]),
    }


def cut(
    text: Integer[np.ndarray, "_"], length: int, number: int, split: str
) -> Int[np.ndarray, "_ T"]:
  """Takes stretches of a text, side by side or spread evenly over it.

  Args:
    text: Token ids.
    length: T.
    number: How many, where the text has them.
    split: Its name, for the error.

  Raises:
    UserError: If the text has no two of them.
  """
  number = min(number, len(text) // length)
  if number < 2:
    raise errors.UserError(
        f"the {split} text has {len(text)} tokens: not two stretches of"
        f" {length}."
    )
  starts = np.linspace(0, len(text) - length, number).astype(np.int64)
  return np.asarray(text)[starts[:, None] + np.arange(length)].astype(np.int32)


def read(
    model: models.Transformer, params: PyTree, tokens: Int[np.ndarray, "B T"]
) -> tuple[Float[np.ndarray, "B N C"], Float[np.ndarray, "B N C"]]:
  """Reads sequences; returns future mass and running score of candidates."""
  number, length = tokens.shape
  padded = np.resize(tokens, (-(-number // _NUM_ROWS) * _NUM_ROWS, length))
  parts = [
      _read(model, params, jnp.asarray(part))
      for part in np.split(padded, len(padded) // _NUM_ROWS)
  ]
  mass, running = (
      np.concatenate(found)[:number].astype(np.float64)
      for found in zip(*parts, strict=True)
  )
  return mass, running


@functools.partial(jax.jit, static_argnums=0)
def _read(
    model: models.Transformer, params: PyTree, tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B N C"], Float[Array, "B N C"]]:
  _, seen = model.apply({"params": params}, tokens, mutable="intermediates")
  layers: Any = [
      seen["intermediates"][f"layers_{layer}"]["attn"]["attn_weights"][0]
      for layer in range(model.config.num_layers)
  ]
  weights = jnp.concatenate(layers, axis=1)
  return recall.future_mass(weights), recall.running_score(weights)


def _train(
    subject: Subject,
    corpus: corpus_lib.Corpus,
    lm: lm_config.LmConfig,
    folder: pathlib.Path,
    on_progress: Callable[[int], None],
) -> tuple[tuple[int, ...], list[dict[str, float]], float]:
  """Trains a run; returns its steps, what was measured, and its loss."""
  workdir_lib.make_folder(folder)
  model = models.Transformer(lm.model)
  file = lambda step: folder / f"recall_{step}.json"

  def on_map(step: int, params: PyTree) -> None:
    row = subject.measure(model, params)
    content = {"row": row, "crc32": _crc32(row)}
    workdir_lib.write_atomic(file(step), json.dumps(content))

  result = train_lib.train_and_evaluate(
      lm, corpus, folder, on_progress=on_progress, on_map=on_map
  )
  rows = [_read_row(file(step)) for step in result.map_steps]
  return result.map_steps, rows, float(result.history.valid_loss[-1])


def _read_row(path: pathlib.Path) -> dict[str, float]:
  """Reads what was measured at a step, maybe by a run that was stopped.

  Raises:
    UserError: It is not what was written; what it was measured of is gone.
  """
  try:
    content = json_file.read_object(path)
    if content.get("crc32") == _crc32(content.get("row")):
      return content["row"]
    reason = "its checksum does not match"
  except errors.UserError as error:
    reason = str(error)
  raise errors.UserError(
      f"{path} is damaged ({reason}), and the parameters that it was measured"
      " of are gone: give a new --workdir."
  )


def _crc32(row: object) -> int:
  return zlib.crc32(json.dumps(row, sort_keys=True).encode())
