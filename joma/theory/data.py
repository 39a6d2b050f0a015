"""Data of the joint dynamics: class-conditional contexts and latent trees.

`class_contexts` makes the matrix X of JoMA's Figures 2 and 3. `Hblt` is the
hierarchical binary latent tree of Section 5
(https://arxiv.org/abs/2310.00535): a root label y_0 of K classes, binary
latents below it, and leaves that say which tokens a sequence holds. A latent
keeps its parent's value with probability (1 + rho) / 2, where rho in [-1, 1] is
the polarity of the edge. Nodes right under the root have depth 0, leaves depth
L - 1.

Letters as in `joma.theory`.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from scansnap_jax.experiment import errors


class Hblt(NamedTuple):
  """A tree; `make_hblt` builds and checks it.

  Attributes:
    class_probs: P(y_0).
    root_probs: P(y_a = 1 | y_0) of the nodes right under the root.
    parents: For each depth from 1: index of each node's parent.
    polarity: For each depth from 1: rho of the edge above each node.
  """

  class_probs: Float[np.ndarray, "K"]
  root_probs: Float[np.ndarray, "K N"]
  parents: tuple[Int[np.ndarray, "_"], ...]
  polarity: tuple[Float[np.ndarray, "_"], ...]

  @property
  def num_depths(self) -> int:
    """L: depths with nodes, the root not among them."""
    return 1 + len(self.parents)

  @property
  def num_leaves(self) -> int:
    """M: nodes of the last depth."""
    return len(self.parents[-1]) if self.parents else self.root_probs.shape[1]


class HbltSample(NamedTuple):
  """A batch drawn from a tree.

  Attributes:
    class_index: y_0.
    nodes: For each depth from 0, the nodes' values; the last are the leaves.
  """

  class_index: Int[Array, "B"]
  nodes: tuple[Bool[Array, "B _"], ...]


def class_contexts(
    key: Key[Array, ""],
    mode: Literal["gaussian", "random"],
    *,
    num_classes: int = 20,
    num_distinct: int = 10,
    num_common: int = 10,
) -> Float[Array, "K M"]:
  """Draws P(l|n) of JoMA's Figures 2 and 3; row n is the context of class n.

  Args:
    key: PRNG key.
    mode: `random` draws every weight from U(0, 1/2); `gaussian` replaces those
      of the first tokens by exp(-(l - n num_distinct / num_classes)^2 / 30), a
      bump that moves with the class.
    num_classes: K.
    num_distinct: Tokens under the bump.
    num_common: Further tokens.

  Returns:
    Rows that sum to 1.
  """
  weights = (
      jax.random.uniform(key, (num_classes, num_distinct + num_common)) / 2
  )
  if mode == "gaussian":
    center = np.arange(num_classes)[:, None] * num_distinct / num_classes
    bump = np.exp(-((np.arange(num_distinct)[None] - center) ** 2) / 30)
    weights = weights.at[:, :num_distinct].set(bump)
  return weights / weights.sum(axis=1, keepdims=True)


def make_hblt(
    root_probs: Float[np.ndarray, "K N"],
    branching: Sequence[int | Sequence[int]],
    polarity: float | Sequence[float | Sequence[float]],
    *,
    class_probs: Float[np.ndarray, "K"] | None = None,
) -> Hblt:
  """Builds a tree from the root's table, the branching and the polarities.

  Args:
    root_probs: P(y_a = 1 | y_0).
    branching: For each depth but the last: children of every node, or of each.
    polarity: rho of all edges, or for each depth from 1: of its edges, or of
      each edge.
    class_probs: P(y_0); uniform by default.

  Returns:
    The tree, in float64.

  Raises:
    UserError: If a probability, a polarity or a number of nodes is impossible.
  """
  num_classes, num_nodes = root_probs.shape
  if class_probs is None:
    class_probs = np.full(num_classes, 1 / max(num_classes, 1))
  if not isinstance(polarity, Sequence):
    polarity = (polarity,) * len(branching)
  if len(polarity) != len(branching):
    raise errors.UserError(
        f"polarity is given for {len(polarity)} depths and branching for"
        f" {len(branching)}."
    )
  parents, polarities = [], []
  for depth, children in enumerate(branching):
    parents.append(_parents(depth, children, num_nodes))
    num_nodes = len(parents[-1])
    rho = _for_each(f"polarity[{depth}]", polarity[depth], num_nodes)
    polarities.append(rho.astype(np.float64))
  tree = Hblt(
      np.asarray(class_probs, np.float64),
      np.asarray(root_probs, np.float64),
      tuple(parents),
      tuple(polarities),
  )
  _check(tree)
  return tree


def _parents(depth: int, children: object, num_nodes: int) -> np.ndarray:
  """Index of the parent of each node below this depth, siblings together."""
  numbers = _for_each(f"branching[{depth}]", children, num_nodes)
  if not (numbers.dtype.kind == "i" and numbers.min(initial=1) >= 0):
    raise errors.UserError(
        f"branching[{depth}] must be whole numbers from 0, got {numbers}."
    )
  return np.repeat(np.arange(num_nodes), numbers)


def _for_each(name: str, values: object, num_nodes: int) -> np.ndarray:
  """Repeats one value for each node, or takes one for each."""
  values = np.asarray(values)
  if values.shape not in ((), (num_nodes,)):
    raise errors.UserError(
        f"{name} must be one value or {num_nodes}, one a node, got shape"
        f" {values.shape}."
    )
  return np.broadcast_to(values, num_nodes)


def _check(tree: Hblt) -> None:
  if 0 in (tree.root_probs.size, *map(len, tree.parents)):
    raise errors.UserError(
        "Every depth needs a node and the root a class; got root_probs of shape"
        f" {tree.root_probs.shape} and {[len(p) for p in tree.parents]} nodes"
        " below."
    )
  for name, values, least in (
      ("class_probs", tree.class_probs, 0),
      ("root_probs", tree.root_probs, 0),
      *(("polarity", rho, -1) for rho in tree.polarity),
  ):
    if not (np.min(values) >= least and np.max(values) <= 1):
      raise errors.UserError(
          f"{name} must lie in [{least}, 1], got {np.min(values):g} to"
          f" {np.max(values):g}."
      )
  total = np.sum(tree.class_probs)
  if len(tree.class_probs) != len(tree.root_probs) or abs(total - 1) > 1e-6:
    raise errors.UserError(
        f"class_probs must be {len(tree.root_probs)} numbers that sum to 1, got"
        f" {len(tree.class_probs)} that sum to {total:g}."
    )


def sample_hblt(
    key: Key[Array, ""], tree: Hblt, *, batch_size: int
) -> HbltSample:
  """Draws the root, then each depth given the one above it."""
  class_key, root_key, *edge_keys = jax.random.split(key, 1 + tree.num_depths)
  class_index = jax.random.categorical(
      class_key, jnp.log(tree.class_probs), shape=(batch_size,)
  )
  is_on = jnp.asarray(tree.root_probs)[class_index]
  nodes = [jax.random.uniform(root_key, is_on.shape) < is_on]
  for edge_key, parents, rho in zip(
      edge_keys, tree.parents, tree.polarity, strict=True
  ):
    shape = (batch_size, len(parents))
    # Exclusive or flips where the edge does not keep the parent's value.
    keeps = jnp.broadcast_to((1 + jnp.asarray(rho)) / 2, shape)
    flips = jax.random.uniform(edge_key, shape) >= keeps
    nodes.append(nodes[-1][:, parents] ^ flips)
  return HbltSample(class_index, tuple(nodes))


def common_depth(tree: Hblt) -> Int[np.ndarray, "M M"]:
  """Depth H of each two leaves' lowest common ancestor; -1 is the root."""
  ancestors = np.arange(tree.num_leaves)
  depth = np.full((len(ancestors), len(ancestors)), -1)
  # From the leaves up: the first level at which two leaves share their ancestor
  # is the lowest.
  for level in range(tree.num_depths - 1, -1, -1):
    is_same = ancestors[:, None] == ancestors[None]
    depth = np.where(is_same & (depth < 0), level, depth)
    if level:
      ancestors = tree.parents[level - 1][ancestors]
  return depth


