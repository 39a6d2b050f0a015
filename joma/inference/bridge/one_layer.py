"""The bridge in one layer: Scan & Snap's model on its own data.

P(l|n) is known, and Lemma 4 (https://arxiv.org/abs/2305.16380) predicts. The
query token of a sequence's class asks after each token of the context, as in
decoding: only its row of Z learns, and all other tokens would ask in vain.

Letters: B sequences, C candidates, T positions, K classes, M tokens.
"""

from collections.abc import Callable
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from joma.inference.bridge import config as bridge_config
from joma.inference.bridge import recall
from scansnap_jax import data as data_lib
from scansnap_jax import dynamics
from scansnap_jax import train as train_lib

# Digits of a logit that float32 attention still holds: equal ones stay equal.
_DIGITS = 4


def measure(
    config: bridge_config.BridgeConfig,
    workdir: pathlib.Path,
    on_progress: Callable[[int], None] = lambda num_steps: None,
) -> dict[str, Any]:
  """Trains the layer and follows the recall of every predictor.

  Args:
    config: Settings.
    workdir: Of the training, which continues there.
    on_progress: Told how many steps of single runs have been taken since.

  Returns:
    As `bridge.along_training`: `theory`, `frequency`, `type` (the best ranking
    by token types), `config.RUNNING_SUM`, `config.RUNNING_MEAN`, `recency`
    and `random`.

  Raises:
    UserError: As training.
    Stopped: As training.
  """
  result = train_lib.train_and_evaluate(
      config.scansnap, workdir, on_progress=on_progress
  )[0]
  num_candidates = (config.seq_len - 1) // 2
  num_kept = recall.count_kept(config.budget, num_candidates)
  rows = []
  for seed, attended in zip(
      result.runs.seed, result.history.attended, strict=True
  ):
    tokens, class_index = draw(config, result.classes, int(seed))
    known = scores(result.classes, tokens[:, :num_candidates], class_index)
    rows.append([
        _recalls(
            stream_weights(c, result.classes, tokens, class_index),
            known,
            num_kept,
        )
        for c in attended
    ])
  return recall.along_training(
      result.steps, rows, num_candidates=num_candidates, num_kept=num_kept
  )


def draw(
    config: bridge_config.BridgeConfig,
    classes: data_lib.SequenceClasses,
    seed: int,
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
  """Draws contexts, without their query, and the class of each."""
  tokens, label = data_lib.sample_sequences(
      jax.random.fold_in(jax.random.key(seed), 1),  # Training uses the key.
      classes,
      batch_size=config.num_sequences,
      seq_len=config.seq_len,
  )
  is_label = np.asarray(label)[:, None] == classes.label
  return np.asarray(tokens)[:, :-1], is_label.argmax(axis=1)


def scores(
    classes: data_lib.SequenceClasses,
    candidates: Int[np.ndarray, "B C"],
    class_index: Int[np.ndarray, "B"],
) -> dict[str, Float[np.ndarray, "B C"]]:
  """What P(l|n) alone says of tokens.

  Args:
    classes: Of the data.
    candidates: Tokens of each sequence.
    class_index: Whose query will ask.

  Returns:
    `theory`, dz_ml/dt at Z = 0 by Lemma 4; `frequency`, P(l).
  """
  features = dynamics.l2_normalize(jnp.asarray(classes.probs, jnp.float32))
  query = jnp.asarray(classes.query, jnp.int32)
  velocity = np.asarray(dynamics.attention_velocity(features, query, 1.0))
  rows = velocity[classes.query[class_index]]
  frequency = classes.class_probs @ classes.probs
  return {
      "theory": np.take_along_axis(rows, candidates, axis=1),
      "frequency": frequency[candidates],
  }


def stream_weights(
    attended: Float[np.ndarray, "K M"],
    classes: data_lib.SequenceClasses,
    tokens: Int[np.ndarray, "B T"],
    class_index: Int[np.ndarray, "B"],
) -> Float[np.ndarray, "B T T"]:
  """Attention of a class's query after each token of its context.

  Args:
    attended: c_n, which is P(l|n) e^{z_ml} over its sum.
    classes: Of the data.
    tokens: Contexts.
    class_index: n of each.

  Returns:
    Row i: weights on tokens 0 to i, which sum to 1.
  """
  occurs = classes.probs > 0
  ratio = np.where(occurs, attended, 1) / np.where(occurs, classes.probs, 1)
  logits = np.log(np.maximum(ratio, np.finfo(np.float32).tiny))
  logits = np.take_along_axis(logits[class_index], tokens, axis=1)
  strength = np.exp(np.round(logits, _DIGITS))
  weights = np.tril(np.ones((tokens.shape[1],) * 2)) * strength[:, None, :]
  return weights / weights.sum(axis=-1, keepdims=True)


def _recalls(
    weights: Float[np.ndarray, "B T T"],
    known: dict[str, Float[np.ndarray, "B C"]],
    num_kept: int,
) -> dict[str, float]:
  mass = recall.future_mass(weights)
  found = {
      **known,
      "type": mass,  # Here the type decides: the mass predicts itself.
      bridge_config.RUNNING_SUM: recall.running_score(weights),
      bridge_config.RUNNING_MEAN: recall.running_score(weights, is_mean=True),
  }
  return recall.recalls(found, mass, num_kept)
