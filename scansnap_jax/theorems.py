"""Every statement of Scan & Snap, measured.

`check_all` compares each law of `dynamics` with a computation that does not
use it (automatic differentiation over positions, the softmax decoder step by
step, Runge-Kutta in NumPy, stochastic gradients), in float64, and returns one
row per statement for a report. Statements: https://arxiv.org/abs/2305.16380.

Letters as in `dynamics`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scansnap_jax import dynamics
from scansnap_jax import flow


@dataclasses.dataclass(frozen=True)
class TheoremCheck:
  """One statement, how far the measurement is from it, and how far it may be.

  Attributes:
    name: Where the paper has it, and what it is about.
    statement: One line of Unicode that ends with what `measured` is.
    measured: A deviation, a ratio, or a number of violations.
    bound: The paper's own bound where it has one, else a tolerance.
  """

  name: str
  statement: str
  measured: float
  bound: float

  @property
  def holds(self) -> bool:
    """Whether the measurement is a number within its bound."""
    return math.isfinite(self.measured) and self.measured <= self.bound


def _statement(measure: Callable[[], float]) -> str:
  return (measure.__doc__ or "").removesuffix(".")


def check_all() -> list[TheoremCheck]:
  """Measures every statement, in the order of the paper, in float64."""
  with jax.enable_x64(True):
    return [
        TheoremCheck(name, _statement(measure), float(measure()), bound)
        for name, measure, bound in _CHECKS
    ]


_DELTA = 0.05


def _evaluate(law: Callable, *args, **static) -> Any:
  """Evaluates a law, compiled: operation by operation takes far longer."""
  compiled = jax.jit(law, static_argnames=tuple(static))
  return jax.device_get(compiled(*args, **static))


# What the laws are measured against.


def _softmax(logits: np.ndarray) -> np.ndarray:
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def _unit(vectors: np.ndarray) -> np.ndarray:
  return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _rk4(
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


def _bisect(is_right, low, high):
  """Finds where `is_right` turns true, elementwise."""
  for _ in range(60):
    middle = (low + high) / 2
    right = is_right(middle)
    low, high = np.where(right, low, middle), np.where(right, middle, high)
  return low


@functools.cache
def _softmax_decoder(
    num_steps: int, num_tokens: int, eta_y: float
) -> tuple[np.ndarray, np.ndarray]:
  """Iterates w += eta_y (e_0 - softmax(w)); returns each w and e_0 - alpha."""
  logits, errors = np.zeros((2, num_steps + 1, num_tokens))
  for s in range(num_steps + 1):
    errors[s] = np.eye(num_tokens)[0] - _softmax(logits[s])
    if s < num_steps:
      logits[s + 1] = logits[s] + eta_y * errors[s]
  return logits, errors


def _equal_overlap(num_classes: int, overlap: float) -> np.ndarray:
  """Builds unit features [K, K + 1] with f_n . f_n' = overlap."""
  own = np.sqrt(1 - overlap) * np.eye(num_classes)
  return np.hstack([np.full((num_classes, 1), np.sqrt(overlap)), own])


def _train_decoder(
    features: np.ndarray,
    order: Sequence[int] | np.ndarray,
    *,
    num_tokens: int,
    eta_y: float,
    is_modified: bool,
) -> np.ndarray:
  """Trains Y [tokens in use, M] sample by sample; class n is token n."""
  decoder = np.zeros((features.shape[1], num_tokens))
  # The columns of the pseudo-inverse are F (I + E)^{-1}: Lemma 3's update.
  directions = np.linalg.pinv(features).T if is_modified else features
  for n in order:
    error = np.eye(num_tokens)[n] - _softmax(features[n] @ decoder)
    decoder += eta_y * np.outer(directions[n], error)
  return decoder


def _backpropagated(features: np.ndarray, decoder: np.ndarray) -> np.ndarray:
  """Computes Y (e_n - alpha_n), one row per class."""
  label = np.eye(len(features), decoder.shape[1])
  return (label - _softmax(features @ decoder)) @ decoder.T


def _syn_small() -> np.ndarray:
  """Builds P(l|n) of 2 classes: 10 common tokens and 10 distinct ones each."""
  probs = np.zeros((2, 34))
  probs[:, :10] = 1
  probs[0, 10:20] = probs[1, 20:30] = np.linspace(0.1, 1, 10)
  return probs / probs.sum(axis=1, keepdims=True)


