"""How far position interpolation can move an attention score.

The score of a query and a key at distance x is a trigonometric sum over pairs,
h_j the product of the query's pair and the key's conjugate, as complex numbers:

  a(x) = Re sum_j h_j e^(i x theta_j),  theta_j = b^(-2 j / d),  j < d / 2

A model trained on whole distances knows a(0), a(1), ...; interpolation by a
factor s asks for a(m / s) (https://arxiv.org/abs/2306.15595). Between
neighbours x1 and x2 = x1 + 1, what lies off their chord is bounded by the
curvature: with any f twice differentiable,

  |f(x) - chord(x)| <= max |f''| (x - x1) (x2 - x) / 2,

and |a''(x)| = |Re sum_j h_j theta_j^2 e^(i x theta_j)| <= max_j |h_j| S with

  S = sum_j theta_j^2 = sum_{j < d/2} b^(-4 j / d)
    = (1 - b^(-2)) / (1 - b^(-4 / d)),

a geometric sum, so |a - chord| <= max_j |h_j| S (x - x1) (x2 - x) / 2. With the
integral d / (4 ln b) of the summand in place of S the bound would be
d max |h| (x - x1) (x2 - x) / (8 ln b), but a falling function sums to more than
its integral, and this form fails: for h = 1 and b = 10^4 the error near x = 0
exceeds it by 10 % at d = 128, by 25 % at d = 64.

Unseen distances have no such bound: a(x) takes any value up to
sum_j |h_j| <= d max |h| / 2, and reaches it where every h_j e^(i x theta_j) is
real. At d = 128, b = 10^4 that is 128 times the bound at x1 + 1/2.
"""


def interpolation_error_bound(
    rotary_dim: int, rope_theta: float, fraction: float
) -> float:
  """Returns max |a - chord| / max_j |h_j| at x1 + fraction, see the module.

  Args:
    rotary_dim: d, even.
    rope_theta: b, above 1.
    fraction: Where between two whole distances, from 0 to 1.
  """
  squares = (1 - rope_theta**-2.0) / (1 - rope_theta ** (-4 / rotary_dim))
  return squares * fraction * (1 - fraction) / 2
