"""Lemma 4, Theorems 1(a) and 2 to 4 and Corollary 2, measured.

https://arxiv.org/abs/2305.16380. The docstring of a function is the statement,
its result the measurement; `theorems` holds it against its bound.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from scansnap_jax import dynamics
from scansnap_jax import flow
from scansnap_jax import gains
from scansnap_jax import growth
from scansnap_jax.theorems import oracles

# Lemma 4, Theorem 2 and Corollary 2: the fates of tokens. One query, three
# classes, common tokens first, then the distinct tokens of each class.


def one_common() -> np.ndarray:
  """P(l|n) of three classes with one common token."""
  probs = np.zeros((3, 13))
  probs[:, 0] = 1
  for n in range(3):
    probs[n, 1 + 4 * n : 5 + 4 * n] = [0.1, 0.2, 0.3, 0.4]
  return probs / probs.sum(axis=1, keepdims=True)


def two_common() -> np.ndarray:
  """Builds Corollary 2's data; the last two tokens never occur."""
  probs = np.zeros((3, 13))
  probs[:, :2] = [0.3, 0.1]
  for n in range(3):
    probs[n, 2 + 3 * n : 5 + 3 * n] = np.roll([0.1, 0.2, 0.3], n)
  return probs


@functools.cache
def trained() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Trains a decoder round robin; returns F, the real g_n, and gamma."""
  features, rounds = oracles.unit(one_common()), 50
  decoder = oracles.train_decoder(
      *(features, np.tile(np.arange(3), rounds)),
      num_tokens=2000,
      eta_y=0.05,
      is_modified=True,
  )
  run = growth.TheoryRun(num_tokens=2000, num_classes=3, eta_y=0.05)
  speed = oracles.evaluate(growth.gamma, 3.0 * rounds, run)
  return features, oracles.backpropagated(features, decoder), speed


@functools.cache
def trained_velocity() -> np.ndarray:
  """Differentiates sum_n f_n(z)^T g_n, one row of Z, at z = 0."""
  _, g, _ = trained()

  def work(z: Float[Array, "M"]) -> Float[Array, ""]:
    scores = one_common() * jnp.exp(z)[None]
    return jnp.sum(scores / jnp.linalg.norm(scores, axis=1)[:, None] * g)

  return oracles.evaluate(jax.grad(work), np.zeros(13))


def component_velocity(
    probs: np.ndarray, query: np.ndarray | None = None
) -> np.ndarray:
  """Sums Lemma 4 component by component, gamma = eta_z = 1, at Z = 0.

  Args:
    probs: P(l|n), [K, M].
    query: psi(n); None is token 0 for all.

  Returns:
    dZ/dt, [M, M].
  """
  f = oracles.unit(probs)
  query = np.zeros(len(f), int) if query is None else query
  beta = -np.linalg.inv(f @ f.T)
  velocity = np.zeros((f.shape[1], f.shape[1]))
  for n in range(len(f)):
    for other in set(range(len(f))) - {n}:
      push = f[n] @ f[other] * f[n] - f[other]
      velocity[query[n]] += f[n] * beta[n, other] * push
  return velocity


def lemma_4_trained() -> float:
  """ż_m against autodiff of a trained decoder: relative error."""
  features, _, speed = trained()
  actual = oracles.evaluate(
      dynamics.attention_velocity, features, np.zeros(3, int), speed
  )
  return oracles.relative_gap(actual[0], trained_velocity())


def pressure() -> np.ndarray:
  """Reads xi_n off the real g_n: Lemma 1 for a distinct token of n."""
  f, g, _ = trained()
  own = 1 + 4 * np.arange(3)
  return g[range(3), own] / f[range(3), own] - np.sum(f * g, axis=1)


def theorem_1_positive() -> float:
  """Pressure by a trained decoder's gradients: classes with ξ_n ≤ 0."""
  return oracles.count_failures(pressure() > 0)


def theorem_1_pressure() -> float:
  """ξ_n = γ Σ β f_nᵀf_n′ against a trained decoder's gradients: rel. error."""
  features, _, speed = trained()
  actual = oracles.evaluate(dynamics.xi, features, speed)
  return oracles.relative_gap(actual, pressure())