@functools.cache
def _stochastic_attention(
    seed: int, num_steps: int = 100, batch_size: int = 128
) -> np.ndarray:
  """Trains on Syn-Small by plain SGD, T = 128; returns Z's rows per class."""
  generator, probs = np.random.default_rng(seed), _syn_small()
  eta_y, eta_z = 1.0, 0.1
  decoder, attn_logits = np.zeros((34, 34)), np.zeros((2, 34))
  for _ in range(num_steps):
    n = generator.integers(2, size=batch_size)
    counts = generator.multinomial(127, probs[n])
    f = _unit(counts * np.exp(attn_logits[n]))
    error = np.eye(34)[32 + n] - _softmax(f @ decoder)
    g = error @ decoder.T
    dz = f * (g - f * np.sum(f * g, axis=1, keepdims=True))
    decoder += eta_y / batch_size * f.T @ error
    np.add.at(attn_logits, n, eta_z / batch_size * dz)
  return attn_logits


def _gap(actual, expected) -> float:
  return float(np.max(np.abs(np.asarray(actual) - np.asarray(expected))))


def _largest(*values) -> float:
  return max(float(np.max(np.asarray(value))) for value in values)


def _relative_gap(actual, expected) -> float:
  gap = np.linalg.norm(np.asarray(actual) - np.asarray(expected), axis=-1)
  return float(np.mean(gap / np.linalg.norm(np.asarray(expected), axis=-1)))


def _count_failures(condition) -> float:
  """Counts where a condition fails; NaN fails every comparison."""
  return float(np.sum(~np.asarray(condition)))


# Lemmas 1 and 2: gradients, and attention in long sequences.


def _positional_log_likelihood(decoder, attn_logits, sequence, query, label):
  """Attends to positions, not to counts: b = softmax(X z_m), f = LN(X^T b)."""
  one_hot = jax.nn.one_hot(sequence, len(decoder))
  mixed = one_hot.T @ jax.nn.softmax(one_hot @ attn_logits[query])
  logits = decoder.T @ (mixed / jnp.linalg.norm(mixed))
  return jax.nn.log_softmax(logits)[label]


def _lemma_1_gradients() -> float:
  """Ẏ and Ż of a sample equal autodiff over positions: largest error."""
  generator = np.random.default_rng(0)
  params, sequence = generator.normal(size=(2, 9, 9)), generator.integers(
      7, size=40
  )
  slope = jax.grad(_positional_log_likelihood, argnums=(0, 1))
  expected = _evaluate(slope, *params, sequence, 7, 8)
  counts = np.bincount(sequence, minlength=9)
  actual = _evaluate(dynamics.lemma1_gradients, *params, counts, 7, 8)
  return _gap(actual, expected)


def _lemma_1_row_sums() -> float:
  """Y·1 = 0 and Z·1 = 0 are conserved: largest row sum after 30 steps."""
  generator = np.random.default_rng(0)
  params = np.zeros((2, 9, 9))
  for label in generator.integers(3, size=30).tolist():
    counts = generator.integers(5, size=9)
    params += _evaluate(dynamics.lemma1_gradients, *params, counts, 8, label)
  return _gap(params.sum(axis=-1), 0)


def _lemma_2_finite() -> float:
  """|q_l − P(l|n)| ≤ √(ln(2/δ)/(2(T−1))): how often not, δ = .05."""
  # Probability 1/2 has the largest spread, so that a bound too small shows.
  frequency = np.random.default_rng(0).binomial(127, 0.5, 20_000) / 127
  is_outside = np.abs(frequency - 0.5) > dynamics.frequency_bound(128, _DELTA)
  return is_outside.mean()


def _lemma_2_limit() -> float:
  """Xᵀb → c_n: largest difference at T = 100000."""
  generator = np.random.default_rng(0)
  probs, attn_logits = _syn_small()[0], generator.normal(size=34)
  sequence = generator.choice(34, size=100_000, p=probs)
  attn_weights = _softmax(attn_logits[sequence])
  mixed = np.bincount(sequence, attn_weights, minlength=34)
  limit = _evaluate(dynamics.attended, probs, attn_logits)
  return _gap(mixed, limit)


# Lemmas 3 and 5 to 9: the decoder.


def _correlation_sign() -> float:
  """E′ = I − (I+E)⁻¹ has eigenvalues λ/(1+λ): largest error."""
  features = _equal_overlap(4, 0.3)
  eigenvalues = np.linalg.eigvalsh(features @ features.T) - 1
  actual = np.linalg.eigvalsh(_evaluate(dynamics.decorrelation, features))
  return _gap(actual, np.sort(eigenvalues / (1 + eigenvalues)))


