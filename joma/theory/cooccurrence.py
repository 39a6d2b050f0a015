"""Theorem 5 of JoMA (https://arxiv.org/abs/2310.00535): tokens that co-occur.

In the hierarchical binary latent tree (`data.Hblt`) a leaf y_l = 1 means that
token l is present. The nearer the lowest common ancestor of two leaves, the
more often they occur together. With L depths (leaves at L - 1), the ancestor at
depth H, polarity rho on every edge, and

  rho_0 = E_{y_0}[P(y_a = 0 | y_0) - P(y_a = 1 | y_0)],

  P(y_l = 1 | y_m = 1) = 1/2 (1 + rho^{2L-2-2H} - 2 rho^{L-1} rho_0)
                             / (1 - rho^{L-1} rho_0).

The paper's text was not at hand: the formula is a reconstruction that equals
the sum over all values of all nodes. Derived here: the same for any branching,
polarities and root table (`exact_cooccurrence`), also for leaves that meet at
the root only, where the printed formula does not apply.

Letters as in `joma.theory`.
"""

import itertools

from jaxtyping import Float
import numpy as np

from joma.theory import data


def cooccurrence(
    polarity: float, root_polarity: float, num_depths: int, depth: int
) -> float:
  """Computes P(y_l = 1 | y_m = 1) by Theorem 5.

  Args:
    polarity: rho of every edge.
    root_polarity: rho_0, equal for all nodes right under the root.
    num_depths: L.
    depth: H of the lowest common ancestor, from 0 to L - 1 (l = m).

  Returns:
    A probability.

  Raises:
    ValueError: If the ancestor is the root, or below the leaves.
  """
  if not 0 <= depth < num_depths:
    raise ValueError(f"Need 0 <= H < L: H = {depth}, L = {num_depths}.")
  # Each of the paths from the ancestor down to a leaf has L - 1 - H edges; a
  # moment of two leaves has the edges of both.
  between = polarity ** (2 * (num_depths - 1 - depth))
  # The mean of a spin: all L - 1 edges from the top node down.
  single = polarity ** (num_depths - 1) * root_polarity
  return (1 + between - 2 * single) / (1 - single) / 2


def root_polarity(tree: data.Hblt) -> Float[np.ndarray, "N"]:
  """Computes rho_0 of each node right under the root."""
  return np.asarray(tree.class_probs) @ (1 - 2 * np.asarray(tree.root_probs))


def exact_cooccurrence(tree: data.Hblt) -> Float[np.ndarray, "M M"]:
  """Computes P(y_l = 1 | y_m = 1) of all leaves in any tree (derived here).

  In spins s = 2 y - 1 an edge multiplies means and pair moments by its rho:
  E[s_l s_m] = rho_l rho_m E[s_parent(l) s_parent(m)] for l != m, and 1 for
  l = m. Depth by depth from the root's table,

    P(y_l = 1 | y_m = 1) = (1 + E s_l + E s_m + E s_l s_m) / (2 (1 + E s_m)).

  Args:
    tree: The tree.

  Returns:
    Row l, column m; NaN where y_m is never 1.
  """
  spins = 2 * np.asarray(tree.root_probs) - 1
  # Given the root the top nodes are independent, so that moments of two of them
  # are means of products over the root's values.
  mean = np.asarray(tree.class_probs) @ spins
  pair = spins.T @ (np.asarray(tree.class_probs)[:, None] * spins)
  np.fill_diagonal(pair, 1)
  for parents, rho in zip(tree.parents, tree.polarity, strict=True):
    mean = rho * mean[parents]
    # Children of one parent meet there: their parents' moment is the diagonal,
    # 1.
    pair = np.outer(rho, rho) * pair[np.ix_(parents, parents)]
    np.fill_diagonal(pair, 1)
  both = 1 + mean[:, None] + mean[None] + pair
  alone = 2 * np.broadcast_to(1 + mean, both.shape)
  return np.divide(both, alone, out=np.full_like(both, np.nan), where=alone > 0)


def enumerated_cooccurrence(tree: data.Hblt, leaf: int, other: int) -> float:
  """Computes P(y_leaf = 1 | y_other = 1) by summing over all values.

  Of all nodes only the two leaves and their ancestors matter; the sum runs over
  the root and up to 2^{2L} values of those.

  Args:
    tree: The tree.
    leaf: l.
    other: m.

  Returns:
    A probability.
  """
  # Up to the top nodes: descendants of other nodes sum to 1.
  levels = [(leaf, other)]
  for parents in reversed(tree.parents):
    first, second = levels[0]
    levels.insert(0, (int(parents[first]), int(parents[second])))
  nodes = [(d, node) for d, pair in enumerate(levels) for node in set(pair)]
  ends = (len(levels) - 1, leaf), (len(levels) - 1, other)
  both = alone = 0.0
  for values in itertools.product((0, 1), repeat=len(nodes)):
    y = dict(zip(nodes, values, strict=True))
    if y[ends[1]]:
      weight = _probability(tree, y)
      alone += weight
      both += weight * y[ends[0]]
  return both / alone


def _probability(tree: data.Hblt, y: dict[tuple[int, int], int]) -> float:
  """Computes the probability of these nodes' values, the root summed out."""
  given_root = np.array(tree.class_probs)
  below = 1.0
  for (depth, node), value in y.items():
    if depth == 0:
      on = np.asarray(tree.root_probs)[:, node]
      given_root = given_root * (on if value else 1 - on)
    else:
      parent = int(tree.parents[depth - 1][node])
      rho = float(tree.polarity[depth - 1][node])
      is_kept = value == y[depth - 1, parent]
      below *= (1 + rho) / 2 if is_kept else (1 - rho) / 2
  return float(given_root.sum() * below)
