"""Where a bound is reached: the limits in which an inequality is an equation.

An inequality lets a wrong factor pass. Each statement here is the limit in
which a bound or a leading order of `decoder` and `attention` is exact, so that
a factor that is a per cent off is seen. https://arxiv.org/abs/2305.16380. The
docstring of a function is the statement, its result the measurement; `table`
holds it against its bound.
"""

import dataclasses
import math

import numpy as np

from scansnap_jax import dynamics
from scansnap_jax import flow
from scansnap_jax import gains
from scansnap_jax import growth
from scansnap_jax.theorems import attention
from scansnap_jax.theorems import decoder
from scansnap_jax.theorems import oracles


def lemma_2_scale() -> float:
  """The bound is √(2 ln(2/δ)) deviations of q_l at P = 1/2: relative error."""
  errors = []
  for seq_len in (2, 9, 128):
    # All that a context of T - 1 tokens can hold: the binomial distribution.
    ones = np.arange(seq_len)
    chance = [math.comb(seq_len - 1, k) / 2 ** (seq_len - 1) for k in ones]
    deviation = math.sqrt(np.dot(chance, (ones / (seq_len - 1) - 0.5) ** 2))
    bound = dynamics.frequency_bound(seq_len, oracles.DELTA)
    scale = math.sqrt(2 * math.log(2 / oracles.DELTA))
    errors.append(bound / (scale * deviation) - 1)
  return oracles.largest(np.abs(errors))


def lemma_7_rate() -> float:
  """h*(1) − h(1) → (η_Y/M)²/2 as η_Y → 0: relative error at η_Y = .001."""
  eta_y, size = 1e-3, 50
  setting = dict(num_tokens=size, eta_y=eta_y)
  # The step is eta_y / M. The flow slows down on its way: x = M h obeys
  # dx/ds = M eta_y / (M - 1 + e^x), so that x(1) = eta_y - eta_y^2 / (2 M) + ..
  gap = oracles.evaluate(growth.h_discrete, num_steps=1, **setting)[1]
  gap = gap - oracles.evaluate(growth.h_continuous, 1.0, **setting)
  expected = eta_y**2 / (2 * size**2)
  return abs(gap / expected - 1)


def lemma_8_start() -> float:
  """e^{Mh} = (M−1)Mh at t₀, but for O(1/M): |ratio − 1|."""
  x = decoder.scaled_h(np.array([growth.snapping_start(decoder.RUN)]))
  return abs(float(np.exp(x[0]) / (999 * x[0])) - 1)


def lemma_8_end() -> float:
  """The line h = η_Yt/(MK) reaches e^{Mh} = M at t₀′: relative error."""
  time = growth.scanning_end(decoder.RUN)
  slope = decoder.speed_at(np.array([1e-9]))[0] / 1e-9
  # gamma ~ (1 - 1/M)^2 M h at the start, so that its slope gives that of M h.
  return abs(math.exp(slope * time / 0.999**2) / 1000 - 1)


def lemma_9_start() -> float:
  """γ / ((1−1/M)² η_Yt/K) → 1 as t → 0: |ratio − 1|."""
  time = np.array([1e-9])
  leading = oracles.evaluate(growth.gamma_early, time, decoder.RUN)
  return oracles.gap(decoder.speed_at(time) / leading, 1)


def lemma_9_end() -> float:
  """γ / ((1−1/M)² ln(Ms)/s) → 1 as t → ∞: |ratio − 1|."""
  time = np.array([1e30])
  leading = oracles.evaluate(growth.gamma_late, time, decoder.RUN)
  return oracles.gap(decoder.speed_at(time) / leading, 1)


def theorem_1_trained() -> float:
  """g_n = γ(ι_n f_n − Σ β f_n′), overlaps .77, round robin: relative error."""
  features, g, speed = attention.trained()
  expected = oracles.evaluate(dynamics.backpropagated_gradient, features, speed)
  return oracles.relative_gap(g, expected)


def corollary_1_small() -> float:
  """‖e_n − α_n‖ = ε at the bound as ε → 0, by Lemma 6: |ratio − 1|."""
  epsilon, run = 1e-7, decoder.RUN
  time = growth.num_steps_bound(epsilon, run)
  x = decoder.scaled_h(np.array([time]))
  return oracles.gap(1000 / (999 + np.exp(x)) / epsilon, 1)


def theorem_3_start() -> float:
  """With f = f(0): ln χ = 2f²B, the lower is the upper's f²th power: error."""
  probs = attention.one_common()
  attn_logits, exponent = oracles.evaluate(
      flow.integrate_attention,
      # As many times as the other paths have: one program serves all.
      *(np.linspace(0, 1e-3, 13), np.zeros((13, 13)), probs, np.zeros(3, int)),
      gamma=attention.speed_of_three,
      eta_z=0.5,
  )
  grown = 2 * attn_logits[-1, 0, 4]
  feature = oracles.unit(probs)[0, 4]
  lower, upper = oracles.evaluate(
      gains.gain_growth_bounds, feature, exponent[-1, 0]
  )
  return oracles.largest(
      abs(math.log(lower) / grown - 1),
      abs(math.log(lower) / math.log(upper) / feature**2 - 1),
  )


def theorem_4_scan_start() -> float:
  """B over its scanning form → 1 as t → 0: |ratio − 1|."""
  time = np.array([1e-6])
  leading = oracles.evaluate(gains.scanning_exponent, time, attention.PHASES)
  actual = oracles.evaluate(gains.gain_exponent, time, attention.PHASES)
  return oracles.gap(actual / leading, 1)


def theorem_4_snap_end() -> float:
  """B less its snapping form → 0 as t → ∞: difference."""
  time = np.array([1e30])
  leading = oracles.evaluate(gains.snapping_exponent, time, attention.PHASES)
  actual = oracles.evaluate(gains.gain_exponent, time, attention.PHASES)
  return oracles.gap(actual, leading)


def theorem_4_constant() -> float:
  """The printed B_n less B_n is ¼ ln C₀, C₀ = .2, 1, 5: largest error."""
  errors = []
  for c0 in attention.C0:
    run = dataclasses.replace(attention.PHASES, c0=c0)
    printed = oracles.evaluate(gains.gain_exponent_as_printed, 10.0, run)
    actual = oracles.evaluate(gains.gain_exponent, 10.0, run)
    errors.append(printed - actual - math.log(c0) / 4)
  return oracles.gap(errors, 0)