def _lemma_3_modified() -> float:
  """Row n of W = FᵀY alone moves, by η_Y(e_n − α_n): largest error."""
  features = np.pad(_equal_overlap(4, 0.3), ((0, 0), (0, 7)))
  eta_y, projected, decoder = 0.7, np.zeros((4, 12)), np.zeros((12, 12))
  gradient = dynamics.modified_decoder_gradient
  for n in np.random.default_rng(0).integers(4, size=40).tolist():
    decoder += eta_y * _evaluate(gradient, decoder, features, n, n)
    projected[n] += eta_y * (np.eye(12)[n] - _softmax(projected[n]))
  return _gap(features @ decoder, projected)


def _lemma_3_plain() -> float:
  """Overlaps all ρ, K = M: Lemma 6 at rate (1−ρ)η_Y: largest error of W."""
  times, probs, label = (
      np.array([0.0, 60.0]),
      _unit(np.eye(6) + 0.2),
      np.arange(6),
  )
  start = np.zeros((6, 6))
  state = (times, start, start, probs, 0 * label, label)
  decoder, _ = _evaluate(flow.integrate, *state, eta_y=0.8, eta_z=0.0)
  rate = 0.8 * (1 - probs[0] @ probs[1])
  h = _evaluate(
      dynamics.h_continuous, times[-1] / 6, num_tokens=6, eta_y=float(rate)
  )
  expected = _evaluate(dynamics.projected_decoder, h, label, num_tokens=6)
  return _gap(probs @ decoder[-1], expected)


@functools.cache
def _h_star() -> np.ndarray:
  """Computes h*(0), ..., h*(80) for M = 50 and eta_y = .5."""
  setting = dict(num_steps=80, num_tokens=50, eta_y=0.5)
  return _evaluate(dynamics.h_discrete, **setting)


def _lemma_5_logits() -> float:
  """w_n(s) = (M−1) h*(s) ζ_n, by the softmax decoder: largest error."""
  logits, _ = _softmax_decoder(80, 50, 0.5)
  label = np.zeros(81, int)
  actual = _evaluate(
      dynamics.projected_decoder, _h_star(), label, num_tokens=50
  )
  return _gap(actual, logits)


def _lemma_5_error() -> float:
  """e_n − α_n = (M−1)/(M−1+e^{Mh*}) ζ_n: largest error."""
  _, errors = _softmax_decoder(80, 50, 0.5)
  label = np.zeros(81, int)
  actual = _evaluate(dynamics.prediction_error, _h_star(), label, num_tokens=50)
  return _gap(actual, errors)


def _lemma_6() -> float:
  """e^{Mh} + (M−1)Mh = Mη_Yt + 1 solves the flow of h: largest error of Mh."""
  times, sizes = np.linspace(0.0, 200.0, 4001), np.array([4, 100, 1000, 10_000])
  velocity = lambda x: sizes / (sizes - 1 + np.exp(x))
  expected = _rk4(velocity, np.zeros(4), times)
  actual = [
      m * _evaluate(dynamics.h_continuous, times, num_tokens=m, eta_y=1.0)
      for m in sizes.tolist()
  ]
  return _gap(actual, expected.T)


@functools.cache
def _h_gap() -> np.ndarray:
  """Computes h*(s) - h(s), with h* read off the softmax decoder."""
  logits, _ = _softmax_decoder(400, 1000, 1.0)
  setting = dict(num_tokens=1000, eta_y=1.0)
  h = _evaluate(dynamics.h_continuous, np.arange(401.0), **setting)
  return logits[:, 0] / 999 - h


def _lemma_7_upper() -> float:
  """h* − h ≤ 2η_Y/M for M = 1000, η_Y = 1: largest gap."""
  return _h_gap().max()


def _lemma_7_lower() -> float:
  """h* ≥ h: largest h − h*."""
  return -_h_gap().min()


_RUN = dynamics.Run(num_tokens=1000, num_classes=10, eta_y=0.5, eta_z=0.5)


def _scaled_h(times: np.ndarray) -> np.ndarray:
  """Computes M h(t/K) by bisection of Lemma 6's equation."""
  y = 1000 * 0.5 * times / 10
  is_right = lambda x: np.expm1(x) + 999 * x > y
  return _bisect(is_right, np.zeros_like(y), np.log1p(y))


def _early() -> np.ndarray:
  return np.linspace(1e-3, dynamics.scanning_end(_RUN), 1000)


def _late() -> np.ndarray:
  return np.geomspace(1, 1e6, 1000) * dynamics.snapping_start(_RUN)


