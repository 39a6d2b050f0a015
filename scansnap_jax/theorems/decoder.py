"""Lemmas 1 to 3 and 5 to 9, Theorems 1 and 5 and Corollary 1, measured.

https://arxiv.org/abs/2305.16380. The docstring of a function is the statement,
its result the measurement; `theorems` holds it against its bound.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from scansnap_jax import dynamics
from scansnap_jax import flow
from scansnap_jax import growth
from scansnap_jax.theorems import oracles

# Lemmas 1 and 2: gradients, and attention in long sequences.


def positional_log_likelihood(
    decoder: Float[Array, "M M"],
    attn_logits: Float[Array, "M M"],
    sequence: Int[Array, "T"],
    query: Int[Array, ""],
    label: Int[Array, ""],
) -> Float[Array, ""]:
  """Attends to positions, not to counts: b = softmax(X z_m), f = LN(X^T b)."""
  one_hot = jax.nn.one_hot(sequence, len(decoder))
  mixed = one_hot.T @ jax.nn.softmax(one_hot @ attn_logits[query])
  logits = decoder.T @ (mixed / jnp.linalg.norm(mixed))
  return jax.nn.log_softmax(logits)[label]


def lemma_1_gradients() -> float:
  """Ẏ and Ż of a sample equal autodiff over positions: largest error."""
  generator = np.random.default_rng(0)
  params, sequence = generator.normal(size=(2, 9, 9)), generator.integers(
      7, size=40
  )
  slope = jax.grad(positional_log_likelihood, argnums=(0, 1))
  expected = oracles.evaluate(slope, *params, sequence, 7, 8)
  counts = np.bincount(sequence, minlength=9)
  actual = oracles.evaluate(dynamics.lemma1_gradients, *params, counts, 7, 8)
  return oracles.gap(actual, expected)


def lemma_1_row_sums() -> float:
  """Y·1 = 0 and Z·1 = 0 are conserved: largest row sum after 30 steps."""
  generator = np.random.default_rng(0)
  params = np.zeros((2, 9, 9))
  for label in generator.integers(3, size=30).tolist():
    counts = generator.integers(5, size=9)
    params += oracles.evaluate(
        dynamics.lemma1_gradients, *params, counts, 8, label
    )
  return oracles.gap(params.sum(axis=-1), 0)


def lemma_2_finite() -> float:
  """|q_l − P(l|n)| ≤ √(ln(2/δ)/(2(T−1))): how often not, δ = .05."""
  # Probability 1/2 has the largest spread, so that a bound too small shows.
  frequency = np.random.default_rng(0).binomial(127, 0.5, 20_000) / 127
  is_outside = np.abs(frequency - 0.5) > dynamics.frequency_bound(
      128, oracles.DELTA
  )
  return is_outside.mean()


def lemma_2_limit() -> float:
  """Xᵀb → c_n: largest difference at T = 100000."""
  generator = np.random.default_rng(0)
  probs, attn_logits = oracles.syn_small()[0], generator.normal(size=34)
  sequence = generator.choice(34, size=100_000, p=probs)
  attn_weights = oracles.softmax(attn_logits[sequence])
  mixed = np.bincount(sequence, attn_weights, minlength=34)
  limit = oracles.evaluate(dynamics.attended, probs, attn_logits)
  return oracles.gap(mixed, limit)


# Lemmas 3 and 5 to 9: the decoder.


def correlation_sign() -> float:
  """E′ = I − (I+E)⁻¹ has eigenvalues λ/(1+λ): largest error."""
  features = oracles.equal_overlap(4, 0.3)
  eigenvalues = np.linalg.eigvalsh(features @ features.T) - 1
  actual = np.linalg.eigvalsh(
      oracles.evaluate(dynamics.decorrelation, features)
  )
  return oracles.gap(actual, np.sort(eigenvalues / (1 + eigenvalues)))


def lemma_3_modified() -> float:
  """Row n of W = FᵀY alone moves, by η_Y(e_n − α_n): largest error."""
  features = np.pad(oracles.equal_overlap(4, 0.3), ((0, 0), (0, 7)))
  eta_y, projected, decoder = 0.7, np.zeros((4, 12)), np.zeros((12, 12))
  gradient = dynamics.modified_decoder_gradient
  for n in np.random.default_rng(0).integers(4, size=40).tolist():
    decoder += eta_y * oracles.evaluate(gradient, decoder, features, n, n)
    projected[n] += eta_y * (np.eye(12)[n] - oracles.softmax(projected[n]))
  return oracles.gap(features @ decoder, projected)


def lemma_3_plain() -> float:
  """Overlaps all ρ, K = M: Lemma 6 at rate (1−ρ)η_Y: largest error of W."""
  times, probs, label = (
      np.array([0.0, 60.0]),
      oracles.unit(np.eye(6) + 0.2),
      np.arange(6),
  )
  start = np.zeros((6, 6))
  state = (times, start, start, probs, 0 * label, label)
  decoder, _ = oracles.evaluate(flow.integrate, *state, eta_y=0.8, eta_z=0.0)
  rate = 0.8 * (1 - probs[0] @ probs[1])
  h = oracles.evaluate(
      growth.h_continuous, times[-1] / 6, num_tokens=6, eta_y=float(rate)
  )
  expected = oracles.evaluate(growth.projected_decoder, h, label, num_tokens=6)
  return oracles.gap(probs @ decoder[-1], expected)


@functools.cache
def h_star() -> np.ndarray:
  """Computes h*(0), ..., h*(80) for M = 50 and eta_y = .5."""
  setting = dict(num_steps=80, num_tokens=50, eta_y=0.5)
  return oracles.evaluate(growth.h_discrete, **setting)


def lemma_5_logits() -> float:
  """w_n(s) = (M−1) h*(s) ζ_n, by the softmax decoder: largest error."""
  logits, _ = oracles.softmax_decoder(80, 50, 0.5)
  label = np.zeros(81, int)
  actual = oracles.evaluate(
      growth.projected_decoder, h_star(), label, num_tokens=50
  )
  return oracles.gap(actual, logits)


def lemma_5_error() -> float:
  """e_n − α_n = (M−1)/(M−1+e^{Mh*}) ζ_n: largest error."""
  _, errors = oracles.softmax_decoder(80, 50, 0.5)
  label = np.zeros(81, int)
  actual = oracles.evaluate(
      growth.prediction_error, h_star(), label, num_tokens=50
  )
  return oracles.gap(actual, errors)


def lemma_6() -> float:
  """e^{Mh} + (M−1)Mh = Mη_Yt + 1 solves the flow of h: largest error of Mh."""
  times, sizes = np.linspace(0.0, 200.0, 4001), np.array([4, 100, 1000, 10_000])
  velocity = lambda x: sizes / (sizes - 1 + np.exp(x))
  expected = oracles.rk4(velocity, np.zeros(4), times)
  actual = [
      m * oracles.evaluate(growth.h_continuous, times, num_tokens=m, eta_y=1.0)
      for m in sizes.tolist()
  ]
  return oracles.gap(actual, expected.T)


@functools.cache
def h_gap() -> np.ndarray:
  """Computes h*(s) - h(s), with h* read off the softmax decoder."""
  logits, _ = oracles.softmax_decoder(400, 1000, 1.0)
  setting = dict(num_tokens=1000, eta_y=1.0)
  h = oracles.evaluate(growth.h_continuous, np.arange(401.0), **setting)
  return logits[:, 0] / 999 - h


def lemma_7_upper() -> float:
  """h* − h ≤ 2η_Y/M for M = 1000, η_Y = 1: largest gap."""
  return h_gap().max()


def lemma_7_lower() -> float:
  """h* ≥ h: largest h − h*."""
  return -h_gap().min()


RUN = growth.TheoryRun(num_tokens=1000, num_classes=10, eta_y=0.5, eta_z=0.5)


def scaled_h(times: np.ndarray) -> np.ndarray:
  """Computes M h(t/K) by bisection of Lemma 6's equation."""
  y = 1000 * 0.5 * times / 10
  is_right = lambda x: np.expm1(x) + 999 * x > y
  return oracles.bisect(is_right, np.zeros_like(y), np.log1p(y))


