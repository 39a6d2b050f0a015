"""Every statement of Scan & Snap, measured.

`check_all` compares each law of `dynamics` with a computation that does not
use it (automatic differentiation over positions, the softmax decoder step by
step, Runge-Kutta in NumPy, stochastic gradients), in float64, and returns one
row per statement for a report. Statements: https://arxiv.org/abs/2305.16380.
"""

from collections.abc import Callable
from concurrent import futures
import dataclasses
import math

import jax

from scansnap_jax import growth
from scansnap_jax.theorems import attention
from scansnap_jax.theorems import decoder
from scansnap_jax.theorems import limits
from scansnap_jax.theorems import oracles


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
  return [_check(*row) for row in _CHECKS]


def begin_all(
    pool: futures.Executor,
) -> list[futures.Future[TheoremCheck]]:
  """Has a pool measure every statement, one task each, as `check_all` does.

  The programs of the statements are small and many: on a thread beside training
  they compile on a core that it leaves idle while its own programs compile.
  """
  return [pool.submit(_check, *row) for row in _CHECKS]


def _check(
    name: str, measure: Callable[[], float], bound: float
) -> TheoremCheck:
  # Of this thread alone: whatever trains meanwhile stays in float32.
  with jax.enable_x64(True):
    return TheoremCheck(name, _statement(measure), float(measure()), bound)


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
    ("Lemma 1, gradients", decoder.lemma_1_gradients, _EXACT),
    ("Lemma 1, row sums", decoder.lemma_1_row_sums, _EXACT),
    ("Lemma 2, finite T", decoder.lemma_2_finite, oracles.DELTA),
    ("Lemma 2, scale", limits.lemma_2_scale, _EXACT),
    # Five standard deviations of a frequency of 1/2.
    ("Lemma 2, T → ∞", decoder.lemma_2_limit, 2.5 / math.sqrt(100_000)),
    ("E′, sign", decoder.correlation_sign, _EXACT),
    ("Lemma 3, modified update", decoder.lemma_3_modified, _EXACT),
    ("Lemma 3, plain gradient", decoder.lemma_3_plain, _INTEGRATED),
    ("Lemma 5, w_n", decoder.lemma_5_logits, _EXACT),
    ("Lemma 5, e_n − α_n", decoder.lemma_5_error, _EXACT),
    ("Lemma 6, h", decoder.lemma_6, _INTEGRATED),
    (
        "Lemma 7, upper",
        decoder.lemma_7_upper,
        growth.h_gap_bound(num_tokens=1000, eta_y=1.0),
    ),
    ("Lemma 7, lower", decoder.lemma_7_lower, _EXACT),
    ("Lemma 7, first step", limits.lemma_7_rate, 1e-3),  # The next order, η_Y.
    ("Lemma 8, ω₁", decoder.lemma_8_omega, _EXACT),
    ("Lemma 8, t ≤ t₀′", decoder.lemma_8_early, 1.0),
    ("Lemma 8, t ≥ t₀", decoder.lemma_8_late, 1.0),
    ("Lemma 8, t₀", limits.lemma_8_start, 5 / 1000),
    ("Lemma 8, t₀′", limits.lemma_8_end, _INTEGRATED),
    ("γ, definition", decoder.gamma_meaning, _EXACT),
    ("Lemma 9, t ≤ t₀′", decoder.lemma_9_early, 1.0),
    ("Lemma 9, t ≥ t₀", decoder.lemma_9_late, 1.0),
    ("Lemma 9, t → 0", limits.lemma_9_start, _INTEGRATED),
    ("Lemma 9, t → ∞", limits.lemma_9_end, _INTEGRATED),
    ("γ, peak time", decoder.gamma_peak_time, _THREE_DIGITS),
    # One step of the grid.
    ("γ, peak closed form", decoder.gamma_peak_closed_form, 0.2 / 20_000),
    # K / sqrt(t) = .07 is how far class counts spread, at leading order.
    ("Theorem 1, modified update", decoder.theorem_1_modified, 0.05),
    ("Theorem 1, plain gradient", decoder.theorem_1_plain, 0.05),
    ("Theorem 1, large overlaps", limits.theorem_1_trained, _LEADING),
    ("Theorem 1(a), ξ_n > 0", attention.theorem_1_positive, 0.0),
    ("Theorem 1(a), ξ_n", attention.theorem_1_pressure, _LEADING),
    ("Corollary 1, number of steps", decoder.corollary_1, 1.0),
    (
        "Corollary 1, ε → 0",
        limits.corollary_1_small,
        1e-6,
    ),  # The next order, ε.
    # 2000 updates, each rounded.
    ("Theorem 5, Y", decoder.theorem_5_decoder, 1e-10),
    (
        "Theorem 5, Θ",
        decoder.theorem_5_theta,
        growth.theta_bound(decoder.NUM_STEPS, 4, oracles.DELTA),
    ),
    ("Lemma 4, ż_m", attention.lemma_4_trained, _LEADING),
    ("Theorem 2(a), distinct tokens", attention.theorem_2_distinct, _EXACT),
    ("Theorem 2(a), sign", attention.theorem_2_gain, 0.0),
    ("Theorem 2(b), common token", attention.theorem_2_common, _EXACT),
    ("Theorem 2(b), sign", attention.theorem_2_loss, 0.0),
    ("Corollary 2, common tokens", attention.corollary_2_velocity, _EXACT),
    ("Corollary 2, sign", attention.corollary_2_fall, 0.0),
    ("Corollary 2, norms", attention.corollary_2_norms, _INTEGRATED),
    ("Theorem 3, identity", attention.theorem_3_identity, _INTEGRATED),
    ("Theorem 3, sandwich", attention.theorem_3_sandwich, 1.0),
    # The next order, t.
    ("Theorem 3, t → 0", limits.theorem_3_start, 1e-6),
    ("Theorem 3, SGD", attention.theorem_3_sgd, _STOCHASTIC),
    ("Theorem 4, B_n", attention.theorem_4, _INTEGRATED),
    # M h >= s M / (2 (M - 1)) there: a factor of 2 inside 1/2 ln.
    ("Theorem 4, scanning", attention.theorem_4_scanning, 0.5 * math.log(2)),
    # M h >= ln(M s / 2) there, with M s >= M ln M = 6908.
    (
        "Theorem 4, snapping",
        attention.theorem_4_snapping,
        -0.5 * math.log(1 - math.log(2) / math.log(6908)),
    ),
    ("Theorem 4, t → 0", limits.theorem_4_scan_start, _INTEGRATED),
    ("Theorem 4, t → ∞", limits.theorem_4_snap_end, _EXACT),
    ("Theorem 4, printed", limits.theorem_4_constant, _EXACT),
    ("Theorem 4, B(t₀)", attention.theorem_4_start, _EXACT),
    ("Figure 9, left", attention.figure_9_left, _THREE_DIGITS),
    ("Figure 9, right", attention.figure_9_right, _THREE_DIGITS),
    ("Figure 9, dots", attention.figure_9_dots, _THREE_DIGITS),
)