def _around_peak() -> np.ndarray:
  return np.linspace(0.7, 0.9, 20_001) * dynamics.scanning_end(_RUN)


def _speed(times: np.ndarray) -> np.ndarray:
  return _evaluate(dynamics.gamma, times, _RUN)


def _lemma_8_omega() -> float:
  """(1+ω₁) ln M = ln((M−1)(1+ω₁) ln M), by bisection: largest error."""
  sizes = np.array([30, 100, 1000, 10_000])
  log = np.log(sizes)
  is_right = lambda w: (1 + w) * log > np.log((sizes - 1) * (1 + w) * log)
  expected = _bisect(is_right, np.zeros(4), np.full(4, 2.0))
  return _gap([dynamics.omega_1(size) for size in sizes.tolist()], expected)


def _lemma_8_early() -> float:
  """e^{Mh} ≤ M−1 and e^{Mh} − 1 ≤ (M−1)Mh: largest ratio."""
  x = _scaled_h(_early())
  return _largest(np.exp(x) / 999, np.expm1(x) / (999 * x))


def _lemma_8_late() -> float:
  """e^{Mh} ≥ M−1 and e^{Mh} ≥ (M−1)Mh: largest ratio."""
  x = _scaled_h(_late())
  return _largest(999 / np.exp(x), 999 * x / np.exp(x))


def _gamma_meaning() -> float:
  """γ = (1−1/M) w_nᵀ(e_n − softmax(w_n)): largest error."""
  times = np.geomspace(1e-2, 1e5, 1000)
  label = np.eye(1000)[0]
  # w_n = (M - 1) h zeta_n = M h (e_n - 1/M).
  logits = _scaled_h(times)[:, None] * (label - 1 / 1000)
  work = np.sum(logits * (label - _softmax(logits)), axis=1)
  return _gap(_speed(times), 999 / 1000 * work)


def _lemma_9_early() -> float:
  """1/4 ≤ γ / ((1−1/M)² η_Yt/K) ≤ 1: largest excess on either side."""
  ratio = _speed(_early()) / _evaluate(dynamics.gamma_early, _early(), _RUN)
  return _largest(ratio, 1 / (4 * ratio))


def _lemma_9_late() -> float:
  """1/2 ≤ γ / ((1−1/M)² ln(Ms)/s) ≤ 2, s = η_Yt/K: largest excess."""
  ratio = _speed(_late()) / _evaluate(dynamics.gamma_late, _late(), _RUN)
  return _largest(ratio / 2, 1 / (2 * ratio))


def _gamma_peak_time() -> float:
  """γ is largest at 0.816 t₀′ for M = 1000: difference."""
  peak = _around_peak()[np.argmax(_speed(_around_peak()))]
  return abs(peak / dynamics.scanning_end(_RUN) - 0.816)


def _gamma_peak_closed_form() -> float:
  """The peak is (1−1/M) W((M−1)/e), W Lambert's: relative error on a grid."""
  times, speed = _around_peak(), _speed(_around_peak())
  time, height = dynamics.gamma_peak(_RUN)
  peak = np.argmax(speed)
  return max(abs(times[peak] / time - 1), abs(speed[peak] / height - 1))


# Theorem 1, Corollary 1 and Theorem 5: what the decoder sends back.


def _theorem_1_error(is_modified: bool) -> float:
  features, num_steps = _equal_overlap(5, 0.02), 5000
  order = np.random.default_rng(0).integers(5, size=num_steps)
  decoder = _train_decoder(
      features, order, num_tokens=200, eta_y=0.5, is_modified=is_modified
  )
  run = dynamics.Run(num_tokens=200, num_classes=5, eta_y=0.5)
  speed = _evaluate(dynamics.gamma, float(num_steps), run)
  expected = _evaluate(dynamics.backpropagated_gradient, features, speed)
  return _relative_gap(_backpropagated(features, decoder), expected)


def _theorem_1_modified() -> float:
  """g_n = γ(ι_n f_n − Σ β f_n′), SGD, K = 5, M = 200, t = 5000: mean error."""
  return _theorem_1_error(is_modified=True)


def _theorem_1_plain() -> float:
  """The same with the plain update of Y: mean relative error."""
  return _theorem_1_error(is_modified=False)


def _corollary_1() -> float:
  """‖e_n − α_n‖ ≤ ε after K/η_Y (1/ε + ln(M/ε)) steps: steps / bound."""
  _, errors = _softmax_decoder(400, 1000, 1.0)
  norm = np.linalg.norm(errors, axis=1)
  run = dynamics.Run(num_tokens=1000, num_classes=10, eta_y=1.0)
  ratios = [
      10 * np.argmax(norm <= epsilon) / dynamics.num_steps_bound(epsilon, run)
      for epsilon in (0.5, 0.1, 0.03, 0.01)
  ]
  return _largest(ratios)


