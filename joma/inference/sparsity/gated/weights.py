"""The matrices of one MLP, and what they make of what is given to them.

Letters: D width, F neurons.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.transformer import config as configs
from kernels_pallas import activations

# Bits of a weight: what is kept in fewer counts as less than a weight.
BITS = 16


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kernels", "biases"),
    meta_fields=("activation",),
)
@dataclasses.dataclass(frozen=True)
class Weights:
  """Of one MLP, gated or not; `kernels` and `biases` by name.

  Attributes:
    kernels: up and, where it is gated, gate [D, F]; down [F, D].
    biases: Those that there are.
    activation: Name of the activation.
  """

  kernels: Mapping[str, Array]
  biases: Mapping[str, Array]
  activation: str

  @property
  def inner(self) -> tuple[str, ...]:
    """Names of the matrices that read x."""
    return ("up", "gate") if "gate" in self.kernels else ("up",)

  @property
  def matrix(self) -> int:
    """D F, the weights of one matrix."""
    return self.kernels["up"].size

  @property
  def size(self) -> int:
    """Weights of all of them, biases aside."""
    return (len(self.inner) + 1) * self.matrix

  def biased(self, name: str, product: Array) -> Array:
    """Adds a matrix's bias to its product, where it has one."""
    if name not in self.biases:
      return product
    bias = self.biases[name]
    return product + bias.reshape((1,) * (product.ndim - 1) + (-1,))

  def hidden(
      self, product: Callable[[str], Float[Array, "*b F"]]
  ) -> Float[Array, "*b F"]:
    """h, of products with up and gate by name."""
    made = {name: self.biased(name, product(name)) for name in self.inner}
    act = activations.ACTIVATIONS[self.activation]
    return act(made["gate"]) * made["up"] if "gate" in made else act(made["up"])

  def dense_hidden(self, x: Float[Array, "*b D"]) -> Float[Array, "*b F"]:
    """Returns h of all neurons."""
    return self.hidden(lambda name: x @ self.kernels[name])

  def out(self, hidden: Float[Array, "*b F"]) -> Float[Array, "*b D"]:
    """What is added to the residual stream."""
    return self.biased("down", hidden @ self.kernels["down"])

  def moves(self) -> Float[Array, "F"]:
    """How far a neuron of activation 1 moves the residual stream."""
    return jnp.linalg.norm(self.kernels["down"], axis=-1)


def of_layer(
    config: configs.TransformerConfig, params: Mapping[str, Any]
) -> Weights:
  """Those of an MLP's parameters, as float32."""
  wide = lambda kind: {
      name: part[kind].astype(jnp.float32)
      for name, part in params.items()
      if kind in part
  }
  return Weights(wide("kernel"), wide("bias"), config.activation)