def early() -> np.ndarray:
  """Times up to t0'."""
  return np.linspace(1e-3, growth.scanning_end(RUN), 1000)


def late() -> np.ndarray:
  """Times from t0 on."""
  return np.geomspace(1, 1e6, 1000) * growth.snapping_start(RUN)


def around_peak() -> np.ndarray:
  """A fine grid of times around the peak of gamma."""
  return np.linspace(0.7, 0.9, 20_001) * growth.scanning_end(RUN)


def speed_at(times: np.ndarray) -> np.ndarray:
  """The library's gamma."""
  return oracles.evaluate(growth.gamma, times, RUN)


def lemma_8_omega() -> float:
  """(1+ω₁) ln M = ln((M−1)(1+ω₁) ln M), by bisection: largest error."""
  sizes = np.array([30, 100, 1000, 10_000])
  log = np.log(sizes)
  is_right = lambda w: (1 + w) * log > np.log((sizes - 1) * (1 + w) * log)
  expected = oracles.bisect(is_right, np.zeros(4), np.full(4, 2.0))
  return oracles.gap(
      [growth.omega_1(size) for size in sizes.tolist()], expected
  )


def lemma_8_early() -> float:
  """e^{Mh} ≤ M−1 and e^{Mh} − 1 ≤ (M−1)Mh: largest ratio."""
  x = scaled_h(early())
  return oracles.largest(np.exp(x) / 999, np.expm1(x) / (999 * x))


def lemma_8_late() -> float:
  """e^{Mh} ≥ M−1 and e^{Mh} ≥ (M−1)Mh: largest ratio."""
  x = scaled_h(late())
  return oracles.largest(999 / np.exp(x), 999 * x / np.exp(x))