_NUM_STEPS = 2000


@functools.cache
def _random_order() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws classes; returns their order, h(N/K), and the diagonal of Theta."""
  order = np.random.default_rng(0).integers(4, size=_NUM_STEPS)
  counts = np.bincount(order)
  logits, _ = _softmax_decoder(int(counts.max()), 50, 0.5)
  setting = dict(num_tokens=50, eta_y=0.5)
  h = _evaluate(dynamics.h_continuous, _NUM_STEPS / 4, **setting)
  return order, h, logits[counts, 0] / 49 / h - 1


def _theorem_5_decoder() -> float:
  """Y = F(I−E′)(I+Θ)W̄ after 2000 random samples: largest error."""
  features = np.pad(_equal_overlap(4, 0.3), ((0, 0), (0, 45)))
  order, h, theta = _random_order()
  expected = _train_decoder(
      features, order, num_tokens=50, eta_y=0.5, is_modified=True
  )
  actual = _evaluate(
      dynamics.decoder_closed_form, features, np.arange(4), h, theta
  )
  return _gap(actual, expected)


def _theorem_5_theta() -> float:
  """|θ_n| ≤ K/√N √(ln(K/δ)), δ = .05: largest θ_n."""
  _, _, theta = _random_order()
  return np.abs(theta).max()


# Lemma 4, Theorem 2 and Corollary 2: the fates of tokens. One query, three
# classes, common tokens first, then the distinct tokens of each class.


def _one_common() -> np.ndarray:
  probs = np.zeros((3, 13))
  probs[:, 0] = 1
  for n in range(3):
    probs[n, 1 + 4 * n : 5 + 4 * n] = [0.1, 0.2, 0.3, 0.4]
  return probs / probs.sum(axis=1, keepdims=True)


def _two_common() -> np.ndarray:
  """Builds Corollary 2's data; the last two tokens never occur."""
  probs = np.zeros((3, 13))
  probs[:, :2] = [0.3, 0.1]
  for n in range(3):
    probs[n, 2 + 3 * n : 5 + 3 * n] = np.roll([0.1, 0.2, 0.3], n)
  return probs


@functools.cache
def _trained() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Trains a decoder round robin; returns F, the real g_n, and gamma."""
  features, rounds = _unit(_one_common()), 50
  decoder = _train_decoder(
      *(features, np.tile(np.arange(3), rounds)),
      num_tokens=2000,
      eta_y=0.05,
      is_modified=True,
  )
  run = dynamics.Run(num_tokens=2000, num_classes=3, eta_y=0.05)
  speed = _evaluate(dynamics.gamma, 3.0 * rounds, run)
  return features, _backpropagated(features, decoder), speed


@functools.cache
def _trained_velocity() -> np.ndarray:
  """Differentiates sum_n f_n(z)^T g_n, one row of Z, at z = 0."""
  _, g, _ = _trained()

  def work(z):
    scores = _one_common() * jnp.exp(z)[None]
    return jnp.sum(scores / jnp.linalg.norm(scores, axis=1)[:, None] * g)

  return _evaluate(jax.grad(work), np.zeros(13))


def _component_velocity(probs: np.ndarray) -> np.ndarray:
  """Sums Lemma 4 component by component, gamma = 1, one row of Z at 0."""
  f = _unit(probs)
  beta = -np.linalg.inv(f @ f.T)
  velocity = np.zeros(f.shape[1])
  for n in range(len(f)):
    for other in set(range(len(f))) - {n}:
      push = f[n] @ f[other] * f[n] - f[other]
      velocity += f[n] * beta[n, other] * push
  return velocity


def _lemma_4_trained() -> float:
  """ż_m against autodiff of a trained decoder: relative error."""
  features, _, speed = _trained()
  actual = _evaluate(
      dynamics.attention_velocity, features, np.zeros(3, int), speed
  )
  return _relative_gap(actual[0], _trained_velocity())


def _pressure() -> np.ndarray:
  """Reads xi_n off the real g_n: Lemma 1 for a distinct token of n."""
  f, g, _ = _trained()
  own = 1 + 4 * np.arange(3)
  return g[range(3), own] / f[range(3), own] - np.sum(f * g, axis=1)


def _theorem_1_positive() -> float:
  """Pressure by a trained decoder's gradients: classes with ξ_n ≤ 0."""
  return _count_failures(_pressure() > 0)


