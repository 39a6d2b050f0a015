"""Sequence classes and their samples (Scan & Snap, Section 3.1 and Appendix G).

A sequence class is a pair of next token n and query token m = psi(n) with a
distribution P(l|n) of contextual tokens. A sample draws n, sets x_{T+1} = n and
x_T = m, and draws x_1 .. x_{T-1} independently from P(l|n). The model sees how
often each token occurs, so counts are drawn at once, as one multinomial, at a
cost that does not grow with T. A token of one class is *distinct*, a token of
several classes *common*.

Token ids: common tokens, common tokens of each query, distinct tokens of each
class, queries, next tokens.

Letters as in `scansnap_jax`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np

from scansnap_jax import config as config_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import npz_file

_MOST_TOKENS = 200_000
# Probabilities written with seven digits still count as normalized.
_SUM_TOLERANCE = 1e-6


class Batch(NamedTuple):
  """A batch of samples in compressed form.

  Attributes:
    class_index: Class of each sample, in 0 .. K-1.
    counts: How often each token of the class occurs, or its probability in the
      limit of infinite length. Column s belongs to token `support[class, s]`.
  """

  class_index: Int[Array, "*b B"]
  counts: Float[Array, "*b B L"]


class TokenCounts(NamedTuple):
  """A batch of samples over the vocabulary.

  Attributes:
    counts: How often each token occurs in the context.
    query: The last token x_T.
    label: The next token x_{T+1}.
  """

  counts: Float[Array, "*b B M"]
  query: Int[Array, "*b B"]
  label: Int[Array, "*b B"]


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceClasses:
  """The generative model: which tokens each class draws, and how often.

  Attributes:
    probs: P(l|n), rows sum to 1.
    query: Token id of the query psi(n) of each class.
    label: Token id of the next token of each class.
    class_probs: P(n).
  """

  probs: Float[np.ndarray, "*K_M"]
  query: Int[np.ndarray, "_"]
  label: Int[np.ndarray, "_"]
  class_probs: Float[np.ndarray, "_"]

  def __post_init__(self):
    if self.probs.ndim != 2 or len(self.probs) < 2:
      raise errors.UserError(
          "probs must have shape [K, M] with two classes or more, got"
          f" {self.probs.shape}: one class leaves nothing to predict."
      )
    _check_distribution("probs", self.probs)
    _check_distribution("class_probs", self.class_probs)
    num_classes, num_tokens = self.probs.shape
    for name in ("query", "label", "class_probs"):
      shape = getattr(self, name).shape
      if shape != (num_classes,):
        raise errors.UserError(
            f"{name} must have shape ({num_classes},) as probs has"
            f" {num_classes} rows, got {shape}."
        )
    for name in ("query", "label"):
      ids = getattr(self, name)
      if ids.min() < 0 or ids.max() >= num_tokens:
        raise errors.UserError(
            f"{name} holds token ids from {ids.min()} to {ids.max()}; probs has"
            f" columns for 0 to {num_tokens - 1}."
        )
    if not self.is_distinct.any(axis=1).all():
      lacking = np.flatnonzero(~self.is_distinct.any(axis=1)).tolist()
      raise errors.UserError(
          f"Classes {lacking} have no distinct token (one with P(l|n) > 0 for"
          " this class alone), so nothing tells them apart."
      )

  @property
  def num_classes(self) -> int:
    """K."""
    return self.probs.shape[0]

  @property
  def num_tokens(self) -> int:
    """M."""
    return self.probs.shape[1]

  @functools.cached_property
  def class_cdf(self) -> np.ndarray:
    """float32 [K]: cumulated P(n); the last value is exactly 1."""
    # Divided by the last value: a sum that ends at 1 - 1e-7 would leave draws
    # beyond it without a class.
    cdf = np.cumsum(self.class_probs)
    return (cdf / cdf[-1]).astype(np.float32)

  @functools.cached_property
  def is_distinct(self) -> np.ndarray:
    """Bool [K, M]: token l occurs in class n and in no other."""
    occurs = self.probs > 0
    return occurs & (occurs.sum(axis=0) == 1)

  @functools.cached_property
  def is_common(self) -> np.ndarray:
    """Bool [K, M]: token l occurs in class n and in another one too."""
    occurs = self.probs > 0
    return occurs & (occurs.sum(axis=0) > 1)

  @functools.cached_property
  def support(self) -> np.ndarray:
    """int32 [K, L]: the tokens of each class; short rows repeat token 0."""
    occurs = self.probs > 0
    size = int(occurs.sum(axis=1).max())
    # Present tokens first, in ascending order: a multinomial over L of them
    # costs L, over all M tokens M.
    order = np.argsort(~occurs, axis=1, kind="stable")[:, :size]
    inside = np.take_along_axis(occurs, order, axis=1)
    return np.where(inside, order, 0).astype(np.int32)

  @functools.cached_property
  def support_probs(self) -> np.ndarray:
    """float32 [K, L]: P(l|n) of the tokens in `support`, 0 where padded."""
    # Token 0 pads short rows and may itself be in the class, so that which
    # entries are padding is told by their place, not by their token.
    inside = np.arange(self.support.shape[1]) < (self.probs > 0).sum(
        axis=1, keepdims=True
    )
    probs = np.take_along_axis(self.probs, self.support, axis=1)
    return np.where(inside, probs, 0.0).astype(np.float32)


def _check_distribution(name: str, probs: np.ndarray) -> None:
  if probs.min() < 0 or not np.isfinite(probs).all():
    raise errors.UserError(f"{name} must be finite and >= 0: {probs.min()}.")
  sums = np.atleast_1d(probs.sum(axis=-1))
  worst = int(np.argmax(np.abs(sums - 1)))
  if abs(sums[worst] - 1) > _SUM_TOLERANCE:
    raise errors.UserError(
        f"{name} must sum to 1, but row {worst} sums to {sums[worst]:.8g}."
        " Divide each row by its sum."
    )


def make_classes(
    config: config_lib.DataConfig, num_last: int
) -> SequenceClasses:
  """Makes the classes of Syn-Small and Syn-Medium, and of any such setting.

  Args:
    config: The setting. With `classes_file` the classes are read from there.
    num_last: Number of query (last) tokens.

  Returns:
    K = num_last * num_next_per_last classes; classes of one query follow each
    other.

  Raises:
    UserError: If the classes file is missing, incomplete or inconsistent.
  """
  if config.classes_file is not None:
    return load_classes(config.classes_file)
  num_classes = num_last * config.num_next_per_last
  first_own = config.num_common
  first_distinct = first_own + num_last * config.num_common_per_last
  first_query = first_distinct + num_classes * config.num_distinct_per_next
  query_index = np.arange(num_classes) // config.num_next_per_last
  num_tokens = first_query + num_last + num_classes
  if num_tokens > _MOST_TOKENS:
    raise errors.UserError(
        f"num_last={num_last} and the data settings make {num_tokens} tokens; Y"
        f" and Z have the square of that, so up to {_MOST_TOKENS} are allowed."
    )
  # Tables over all tokens, as M is small; the ids follow the order that the
  # module docstring gives.
  weights = np.zeros((num_classes, num_tokens))
  weights[:, : config.num_common] = config.common_weight
  for n, m in enumerate(query_index):
    own = first_own + m * config.num_common_per_last
    weights[n, own : own + config.num_common_per_last] = config.common_weight
    distinct = first_distinct + n * config.num_distinct_per_next
    weights[n, distinct : distinct + config.num_distinct_per_next] = (
        np.linspace(
            config.distinct_weight_min,
            config.distinct_weight_max,
            config.num_distinct_per_next,
        )
    )
  return SequenceClasses(
      probs=weights / weights.sum(axis=1, keepdims=True),
      query=first_query + query_index,
      label=first_query + num_last + np.arange(num_classes),
      class_probs=np.full(num_classes, 1 / num_classes),
  )


def load_classes(path: str) -> SequenceClasses:
  """Reads any P(l|n) from an .npz, as `DataConfig.classes_file` describes.

  Raises:
    UserError: If the file is missing, no .npz, incomplete or inconsistent.
  """
  try:
    found = npz_file.read(json_file.local_path(path))
  except errors.UserError as error:
    raise errors.UserError(f"data.classes_file={error}") from error
  missing = {"probs", "query", "label"} - found.keys()
  if missing:
    raise errors.UserError(
        f"data.classes_file={path} lacks {sorted(missing)}; it holds"
        f" {sorted(found)}."
    )
  kinds = {"probs": "f", "query": "iu", "label": "iu", "class_probs": "f"}
  for name, array in found.items():
    if array.dtype.kind not in kinds.get(name, array.dtype.kind):
      wanted = "floats" if kinds[name] == "f" else "integers"
      raise errors.UserError(
          f"data.classes_file={path}: {name} must hold {wanted}, got"
          f" {array.dtype}."
      )
  num_classes = max(1, len(found["probs"]))
  uniform = np.full(num_classes, 1 / num_classes)
  try:
    return SequenceClasses(
        probs=found["probs"].astype(np.float64),
        query=found["query"].astype(np.int64),
        label=found["label"].astype(np.int64),
        class_probs=found.get("class_probs", uniform).astype(np.float64),
    )
  except errors.UserError as error:
    raise errors.UserError(f"data.classes_file={path}: {error}") from error


def sample_batch(
    key: Key[Array, ""],
    support_probs: Float[Array, "K L"],
    class_cdf: Float[Array, "K"],
    *,
    batch_size: int,
    seq_len: int | None,
) -> Batch:
  """Draws one batch: first the classes, then the counts of their tokens.

  Args:
    key: PRNG key.
    support_probs: P(l|n) over the tokens of each class.
    class_cdf: Cumulated P(n); further classes with a value of 1 are never
      drawn, so that tables may be padded.
    batch_size: B.
    seq_len: T, as in `sample_counts`.

  Returns:
    The batch, counts in float32.
  """
  # Inversion of P(n) instead of `categorical`: its draws do not depend on how
  # many classes pad the table.
  class_key, token_key = jax.random.split(key)
  uniform = jax.random.uniform(class_key, (batch_size,))
  class_index = jnp.searchsorted(
      class_cdf, uniform, side="right", method="compare_all"
  )
  counts = sample_counts(token_key, support_probs[class_index], seq_len)
  return Batch(class_index, counts)


def sample_counts(
    key: Key[Array, ""], probs: Float[Array, "B L"], seq_len: int | None
) -> Float[Array, "B L"]:
  """Draws how often each token occurs in a context of T - 1 tokens.

  Args:
    key: PRNG key.
    probs: P(l|n) of each sample's class.
    seq_len: T. None is the limit of infinite length, where the counts are the
      probabilities themselves (Lemma 2).

  Returns:
    Counts that sum to T - 1 in each row, or `probs`. The cost does not grow
    with T: the multinomial is a chain of L - 1 binomials.
  """
  if seq_len is None:
    return probs
  counts = jax.random.multinomial(key, seq_len - 1, probs)
  return counts.astype(jnp.float32)


def to_token_counts(
    batch: Batch,
    support: Int[Array, "K L"],
    query: Int[Array, "K"],
    label: Int[Array, "K"],
    num_tokens: int,
) -> TokenCounts:
  """Spreads a compressed batch over the vocabulary."""
  batch_size, support_size = batch.counts.shape
  tokens = support[batch.class_index]
  # `add`, as padding points to token 0, whose own count it must leave.
  rows = jax.lax.broadcasted_iota(jnp.int32, (batch_size, support_size), 0)
  counts = jnp.zeros((batch_size, num_tokens), batch.counts.dtype)
  return TokenCounts(
      counts=counts.at[rows, tokens].add(batch.counts),
      query=query[batch.class_index],
      label=label[batch.class_index],
  )


def sample_sequences(
    key: Key[Array, ""],
    classes: SequenceClasses,
    *,
    batch_size: int,
    seq_len: int,
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
  """Draws token sequences x_1 .. x_T, the query last, and their next tokens.

  For models that look at positions. The one-layer model needs counts only:
  `sample_batch` is cheaper and draws from the same distribution.
  """
  class_key, token_key = jax.random.split(key)
  uniform = jax.random.uniform(class_key, (batch_size,))
  class_index = jnp.searchsorted(
      jnp.asarray(classes.class_cdf), uniform, side="right"
  )
  log_probs = jnp.log(jnp.asarray(classes.support_probs))[class_index]
  slots = jax.random.categorical(
      token_key, log_probs[:, None, :], axis=-1, shape=(batch_size, seq_len - 1)
  )
  tokens = jnp.take_along_axis(
      jnp.asarray(classes.support)[class_index], slots, axis=1
  )
  query = jnp.asarray(classes.query, jnp.int32)[class_index]
  label = jnp.asarray(classes.label, jnp.int32)[class_index]
  return jnp.concatenate([tokens, query[:, None]], axis=1), label


def count_tokens(
    tokens: Int[Array, "B T"], num_tokens: int
) -> Float[Array, "B M"]:
  """Counts the contextual tokens x_1 .. x_{T-1} of each sequence."""
  one_hot = jax.nn.one_hot(tokens[:, :-1], num_tokens)
  return one_hot.sum(axis=1)
