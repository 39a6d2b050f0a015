"""Which tokens gain attention, from co-occurrence statistics alone.

Scan & Snap (https://arxiv.org/abs/2305.16380, Lemma 1) and JoMA
(https://arxiv.org/abs/2310.00535, Theorem 1) write the logit z_ml of query m
and key l as

  dz_m/dt = E[(diag(b) - b b^T) g; query m],   g = Y (e_n - alpha),

b being attention, n the next token, alpha what is predicted, and Y the decoder
that is learned first, dY/dt = E[b (e_n - alpha)^T]. At the start b is uniform
over the context, and with the residual, which tells a model the query, alpha
soon is P(n|m). Both then are statistics of the text (derived here):

  Y_ln = E[b_l (1[next = n] - P(n|m))]
  dz_ml/dt = E[b_l (g_l - b^T g); query m],  g_l = Y_ln - sum_n' Y_ln' P(n'|m).

A key gains logit if what it says of the next token, beyond the query, comes
true, as often as it is in the context: "discriminancy x frequency". No model
and no attention is needed, and positions never enter.

Letters: W windows, T tokens, V vocabulary, m query, l key, n next token.
"""

from typing import NamedTuple

from jaxtyping import Float, Int
import numpy as np

# Pairs of a query and a key that are held at once.
_NUM_PAIRS = 2**23


class Growth(NamedTuple):
  """Velocity of the logits at the start, and what it is made of.

  Attributes:
    velocity: dz_ml/dt, row m, column l.
    frequency: E[b_l; query m], the same without what is in brackets.
    query_probs: P(m).
  """

  velocity: Float[np.ndarray, "V V"]
  frequency: Float[np.ndarray, "V V"]
  query_probs: Float[np.ndarray, "V"]


def growth(windows: Int[np.ndarray, "W T"], vocab_size: int) -> Growth:
  """Measures a text.

  Y and P(n|m) are estimated on every second window and meet the others, and the
  other way round: on their own windows they would find their own noise again.

  Args:
    windows: Token ids of stretches of the text, two or more.
    vocab_size: V.

  Returns:
    The mean of both ways.
  """
  halves = (windows[::2], windows[1::2])
  there, back = (
      _velocity(text, *_decoder(other, vocab_size))
      for text, other in (halves, halves[::-1])
  )
  velocity, frequency = (there[0] + back[0]) / 2, (there[1] + back[1]) / 2
  count = np.bincount(windows[:, 1:-1].ravel(), minlength=vocab_size)
  return Growth(velocity, frequency, count / count.sum())


def type_scores(found: Growth) -> Float[np.ndarray, "V"]:
  """Ranks keys for queries still unknown: sum_m P(m) dz_ml/dt."""
  return found.query_probs @ found.velocity


def discriminancy(found: Growth) -> Float[np.ndarray, "V"]:
  """Ranks keys by what they gain an occurrence; 0 for keys not seen.

  Without the factor of frequency, which optimizers that normalize each
  parameter's gradient take away.
  """
  gained = type_scores(found)
  frequency = found.query_probs @ found.frequency
  return np.where(frequency > 0, gained / np.maximum(frequency, 1e-30), 0)


def _decoder(
    windows: Int[np.ndarray, "W T"], vocab_size: int
) -> tuple[Float[np.ndarray, "V V"], Float[np.ndarray, "V V"]]:
  """Y, and its projection sum_n Y_ln P(n|m) with row l and column m."""
  size = vocab_size
  with_next, with_query = np.zeros(size**2), np.zeros(size**2)
  bigrams = np.zeros(size**2)
  for text in _parts(windows):
    keys, queries, nexts, weights = _pairs(text)
    with_next += np.bincount(keys * size + nexts, weights, size**2)
    with_query += np.bincount(keys * size + queries, weights, size**2)
    pairs = text[:, 1:-1] * size + text[:, 2:]
    bigrams += np.bincount(pairs.ravel(), minlength=size**2)
  bigrams = bigrams.reshape(size, size)
  next_probs = bigrams / np.maximum(bigrams.sum(axis=1, keepdims=True), 1)
  with_next, with_query = (
      counts.reshape(size, size) / bigrams.sum()
      for counts in (with_next, with_query)
  )
  decoder = with_next - with_query @ next_probs
  return decoder, decoder @ next_probs.T


def _velocity(
    windows: Int[np.ndarray, "W T"],
    decoder: Float[np.ndarray, "V V"],
    projected: Float[np.ndarray, "V V"],
) -> tuple[Float[np.ndarray, "V V"], Float[np.ndarray, "V V"]]:
  """E[b_l (g_l - b^T g); query m] and E[b_l; query m]."""
  size = len(decoder)
  velocity, frequency = np.zeros(size**2), np.zeros(size**2)
  for text in _parts(windows):
    keys, queries, nexts, weights = _pairs(text)
    gained = decoder[keys, nexts] - projected[keys, queries]
    # Every query's keys lie together: one segment a query.
    lengths = np.tile(np.arange(1, text.shape[1] - 1), len(text))
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    mean = np.add.reduceat(gained, starts) / lengths
    gained -= np.repeat(mean, lengths)
    cells = queries * size + keys
    velocity += np.bincount(cells, weights * gained, size**2)
    frequency += np.bincount(cells, weights, size**2)
  num_queries = windows[:, 1:-1].size
  return (
      velocity.reshape(size, size) / num_queries,
      frequency.reshape(size, size) / num_queries,
  )


def _parts(windows: Int[np.ndarray, "W T"]) -> list[Int[np.ndarray, "_ T"]]:
  """Cuts the windows into parts whose pairs fit into memory."""
  size = max(1, _NUM_PAIRS // windows.shape[1] ** 2)
  windows = windows.astype(np.int64)
  return [windows[i : i + size] for i in range(0, len(windows), size)]


def _pairs(text: Int[np.ndarray, "W T"]) -> tuple[np.ndarray, ...]:
  """Lists key, query, next token and b of every pair, keys before the query."""
  length = text.shape[1]
  query, key = np.tril_indices(length - 1, -1)
  weights = np.tile(1 / query, len(text))
  parts = (text[:, key], text[:, query], text[:, query + 1])
  return *(part.ravel() for part in parts), weights