def _theorem_1_pressure() -> float:
  """ξ_n = γ Σ β f_nᵀf_n′ against a trained decoder's gradients: rel. error."""
  features, _, speed = _trained()
  actual = _evaluate(dynamics.xi, features, speed)
  return _relative_gap(actual, _pressure())


def _theorem_2_distinct() -> float:
  """ż_ml = η_Z f_nl² ξ_n, by components: largest error."""
  features = _unit(_one_common())
  velocity = _evaluate(dynamics.distinct_velocity, features, 1.0)
  actual = np.where(features > 0, velocity, 0).sum(axis=0)
  return _gap(actual[1:], _component_velocity(_one_common())[1:])


def _theorem_2_common() -> float:
  """ż_ml = −η_Z Σ_n (1−f_nl²) ξ_n, by components: error."""
  features = _unit(_one_common())
  velocity = _evaluate(dynamics.common_velocity, features, 1.0)
  return _gap(velocity[:, 0].sum(), _component_velocity(_one_common())[0])


def _theorem_2_gain() -> float:
  """Distinct tokens gain under the trained decoder: how many do not."""
  return _count_failures(_trained_velocity()[1:] > 0)


def _theorem_2_loss() -> float:
  """The only common token loses under the trained decoder: 1 if not."""
  return _count_failures(_trained_velocity()[0] < 0)


def _speed_of_three(t: jax.Array) -> jax.Array:
  run = dynamics.Run(num_tokens=1000, num_classes=3, eta_y=1.0)
  return dynamics.gamma(t, run)


@functools.cache
def _path(is_one_common: bool) -> tuple[np.ndarray, np.ndarray]:
  """Integrates Lemma 4; returns the query's row of Z, and B_n, over time."""
  probs = _one_common() if is_one_common else _two_common()
  attn_logits, exponent = _evaluate(
      flow.integrate_attention,
      *(np.linspace(0.0, 60.0, 13), np.zeros((13, 13)), probs),
      np.zeros(3, int),
      gamma=_speed_of_three,
      eta_z=0.5,
  )
  return attn_logits[:, 0], exponent


def _corollary_2_velocity() -> float:
  """Common tokens: ż_l = −η_Zf_l²(1−f_nᵀf_n′)γΣβ, by components: error."""
  features = _unit(_two_common())
  actual = _evaluate(dynamics.symmetric_common_velocity, features, 1.0)
  return _gap(actual[:2], _component_velocity(_two_common())[:2])


def _corollary_2_fall() -> float:
  """Every common token falls all along the flow: how often not."""
  attn_logits, _ = _path(is_one_common=False)
  return _count_failures(np.diff(attn_logits[:, :2], axis=0) < 0)


def _corollary_2_norms() -> float:
  """‖c̃_n‖ stay equal across classes: largest relative difference."""
  attn_logits, _ = _path(is_one_common=False)
  scores = _two_common() * np.exp(attn_logits)[:, None]
  norm = np.linalg.norm(scores, axis=-1)
  return _gap(norm / norm[:, :1], 1)


# Theorems 3 and 4: relative gain, scanning and snapping.


def _gain_error(
    probs: np.ndarray, attn_logits: np.ndarray, token: int, others: list[int]
) -> float:
  """Compares r(t) / r(0) with chi(t); the first row of Z is the start."""
  scores = probs * np.exp(attn_logits)
  chi = _evaluate(dynamics.gain_growth, attn_logits[:, token], 0.0)
  gain = np.stack([
      _evaluate(dynamics.relative_gain, scores, token, other)
      for other in others
  ])
  return _gap(gain / (gain[:, :1] * chi), 1)


def _theorem_3_identity() -> float:
  """Gain r(t) = r(0) χ(t) along Lemma 4: largest relative error."""
  attn_logits, _ = _path(is_one_common=True)
  return _gain_error(_one_common()[0], attn_logits, 4, [1, 2, 3])


def _theorem_3_sandwich() -> float:
  """e^{2f(0)²B} ≤ χ ≤ e^{2B}: largest excess on either side."""
  attn_logits, exponent = _path(is_one_common=True)
  chi = np.exp(2 * attn_logits[1:, 4])
  feature = _unit(_one_common())[0, 4]
  lower, upper = _evaluate(
      dynamics.gain_growth_bounds, feature, exponent[1:, 0]
  )
  return _largest(lower / chi, chi / upper)


