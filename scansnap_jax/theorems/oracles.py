"""What the laws of `dynamics` are measured against, and how.

Independent computations: the softmax decoder step by step, Runge-Kutta and
bisection in NumPy, stochastic gradients. Symbols as in `dynamics`.
"""

from collections.abc import Callable, Hashable, Sequence
import functools

import jax
from jaxtyping import PyTree
import numpy as np

# One number or several.
_One = np.ndarray | jax.Array | np.number | float | int
Numbers = _One | Sequence[_One]

# Failure probability of the laws that may fail.
DELTA = 0.05


def evaluate(
    law: Callable[..., PyTree], *args: PyTree, **static: Hashable
) -> PyTree:
  """Evaluates a law, compiled: operation by operation takes far longer."""
  compiled = jax.jit(law, static_argnames=tuple(static))
  return jax.device_get(compiled(*args, **static))


# What the laws are measured against.


def softmax(logits: np.ndarray) -> np.ndarray:
  """Softmax of each row."""
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def unit(vectors: np.ndarray) -> np.ndarray:
  """Each row over its 2-norm."""
  return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def rk4(
    velocity: Callable[[np.ndarray], np.ndarray],
    state: np.ndarray,
    times: np.ndarray,
) -> np.ndarray:
  """Integrates with one Runge-Kutta step of order 4 per interval."""
  states = [state]
  for step in np.diff(times):
    k1 = velocity(state)
    k2 = velocity(state + step / 2 * k1)
    k3 = velocity(state + step / 2 * k2)
    k4 = velocity(state + step * k3)
    state = state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    states.append(state)
  return np.stack(states)


def bisect(
    is_right: Callable[[np.ndarray], np.ndarray],
    low: np.ndarray,
    high: np.ndarray,
) -> np.ndarray:
  """Finds where `is_right` turns true, elementwise."""
  for _ in range(60):
    middle = (low + high) / 2
    right = is_right(middle)
    low, high = np.where(right, low, middle), np.where(right, middle, high)
  return low


@functools.cache
def softmax_decoder(
    num_steps: int, num_tokens: int, eta_y: float
) -> tuple[np.ndarray, np.ndarray]:
  """Iterates w += eta_y (e_0 - softmax(w)); returns each w and e_0 - alpha."""
  logits, errors = np.zeros((2, num_steps + 1, num_tokens))
  for s in range(num_steps + 1):
    errors[s] = np.eye(num_tokens)[0] - softmax(logits[s])
    if s < num_steps:
      logits[s + 1] = logits[s] + eta_y * errors[s]
  return logits, errors


def equal_overlap(num_classes: int, overlap: float) -> np.ndarray:
  """Builds unit features [K, K + 1] with f_n . f_n' = overlap."""
  own = np.sqrt(1 - overlap) * np.eye(num_classes)
  return np.hstack([np.full((num_classes, 1), np.sqrt(overlap)), own])


def train_decoder(
    features: np.ndarray,
    order: Sequence[int] | np.ndarray,
    *,
    num_tokens: int,
    eta_y: float,
    is_modified: bool,
) -> np.ndarray:
  """Trains Y [*D, tokens in use, M] sample by sample; class n is token n.

  Args:
    features: F.
    order: The classes of the samples, [*D, N]; axes D are draws side by side.
    num_tokens: M.
    eta_y: Learning rate of Y.
    is_modified: Whether by Lemma 3's update.

  Returns:
    Y of each draw.
  """
  order = np.asarray(order)
  decoder = np.zeros((*order.shape[:-1], features.shape[1], num_tokens))
  # The columns of the pseudo-inverse are F (I + E)^{-1}: Lemma 3's update.
  directions = np.linalg.pinv(features).T if is_modified else features
  for n in np.moveaxis(order, -1, 0):
    logits = (features[n][..., None, :] @ decoder)[..., 0, :]
    error = np.eye(num_tokens)[n] - softmax(logits)
    decoder += eta_y * directions[n][..., :, None] * error[..., None, :]
  return decoder


def backpropagated(features: np.ndarray, decoder: np.ndarray) -> np.ndarray:
  """Computes Y (e_n - alpha_n), one row per class."""
  label = np.eye(len(features), decoder.shape[-1])
  return (label - softmax(features @ decoder)) @ decoder.swapaxes(-1, -2)


def syn_small() -> np.ndarray:
  """Builds P(l|n) of 2 classes: 10 common tokens and 10 distinct ones each."""
  probs = np.zeros((2, 34))
  probs[:, :10] = 1
  probs[0, 10:20] = probs[1, 20:30] = np.linspace(0.1, 1, 10)
  return probs / probs.sum(axis=1, keepdims=True)


@functools.cache
def stochastic_attention(
    seed: int,
    num_steps: int = 100,
    batch_size: int = 128,
    *,
    eta_y: float = 1.0,
    eta_z: float = 0.1,
    momentum: float = 0.0,
) -> np.ndarray:
  """Trains on Syn-Small by SGD, T = 128; returns Z's rows per class."""
  generator, probs = np.random.default_rng(seed), syn_small()
  decoder, attn_logits = np.zeros((34, 34)), np.zeros((2, 34))
  last = decoder.copy(), attn_logits.copy()
  for _ in range(num_steps):
    n = generator.integers(2, size=batch_size)
    counts = generator.multinomial(127, probs[n])
    f = unit(counts * np.exp(attn_logits[n]))
    error = np.eye(34)[32 + n] - softmax(f @ decoder)
    g = error @ decoder.T
    dz = f * (g - f * np.sum(f * g, axis=1, keepdims=True))
    # The heavy ball: a step is the gradient's and a share of the last step.
    drift = momentum * (decoder - last[0]), momentum * (attn_logits - last[1])
    last = decoder.copy(), attn_logits.copy()
    decoder += drift[0]
    decoder += eta_y / batch_size * f.T @ error
    attn_logits += drift[1]
    np.add.at(attn_logits, n, eta_z / batch_size * dz)
  return attn_logits


def gap(actual: Numbers, expected: Numbers) -> float:
  """Largest absolute difference."""
  return float(np.max(np.abs(np.asarray(actual) - np.asarray(expected))))


def largest(*values: Numbers) -> float:
  """Largest of all numbers."""
  return max(float(np.max(np.asarray(value))) for value in values)


def relative_gap(actual: np.ndarray, expected: np.ndarray) -> float:
  """Distance of rows over the length of the expected ones, on average."""
  gap = np.linalg.norm(np.asarray(actual) - np.asarray(expected), axis=-1)
  return float(np.mean(gap / np.linalg.norm(np.asarray(expected), axis=-1)))


def count_failures(condition: np.ndarray | np.bool_) -> float:
  """Counts where a condition fails; NaN fails every comparison."""
  return float(np.sum(~np.asarray(condition)))
