"""Tasks on which blocks are trained: what `run.BlockSetting.draw` may be.

Each is a frozen dataclass, so that equal ones share a compilation, and a pure
function of a key and of the member's source.

Letters as in `joma.block`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from joma.block import run
from joma.theory import data


def class_probs(
    *, num_classes: int, num_distinct: int, num_common: int
) -> Float[np.ndarray, "K M"]:
  """Makes P(l|n) with distinct tokens of falling salience.

  Args:
    num_classes: K.
    num_distinct: Distinct tokens of each class: of weight 1.1 down to .3, and
      .1 in the other classes.
    num_common: Tokens of weight 1 in all classes.

  Returns:
    Rows that sum to 1.
  """
  # Falling, so that components have different mu and arrive one after the
  # other, as in Theorem 4.
  salience = np.linspace(1.0, 0.2, num_distinct)
  distinct = 0.1 + np.kron(np.eye(num_classes), salience[None])
  common = np.ones((num_classes, num_common))
  weights = np.concatenate([distinct, common], axis=1)
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


class Clouds(NamedTuple):
  """An isotropic mixture.

  Attributes:
    centers: The mean of each class [K, M].
    std: Standard deviation of each coordinate.
  """

  centers: Float[Any, "K M"]
  std: Float[Any, ""]


@dataclasses.dataclass(frozen=True)
class DrawClouds:
  """Draws x ~ N(center, std^2 I), as many of each class: Theorem 3's data.

  Attributes:
    num_samples: B.
  """

  num_samples: int

  def __call__(self, key: Key[Array, ""], source: Clouds) -> run.Batch:
    """Draws the batch; counts may be negative."""
    label = _balanced(self.num_samples, len(source.centers))
    mean = jnp.asarray(source.centers)[label]
    x = mean + source.std * jax.random.normal(key, mean.shape)
    return run.Batch(x, jnp.zeros_like(label), label)


@dataclasses.dataclass(frozen=True)
class DrawSequences:
  """Draws T tokens from P(l|n) and gives their frequencies.

  Attributes:
    num_samples: B, as many of each class.
    seq_len: T.
  """

  num_samples: int
  seq_len: int

  def __call__(
      self, key: Key[Array, ""], source: Float[Any, "K M"]
  ) -> run.Batch:
    """Draws the batch."""
    label = _balanced(self.num_samples, len(source))
    log_probs = jnp.log(jnp.asarray(source))[label]
    tokens = jax.random.categorical(
        key, log_probs, shape=(self.seq_len, self.num_samples)
    )
    # Frequencies: x of one size, whatever the length of the sequences.
    counts = jax.nn.one_hot(tokens, log_probs.shape[1]).mean(axis=0)
    return run.Batch(counts, jnp.zeros_like(label), label)


def _balanced(num_samples: int, num_classes: int) -> Int[Array, "B"]:
  # In turn, not at random: class counts that vary would shift the stationary
  # gradient from seed to seed.
  return jnp.arange(num_samples) % num_classes


class ContextSource(NamedTuple):
  """What contexts a member has, and what its queries mean.

  Attributes:
    is_gaussian: The mode of `data.class_contexts`.
    shift: By how much each query shifts the label: class n under query m has
      label (n + shift m) mod K. 0 leaves the query without meaning.
  """

  is_gaussian: Bool[Any, ""]
  shift: Int[Any, ""] = np.int32(0)


@dataclasses.dataclass(frozen=True)
class DrawContexts:
  """One context per class, `data.class_contexts`, under each query.

  Attributes:
    num_classes: K.
    num_queries: Q.
  """

  num_classes: int = 20
  num_queries: int = 1

  def __call__(self, key: Key[Array, ""], source: ContextSource) -> run.Batch:
    """Draws the contexts and pairs each with each query: K Q samples."""
    gaussian = data.class_contexts(
        key, "gaussian", num_classes=self.num_classes
    )
    uniform = data.class_contexts(key, "random", num_classes=self.num_classes)
    # Both are drawn, and one is taken: a traced choice lets one program serve
    # both kinds.
    contexts = jnp.where(source.is_gaussian, gaussian, uniform)
    index = jnp.arange(self.num_classes * self.num_queries)
    of_class, query = index % self.num_classes, index // self.num_classes
    label = (of_class + source.shift * query) % self.num_classes
    return run.Batch(contexts[of_class], query, label)


class TreeSource(NamedTuple):
  """A latent tree as a task.

  Attributes:
    tree: The tree; the label is its root.
    is_shuffled: Draw labels that have nothing to do with the tokens.
  """

  tree: data.Hblt
  is_shuffled: Bool[Any, ""]


@dataclasses.dataclass(frozen=True)
class DrawTree:
  """Draws which tokens the leaves of a tree hold.

  Attributes:
    num_samples: B.
  """

  num_samples: int

  def __call__(self, key: Key[Array, ""], source: TreeSource) -> run.Batch:
    """Draws the batch."""
    tree_key, label_key = jax.random.split(key)
    drawn = data.sample_hblt(tree_key, source.tree, batch_size=self.num_samples)
    # Shuffled within the batch: the labels keep their distribution.
    others = jax.random.permutation(label_key, drawn.class_index)
    label = jnp.where(source.is_shuffled, others, drawn.class_index)
    leaves = drawn.nodes[-1].astype(jnp.float32)
    return run.Batch(leaves, jnp.zeros_like(label), label)


def binary_tree(
    seed: int,
    *,
    num_classes: int,
    num_roots: int,
    branching: tuple[int, ...],
    polarity: float,
    weak_polarity: float | None = None,
) -> data.Hblt:
  """Makes a tree in which each class switches its own set of top nodes on.

  Args:
    seed: Of the classes' codes, all distinct: half of the top nodes are on.
    num_classes: D, at most num_roots over num_roots / 2.
    num_roots: Nodes right under the root.
    branching: Children of every node, for each depth but the last.
    polarity: rho of every edge, that of the root included: a top node follows
      its class's code with probability (1 + rho) / 2.
    weak_polarity: rho of the edge above every second leaf, if another.

  Returns:
    The tree.
  """
  rng = np.random.default_rng(seed)
  on = np.arange(num_roots) < num_roots // 2
  codes: dict[bytes, np.ndarray] = {}
  # By their bytes, as equal codes could not be told apart by any network.
  while len(codes) < num_classes:
    code = rng.permutation(on)
    codes[code.tobytes()] = code
  signs = 2.0 * np.stack([*codes.values()]) - 1
  depths = [[polarity] * n for n in num_roots * np.cumprod(branching)]
  if weak_polarity is not None:
    depths[-1][1::2] = [weak_polarity] * (len(depths[-1]) // 2)
  return data.make_hblt((1 + polarity * signs) / 2, branching, depths)