def gamma_meaning() -> float:
  """γ = (1−1/M) w_nᵀ(e_n − softmax(w_n)): largest error."""
  times = np.geomspace(1e-2, 1e5, 1000)
  label = np.eye(1000)[0]
  # w_n = (M - 1) h zeta_n = M h (e_n - 1/M).
  logits = scaled_h(times)[:, None] * (label - 1 / 1000)
  work = np.sum(logits * (label - oracles.softmax(logits)), axis=1)
  return oracles.gap(speed_at(times), 999 / 1000 * work)


def lemma_9_early() -> float:
  """1/4 ≤ γ / ((1−1/M)² η_Yt/K) ≤ 1: largest excess on either side."""
  ratio = speed_at(early()) / oracles.evaluate(growth.gamma_early, early(), RUN)
  return oracles.largest(ratio, 1 / (4 * ratio))


def lemma_9_late() -> float:
  """1/2 ≤ γ / ((1−1/M)² ln(Ms)/s) ≤ 2, s = η_Yt/K: largest excess."""
  ratio = speed_at(late()) / oracles.evaluate(growth.gamma_late, late(), RUN)
  return oracles.largest(ratio / 2, 1 / (2 * ratio))


def gamma_peak_time() -> float:
  """γ is largest at 0.816 t₀′ for M = 1000: difference."""
  peak = around_peak()[np.argmax(speed_at(around_peak()))]
  return abs(peak / growth.scanning_end(RUN) - 0.816)


def gamma_peak_closed_form() -> float:
  """The peak is (1−1/M) W((M−1)/e), W Lambert's: relative error on a grid."""
  times, speed = around_peak(), speed_at(around_peak())
  time, height = growth.gamma_peak(RUN)
  peak = np.argmax(speed)
  return max(abs(times[peak] / time - 1), abs(speed[peak] / height - 1))


# Theorem 1, Corollary 1 and Theorem 5: what the decoder sends back.


def theorem_1_errors(is_modified: bool) -> list[float]:
  """Relative errors of Theorem 1's leading order after 5000 steps, 8 draws."""
  features, num_steps = oracles.equal_overlap(5, 0.02), 5000
  run = growth.TheoryRun(num_tokens=200, num_classes=5, eta_y=0.5)
  speed = oracles.evaluate(growth.gamma, float(num_steps), run)
  expected = oracles.evaluate(dynamics.backpropagated_gradient, features, speed)
  draws = [np.random.default_rng(seed) for seed in range(8)]
  decoders = oracles.train_decoder(
      features,
      np.stack([draw.integers(5, size=num_steps) for draw in draws]),
      num_tokens=200,
      eta_y=0.5,
      is_modified=is_modified,
  )
  found = oracles.backpropagated(features, decoders)
  return [oracles.relative_gap(actual, expected) for actual in found]


def theorem_1_modified() -> float:
  """g_n = γ(ι_n f_n − Σ β f_n′), SGD, K = 5, M = 200, t = 5000: worst of 8."""
  return oracles.largest(*theorem_1_errors(is_modified=True))


def theorem_1_plain() -> float:
  """The same with the plain update of Y: worst relative error of 8 draws."""
  return oracles.largest(*theorem_1_errors(is_modified=False))


def corollary_1() -> float:
  """‖e_n − α_n‖ ≤ ε after K/η_Y (1/ε + ln(M/ε)) steps: steps / bound."""
  _, errors = oracles.softmax_decoder(400, 1000, 1.0)
  norm = np.linalg.norm(errors, axis=1)
  run = growth.TheoryRun(num_tokens=1000, num_classes=10, eta_y=1.0)
  ratios = [
      10 * np.argmax(norm <= epsilon) / growth.num_steps_bound(epsilon, run)
      for epsilon in (0.5, 0.1, 0.03, 0.01)
  ]
  return oracles.largest(*ratios)


NUM_STEPS = 2000


@functools.cache
def random_order() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws classes; returns their order, h(N/K), and the diagonal of Theta."""
  order = np.random.default_rng(0).integers(4, size=NUM_STEPS)
  counts = np.bincount(order)
  logits, _ = oracles.softmax_decoder(int(counts.max()), 50, 0.5)
  setting = dict(num_tokens=50, eta_y=0.5)
  h = oracles.evaluate(growth.h_continuous, NUM_STEPS / 4, **setting)
  return order, h, logits[counts, 0] / 49 / h - 1


def theorem_5_decoder() -> float:
  """Y = F(I−E′)(I+Θ)W̄ after 2000 random samples: largest error."""
  features = np.pad(oracles.equal_overlap(4, 0.3), ((0, 0), (0, 45)))
  order, h, theta = random_order()
  expected = oracles.train_decoder(
      features, order, num_tokens=50, eta_y=0.5, is_modified=True
  )
  actual = oracles.evaluate(
      growth.decoder_closed_form, features, np.arange(4), h, theta
  )
  return oracles.gap(actual, expected)


def theorem_5_theta() -> float:
  """|θ_n| ≤ K/√N √(ln(K/δ)), δ = .05: largest θ_n."""
  _, _, theta = random_order()
  return np.abs(theta).max()