def theorem_2_distinct() -> float:
  """ż_ml = η_Z f_nl² ξ_n, by components: largest error."""
  features = oracles.unit(one_common())
  velocity = oracles.evaluate(dynamics.distinct_velocity, features, 1.0)
  actual = np.where(features > 0, velocity, 0).sum(axis=0)
  return oracles.gap(actual[1:], component_velocity(one_common())[0, 1:])


def theorem_2_common() -> float:
  """ż_ml = −η_Z Σ_n (1−f_nl²) ξ_n, by components: error."""
  features = oracles.unit(one_common())
  velocity = oracles.evaluate(dynamics.common_velocity, features, 1.0)
  return oracles.gap(
      velocity[:, 0].sum(), component_velocity(one_common())[0, 0]
  )


def theorem_2_gain() -> float:
  """Distinct tokens gain under the trained decoder: how many do not."""
  return oracles.count_failures(trained_velocity()[1:] > 0)


def theorem_2_loss() -> float:
  """The only common token loses under the trained decoder: 1 if not."""
  return oracles.count_failures(trained_velocity()[0] < 0)


def speed_of_three(t: jax.Array) -> jax.Array:
  """Speed control of three classes of one query."""
  run = growth.TheoryRun(num_tokens=1000, num_classes=3, eta_y=1.0)
  return growth.gamma(t, run)


@functools.cache
def path(is_one_common: bool) -> tuple[np.ndarray, np.ndarray]:
  """Integrates Lemma 4; returns the query's row of Z, and B_n, over time."""
  probs = one_common() if is_one_common else two_common()
  attn_logits, exponent = oracles.evaluate(
      flow.integrate_attention,
      *(np.linspace(0.0, 60.0, 13), np.zeros((13, 13)), probs),
      np.zeros(3, int),
      gamma=speed_of_three,
      eta_z=0.5,
  )
  return attn_logits[:, 0], exponent


def corollary_2_velocity() -> float:
  """Common tokens: ż_l = −η_Zf_l²(1−f_nᵀf_n′)γΣβ, by components: error."""
  features = oracles.unit(two_common())
  actual = oracles.evaluate(dynamics.symmetric_common_velocity, features, 1.0)
  return oracles.gap(actual[:2], component_velocity(two_common())[0, :2])


def corollary_2_fall() -> float:
  """Every common token falls all along the flow: how often not."""
  attn_logits, _ = path(is_one_common=False)
  return oracles.count_failures(np.diff(attn_logits[:, :2], axis=0) < 0)


def corollary_2_norms() -> float:
  """‖c̃_n‖ stay equal across classes: largest relative difference."""
  attn_logits, _ = path(is_one_common=False)
  scores = two_common() * np.exp(attn_logits)[:, None]
  norm = np.linalg.norm(scores, axis=-1)
  return oracles.gap(norm / norm[:, :1], 1)


# Theorems 3 and 4: relative gain, scanning and snapping.


def gain_error(
    probs: np.ndarray, attn_logits: np.ndarray, token: int, others: list[int]
) -> float:
  """Compares r(t) / r(0) with chi(t); the first row of Z is the start."""
  scores = probs * np.exp(attn_logits)
  chi = oracles.evaluate(gains.gain_growth, attn_logits[:, token], 0.0)
  gain = np.stack([
      oracles.evaluate(gains.relative_gain, scores, token, other)
      for other in others
  ])
  return oracles.gap(gain / (gain[:, :1] * chi), 1)


def theorem_3_identity() -> float:
  """Gain r(t) = r(0) χ(t) along Lemma 4: largest relative error."""
  attn_logits, _ = path(is_one_common=True)
  return gain_error(one_common()[0], attn_logits, 4, [1, 2, 3])


def theorem_3_sandwich() -> float:
  """e^{2f(0)²B} ≤ χ ≤ e^{2B}: largest excess on either side."""
  attn_logits, exponent = path(is_one_common=True)
  chi = np.exp(2 * attn_logits[1:, 4])
  feature = oracles.unit(one_common())[0, 4]
  lower, upper = oracles.evaluate(
      gains.gain_growth_bounds, feature, exponent[1:, 0]
  )
  return oracles.largest(lower / chi, chi / upper)