def pack_tokens(
    is_present: Bool[Array, "B M"],
    seq_len: int,
    *,
    key: Key[Array, ""] | None = None,
) -> Int[Array, "B W"]:
  """Writes the present tokens of each row right-aligned, padding before them.

  Args:
    is_present: Which tokens the sequence holds. Padding gets the id M.
    seq_len: W. Of more than W tokens the last W are kept.
    key: PRNG key for a random order; without one, token ids ascend.
  """
  num_tokens = is_present.shape[1]
  if key is None:
    # Ranks start at 1, as 0 stands for absent tokens, which go in front.
    rank = jnp.broadcast_to(jnp.arange(1.0, num_tokens + 1), is_present.shape)
  else:
    rank = 1 + jax.random.uniform(key, is_present.shape)
  rank = jnp.where(is_present, rank, 0)
  if num_tokens < seq_len:
    rank = jnp.pad(rank, ((0, 0), (seq_len - num_tokens, 0)))
  # Sorted by rank, absent ones first: the last W are the sequence. A sort
  # instead of a loop, as sequences differ in length.
  order = jnp.argsort(rank, axis=1)[:, -seq_len:]
  is_token = jnp.take_along_axis(rank, order, axis=1) > 0
  shift = max(0, seq_len - num_tokens)
  return jnp.where(is_token, order - shift, num_tokens)
