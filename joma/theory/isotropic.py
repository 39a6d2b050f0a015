"""Theorem 3 of JoMA (https://arxiv.org/abs/2310.00535): nonlinear activation.

Attention is uniform, and x a mixture of isotropic clouds around centres
x-bar_j, in each of which the backpropagated gradient g is constant. Then
dv/dt = E[g phi'(v^T x + xi) x] is

  dv/dt = 1/|v| sum_j a_j theta_1(r_j) x-bar_j
          + 1/|v|^3 sum_j a_j theta_2(r_j) v

  a_j = E[g | j] P(j),   r_j = v^T x-bar_j + xi
  theta_1(r) = int phi'(s) p((s - r) / |v|) ds
  theta_2(r) = int (s - r) phi'(s) p((s - r) / |v|) ds

with p the density of one coordinate of the centred x. Derived here: of a
centred x only its part along v survives the average over directions, so the
statement is exact for every isotropic p, Gaussian or not, and s = r + |v| y
turns it into averages over y ~ p, which is how it is computed:

  dv/dt = sum_j a_j (E[phi'(r_j + |v| y)] x-bar_j
                     + E[y phi'(r_j + |v| y)] v / |v|).

The paper goes on, heuristically, to dv/dt ~ mu - v near a critical point
aligned with one centre; `convergence` starts from there.

Letters as in `joma.theory`.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from scansnap_jax.dynamics import Scalar

Moments = tuple[Float[Array, "J"], Float[Array, "J"]]


def moments(
    r: Float[Array, "J"],
    norm: Scalar,
    phi: Callable[[Array], Array],
    *,
    density: Callable[[Array], Array],
    reach: float,
    num_nodes: int = 100,
) -> Moments:
  """Computes E[phi'(r + |v| y)] and E[y phi'(r + |v| y)] by quadrature.

  They are theta_1 / |v| and theta_2 / |v|^2. Gauss-Legendre on both sides of
  r + |v| y = 0, so that activations may have a kink at 0.

  Args:
    r: r_j.
    norm: |v|, positive.
    phi: The activation, elementwise.
    density: p(y).
    reach: p vanishes, or may be neglected, beyond |y| = reach.
    num_nodes: Quadrature nodes on each side.

  Returns:
    Both averages for each cloud.
  """
  nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
  # Where the preactivation r + |v| y changes sign. On either side phi' of ReLU
  # is smooth, and the quadrature keeps its order.
  kink = jnp.clip(-r / norm, -reach, reach)[:, None]

  def side(low: Scalar | Array, high: Scalar | Array) -> Float[Array, "2 J"]:
    half = (high - low) / 2
    y = jnp.asarray(low + half * (1 + nodes)[None])
    inner = r[:, None] + norm * y
    # phi' by differentiation, so that any activation may be given.
    slope = jax.jvp(phi, (inner,), (jnp.ones_like(inner),))[1]
    terms = half * weights[None] * density(y) * slope
    return jnp.stack([terms.sum(axis=1), (y * terms).sum(axis=1)])

  first, second = side(-reach, kink) + side(kink, reach)
  return first, second


def gaussian_density(std: float) -> Callable[[Array], Array]:
  """Returns p of a Gaussian cloud; 10 std reach far enough for float64."""
  scale = 1 / (std * math.sqrt(2 * math.pi))
  return lambda y: scale * jnp.exp(-((y / std) ** 2) / 2)


def relu_moments(r: Float[Array, "J"], norm: Scalar, std: Scalar) -> Moments:
  """Computes `moments` for ReLU and a Gaussian cloud (derived here).

  E[phi'] = Phi(u) and E[y phi'] = std N(u), u = r / (std |v|), with Phi and N
  the standard normal distribution and density.

  Args:
    r: r_j.
    norm: |v|, positive.
    std: Standard deviation of each coordinate.

  Returns:
    Both averages for each cloud.
  """
  u = r / (std * norm)
  return jax.scipy.stats.norm.cdf(u), std * jax.scipy.stats.norm.pdf(u)


def quadratic_moments(
    r: Float[Array, "J"], norm: Scalar, std: Scalar
) -> Moments:
  """Computes `moments` for phi = h^2 / 2: r and std^2 |v| (derived here)."""
  return r, jnp.broadcast_to(jnp.asarray(std**2 * norm, r.dtype), r.shape)


def velocity(
    v: Float[Array, "M"],
    centers: Float[Array, "J M"],
    amounts: Float[Array, "J"],
    offset: Scalar,
    moments_of: Callable[[Float[Array, "J"], Scalar], Moments],
) -> Float[Array, "M"]:
  """Computes dv/dt (Theorem 3).

  Args:
    v: Components, not all zero.
    centers: x-bar_j.
    amounts: a_j.
    offset: xi.
    moments_of: `moments`, or a closed form, as a function of r_j and |v|.

  Returns:
    dv/dt.
  """
  # Off the direction of v a centred isotropic x averages to 0: two numbers for
  # each cloud are left of the integral over x.
  norm = jnp.linalg.norm(v)
  along_center, along_v = moments_of(centers @ v + offset, norm)
  return (amounts * along_center) @ centers + amounts @ along_v / norm * v