def theorem_3_sgd() -> float:
  """Gain r = r(0) χ, Syn-Small, η_Y = 10η_Z = 1, 4 seeds: largest error."""
  ends = [oracles.stochastic_attention(seed)[0] for seed in range(4)]
  attn_logits = np.stack([np.zeros(34), *ends])
  return gain_error(oracles.syn_small()[0], attn_logits, 19, [18, 15, 10])


C0 = (0.2, 1.0, 5.0)
PHASES = growth.TheoryRun(num_tokens=1000, num_classes=10, eta_y=1.0, eta_z=0.5)


@functools.cache
def exponent_path() -> tuple[np.ndarray, np.ndarray]:
  """Integrates M h, z_l and B_n together, for each C0; returns t and B_n."""
  # Steps grow with t as the motion slows down.
  times, c0 = 2000 * np.linspace(0, 1, 2501) ** 3, np.array(C0)

  def velocity(state: np.ndarray) -> np.ndarray:
    x, z, _ = state
    slow = 1 / (999 + np.exp(x))
    xi = 999 * 0.999 * x * slow * np.exp(4 * z) / c0
    return np.stack([1000 / 10 * slow, -0.5 * xi, 0.5 * xi])

  return times, oracles.rk4(velocity, np.zeros((3, 3)), times)[:, 2]


def theorem_4() -> float:
  """B = ¼ ln[(C₀ + 2(η_Z/η_Y)K(M−1)²h²)/C₀], C₀ = .2, 1, 5: largest error."""
  times, exponent = exponent_path()
  runs = [dataclasses.replace(PHASES, c0=c0) for c0 in C0]
  actual = [oracles.evaluate(gains.gain_exponent, times, run) for run in runs]
  return oracles.gap(actual, exponent.T)


def theorem_4_scanning() -> float:
  """B ≈ ¼ ln(1 + 2η_Yη_Zt²(1−1/M)²/(KC₀)), t ≤ t₀′: largest gap."""
  times, exponent = exponent_path()
  is_early = times <= growth.scanning_end(PHASES)
  leading = oracles.evaluate(gains.scanning_exponent, times[is_early], PHASES)
  return oracles.gap(leading, exponent[is_early, 1])


def theorem_4_snapping() -> float:
  """B ≈ ¼ ln(1 + 2K/(νC₀) (1−1/M)² ln²(1+Ms)), t ≥ t₀: largest gap."""
  times, exponent = exponent_path()
  is_late = times >= growth.snapping_start(PHASES)
  leading = oracles.evaluate(gains.snapping_exponent, times[is_late], PHASES)
  return oracles.gap(leading, exponent[is_late, 1])


def figure_9(
    num_tokens: int, nu: float, time: Callable[[growth.TheoryRun], Any]
) -> np.ndarray:
  """Computes B_n at a time for the five eta_z of Figure 9, K = C0 = 1."""
  exponents = []
  for eta_z in (0.5, 1.0, 2.0, 4.0, 8.0):
    run = growth.TheoryRun(
        num_tokens=num_tokens, num_classes=1, eta_y=nu * eta_z, eta_z=eta_z
    )
    exponents.append(oracles.evaluate(gains.gain_exponent, time(run), run))
  return np.asarray(exponents)


def figure_9_left() -> float:
  """B(5) = .620 .671 .713 .749 .783 (M = 100, ν = 10): largest error."""
  expected = [0.620, 0.671, 0.713, 0.749, 0.783]
  return oracles.gap(figure_9(100, 10.0, lambda run: 5.0), expected)


def figure_9_right() -> float:
  """B(50) = 1.408 1.450 1.481 1.509 1.533 (M = 10⁴, ν = 1): error."""
  expected = [1.408, 1.450, 1.481, 1.509, 1.533]
  return oracles.gap(figure_9(10_000, 1.0, lambda run: 50.0), expected)


def figure_9_dots() -> float:
  """B = .549 for every η_Z at t = 2·1.33 ln M/η_Y: largest error."""
  # The figure rounds 1 + omega_1 to 1.33; for M = 100 it is 1.403.
  start = lambda run: 2.66 * math.log(100) / run.eta_y
  return oracles.gap(figure_9(100, 10.0, start), 0.549)


def theorem_4_start() -> float:
  """B(t₀) depends on η_Y/η_Z alone: spread over η_Z from .5 to 8."""
  return np.ptp(figure_9(100, 10.0, growth.snapping_start))