def _theorem_3_sgd() -> float:
  """Gain r = r(0) χ, Syn-Small, η_Y = 10η_Z = 1, 4 seeds: largest error."""
  ends = [_stochastic_attention(seed)[0] for seed in range(4)]
  attn_logits = np.stack([np.zeros(34), *ends])
  return _gain_error(_syn_small()[0], attn_logits, 19, [18, 15, 10])


_C0 = (0.2, 1.0, 5.0)
_PHASES = dynamics.Run(num_tokens=1000, num_classes=10, eta_y=1.0, eta_z=0.5)


@functools.cache
def _exponent_path() -> tuple[np.ndarray, np.ndarray]:
  """Integrates M h, z_l and B_n together, for each C0; returns t and B_n."""
  # Steps grow with t as the motion slows down.
  times, c0 = 2000 * np.linspace(0, 1, 2501) ** 3, np.array(_C0)

  def velocity(state):
    x, z, _ = state
    slow = 1 / (999 + np.exp(x))
    xi = 999 * 0.999 * x * slow * np.exp(4 * z) / c0
    return np.stack([1000 / 10 * slow, -0.5 * xi, 0.5 * xi])

  return times, _rk4(velocity, np.zeros((3, 3)), times)[:, 2]


def _theorem_4() -> float:
  """B = ¼ ln[(C₀ + 2(η_Z/η_Y)K(M−1)²h²)/C₀], C₀ = .2, 1, 5: largest error."""
  times, exponent = _exponent_path()
  runs = [dataclasses.replace(_PHASES, c0=c0) for c0 in _C0]
  actual = [_evaluate(dynamics.gain_exponent, times, run) for run in runs]
  return _gap(actual, exponent.T)


def _theorem_4_scanning() -> float:
  """B ≈ ¼ ln(1 + 2η_Yη_Zt²(1−1/M)²/(KC₀)), t ≤ t₀′: largest gap."""
  times, exponent = _exponent_path()
  is_early = times <= dynamics.scanning_end(_PHASES)
  leading = _evaluate(dynamics.scanning_exponent, times[is_early], _PHASES)
  return _gap(leading, exponent[is_early, 1])


def _theorem_4_snapping() -> float:
  """B ≈ ¼ ln(1 + 2K/(νC₀) (1−1/M)² ln²(1+Ms)), t ≥ t₀: largest gap."""
  times, exponent = _exponent_path()
  is_late = times >= dynamics.snapping_start(_PHASES)
  leading = _evaluate(dynamics.snapping_exponent, times[is_late], _PHASES)
  return _gap(leading, exponent[is_late, 1])


def _figure_9(
    num_tokens: int, nu: float, time: Callable[[dynamics.Run], Any]
) -> np.ndarray:
  """Computes B_n at a time for the five eta_z of Figure 9, K = C0 = 1."""
  exponents = []
  for eta_z in (0.5, 1.0, 2.0, 4.0, 8.0):
    run = dynamics.Run(
        num_tokens=num_tokens, num_classes=1, eta_y=nu * eta_z, eta_z=eta_z
    )
    exponents.append(_evaluate(dynamics.gain_exponent, time(run), run))
  return np.asarray(exponents)


def _figure_9_left() -> float:
  """B(5) = .620 .671 .713 .749 .783 (M = 100, ν = 10): largest error."""
  expected = [0.620, 0.671, 0.713, 0.749, 0.783]
  return _gap(_figure_9(100, 10.0, lambda run: 5.0), expected)


def _figure_9_right() -> float:
  """B(50) = 1.408 1.450 1.481 1.509 1.533 (M = 10⁴, ν = 1): error."""
  expected = [1.408, 1.450, 1.481, 1.509, 1.533]
  return _gap(_figure_9(10_000, 1.0, lambda run: 50.0), expected)


def _figure_9_dots() -> float:
  """B = .549 for every η_Z at t = 2·1.33 ln M/η_Y: largest error."""
  # The figure rounds 1 + omega_1 to 1.33; for M = 100 it is 1.403.
  start = lambda run: 2.66 * math.log(100) / run.eta_y
  return _gap(_figure_9(100, 10.0, start), 0.549)


def _theorem_4_start() -> float:
  """B(t₀) depends on η_Y/η_Z alone: spread over η_Z from .5 to 8."""
  return np.ptp(_figure_9(100, 10.0, dynamics.snapping_start))


# Laws that hold exactly: at most a few hundred roundings of numbers near 1.
_EXACT = 1e-12
# Laws along an integrated path: ten times the largest error seen.
_INTEGRATED = 1e-8
# Theorem 1 leaves out terms of order 1/M: M = 2000, up to ten such terms.
_LEADING = 10 / 2000
# Half a unit of the third digit, in which the values are stated.
_THREE_DIGITS = 5e-4
# Under SGD, where past f_n enter; 10 % where eta_y >= 10 eta_z.
_STOCHASTIC = 0.1

