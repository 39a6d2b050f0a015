"""Attention of frozen random queries and keys: its values have a closed form.

  f(x_0; x_1 ... x_N) = sum_m 1/N sum_i relu(x~_0^T W_m x~_i) <v_m, x~_i>

with x~ = [x, 1], M frozen Gaussian matrices W_m, and v_m alone trained: f is
linear in v, so that ridge regression has one solution, the limit of gradient
descent (random-feature attention, https://arxiv.org/abs/2307.11353). Matrices
that are shifted by the identity (the biased form) begin with correlations of
x_0 and x_i. Features of a network, relu(<w, all of x>), are beside it.

Float64 NumPy on the host. Letters: B examples, N keys, D numbers of a token, E
= D + 1, M heads, F features.
"""

from jaxtyping import Float
import numpy as np


def head_weights(
    generator: np.random.Generator,
    num_heads: int,
    size: int,
    *,
    is_biased: bool = False,
) -> Float[np.ndarray, "M E E"]:
  """Draws W_m, with entries of variance 1 / E^2, or those shifted by I / E.

  Args:
    generator: Of the draws.
    num_heads: M.
    size: D, numbers of a token.
    is_biased: Whether their mean is the identity's share instead of 0.
  """
  width = size + 1
  drawn = generator.normal(size=(num_heads, width, width))
  shift = np.sqrt(width) * np.eye(width) if is_biased else 0.0
  return (drawn + shift) / width


def attention_features(
    weights: Float[np.ndarray, "M E E"],
    query: Float[np.ndarray, "B D"],
    keys: Float[np.ndarray, "B N D"],
) -> Float[np.ndarray, "B F"]:
  """What v multiplies: mean over keys of relu(x~_0^T W_m x~_i) x~_i, F = M E.

  Args:
    weights: W_m.
    query: x_0.
    keys: x_1 to x_N, in any order.
  """
  query, keys = _with_one(query), _with_one(keys)
  asked = np.einsum("be,mef->bmf", query, weights)
  scores = np.maximum(np.einsum("bmf,bnf->bmn", asked, keys), 0)
  mixed = np.einsum("bmn,bnf->bmf", scores, keys) / keys.shape[1]
  return mixed.reshape(len(mixed), -1)


def network_weights(
    generator: np.random.Generator, num_features: int, num_inputs: int
) -> Float[np.ndarray, "F I"]:
  """Draws w of a network's hidden units, bias included."""
  shape = (num_features, num_inputs + 1)
  return generator.normal(size=shape) / np.sqrt(num_inputs + 1)


def network_features(
    weights: Float[np.ndarray, "F I"],
    query: Float[np.ndarray, "B D"],
    keys: Float[np.ndarray, "B N D"],
) -> Float[np.ndarray, "B F"]:
  """relu(<w, [x_0, x_1, ..., x_N, 1]>) of each unit."""
  tokens = np.concatenate([query[:, None], keys], axis=1)
  inputs = _with_one(tokens.reshape(len(tokens), -1))
  return np.maximum(inputs @ weights.T, 0)


def ridge(
    features: Float[np.ndarray, "B F"],
    targets: Float[np.ndarray, "B K"],
    strengths: tuple[float, ...],
) -> Float[np.ndarray, "S F K"]:
  """Minimizes mean (features v - target)^2 + strength |v|^2 over v.

  One decomposition, of the smaller of B x B and F x F, for all strengths.

  Args:
    features: Of the examples.
    targets: What is to be said, K numbers of each.
    strengths: Each above 0.
  """
  num_examples, num_features = features.shape
  is_wide = num_examples < num_features
  gram = features @ features.T if is_wide else features.T @ features
  values, vectors = np.linalg.eigh(gram / num_examples)
  pull = targets if is_wide else features.T @ targets
  along = vectors.T @ pull / num_examples
  found = [
      vectors @ (along / (values + strength)[:, None]) for strength in strengths
  ]
  return np.stack([features.T @ one if is_wide else one for one in found])


def descend(
    features: Float[np.ndarray, "B F"],
    targets: Float[np.ndarray, "B"],
    strength: float,
    num_steps: int,
) -> Float[np.ndarray, "F"]:
  """Gradient descent on the same from 0, with momentum, at its best rates."""
  curvature = 2 * features.T @ features / len(features)
  most = np.linalg.eigvalsh(curvature)[-1] + 2 * strength
  ratio = np.sqrt(2 * strength / most)
  momentum = ((1 - ratio) / (1 + ratio)) ** 2
  rate = (1 + np.sqrt(momentum)) ** 2 / most
  value = before = np.zeros(features.shape[1])
  pull = 2 * features.T @ targets / len(features)
  for _ in range(num_steps):
    slope = curvature @ value + 2 * strength * value - pull
    value, before = (
        value - rate * slope + momentum * (value - before),
        value,
    )
  return value


def _with_one(x: Float[np.ndarray, "*b D"]) -> Float[np.ndarray, "*b E"]:
  return np.concatenate([x, np.ones((*x.shape[:-1], 1))], axis=-1)
