"""Activations of MLPs by name, for models and kernels alike."""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "identity": lambda x: x,
    "quadratic": jnp.square,
}


@jax.custom_jvp
def gelu_by_erf(x: Array) -> Array:
  """Gelu by erf alone, for kernels of a TPU, which has no erfc."""
  return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


@gelu_by_erf.defjvp
def _slope_of_gelu(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
  """Phi(x) + x phi(x); jax's own, from 0.12 on, wants an exact exp of a TPU."""
  (x,), (tangent,) = primals, tangents
  below = 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))
  density = jnp.exp(-0.5 * jnp.square(x)) * (2 * math.pi) ** -0.5
  return gelu_by_erf(x), (below + x * density) * tangent