_CHECKS = (
    ("Lemma 1, gradients", _lemma_1_gradients, _EXACT),
    ("Lemma 1, row sums", _lemma_1_row_sums, _EXACT),
    ("Lemma 2, finite T", _lemma_2_finite, _DELTA),
    # Five standard deviations of a frequency of 1/2.
    ("Lemma 2, T → ∞", _lemma_2_limit, 2.5 / math.sqrt(100_000)),
    ("E′, sign", _correlation_sign, _EXACT),
    ("Lemma 3, modified update", _lemma_3_modified, _EXACT),
    ("Lemma 3, plain gradient", _lemma_3_plain, _INTEGRATED),
    ("Lemma 5, w_n", _lemma_5_logits, _EXACT),
    ("Lemma 5, e_n − α_n", _lemma_5_error, _EXACT),
    ("Lemma 6, h", _lemma_6, _INTEGRATED),
    (
        "Lemma 7, upper",
        _lemma_7_upper,
        dynamics.h_gap_bound(num_tokens=1000, eta_y=1.0),
    ),
    ("Lemma 7, lower", _lemma_7_lower, _EXACT),
    ("Lemma 8, ω₁", _lemma_8_omega, _EXACT),
    ("Lemma 8, t ≤ t₀′", _lemma_8_early, 1.0),
    ("Lemma 8, t ≥ t₀", _lemma_8_late, 1.0),
    ("γ, definition", _gamma_meaning, _EXACT),
    ("Lemma 9, t ≤ t₀′", _lemma_9_early, 1.0),
    ("Lemma 9, t ≥ t₀", _lemma_9_late, 1.0),
    ("γ, peak time", _gamma_peak_time, _THREE_DIGITS),
    # One step of the grid.
    ("γ, peak closed form", _gamma_peak_closed_form, 0.2 / 20_000),
    # K / sqrt(t) = .07 is how far class counts spread, at leading order.
    ("Theorem 1, modified update", _theorem_1_modified, 0.05),
    ("Theorem 1, plain gradient", _theorem_1_plain, 0.05),
    ("Theorem 1(a), ξ_n > 0", _theorem_1_positive, 0.0),
    ("Theorem 1(a), ξ_n", _theorem_1_pressure, _LEADING),
    ("Corollary 1, number of steps", _corollary_1, 1.0),
    # 2000 updates, each rounded.
    ("Theorem 5, Y", _theorem_5_decoder, 1e-10),
    (
        "Theorem 5, Θ",
        _theorem_5_theta,
        dynamics.theta_bound(_NUM_STEPS, 4, _DELTA),
    ),
    ("Lemma 4, ż_m", _lemma_4_trained, _LEADING),
    ("Theorem 2(a), distinct tokens", _theorem_2_distinct, _EXACT),
    ("Theorem 2(a), sign", _theorem_2_gain, 0.0),
    ("Theorem 2(b), common token", _theorem_2_common, _EXACT),
    ("Theorem 2(b), sign", _theorem_2_loss, 0.0),
    ("Corollary 2, common tokens", _corollary_2_velocity, _EXACT),
    ("Corollary 2, sign", _corollary_2_fall, 0.0),
    ("Corollary 2, norms", _corollary_2_norms, _INTEGRATED),
    ("Theorem 3, identity", _theorem_3_identity, _INTEGRATED),
    ("Theorem 3, sandwich", _theorem_3_sandwich, 1.0),
    ("Theorem 3, SGD", _theorem_3_sgd, _STOCHASTIC),
    ("Theorem 4, B_n", _theorem_4, _INTEGRATED),
    # M h >= s M / (2 (M - 1)) there: a factor of 2 inside 1/2 ln.
    ("Theorem 4, scanning", _theorem_4_scanning, 0.5 * math.log(2)),
    # M h >= ln(M s / 2) there, with M s >= M ln M = 6908.
    (
        "Theorem 4, snapping",
        _theorem_4_snapping,
        -0.5 * math.log(1 - math.log(2) / math.log(6908)),
    ),
    ("Theorem 4, B(t₀)", _theorem_4_start, _EXACT),
    ("Figure 9, left", _figure_9_left, _THREE_DIGITS),
    ("Figure 9, right", _figure_9_right, _THREE_DIGITS),
    ("Figure 9, dots", _figure_9_dots, _THREE_DIGITS),
)
