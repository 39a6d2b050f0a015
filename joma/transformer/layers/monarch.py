"""Monarch matrices: two block-diagonal factors with a permutation between.

  M = P L P^T R        (Monarch, https://arxiv.org/abs/2204.00595, section 3.1)

Of b blocks a of P inputs and b blocks j of S outputs, output s b + j is

  y[s, j] = sum_{a, r} left[j, a, r, s] sum_p right[a, p, j, r] x[a, p]

so that the slice of M that leads from block a to block j has the rank R of its
sum. The nearest such matrix to a given one therefore cuts the singular values
of each slice by itself (theorem 1 there, for R = 1):

  |M - A|^2 = the sum of squares of all that are left out.

Letters: D inputs, E outputs, b blocks, P = D / b, S = E / b, R rank.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num
import numpy as np

from joma.transformer import config as configs
from joma.transformer.layers import projections
from joma.transformer.layers import scanning
from scansnap_jax.experiment.errors import UserError

# Numbers of the arrays of a module that stand in for a kernel.
FACTORS = ("right", "left")
_MODULES = {
    "attn": ("query", "key", "value", "out"),
    "mlp": ("gate", "up", "down"),
}


class Monarch(nn.Module):
  """Takes the place of `nn.DenseGeneral`: x M + bias.

  Attributes:
    features: Sizes of the output's axes, E all together.
    sizes: Blocks and rank.
    num_axes: Last axes of x that are read, D all together.
    use_bias: Whether a bias [*features] is added.
    dtype: Of the products.
    scale: Variance of an output at first, that of inputs being 1.
  """

  features: tuple[int, ...]
  sizes: projections.Monarch
  num_axes: int = 1
  use_bias: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32
  scale: float = 1.0

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Multiplies the last axes."""
    lead = x.shape[: x.ndim - self.num_axes]
    num_in = math.prod(x.shape[len(lead) :])
    blocks, rank = self.sizes.blocks, self.sizes.rank
    inner, outer = num_in // blocks, math.prod(self.features) // blocks
    right = self.param(
        "right", _normal(1 / inner), (blocks, inner, blocks, rank)
    )
    # Of each output b R numbers are summed.
    left = self.param(
        "left",
        _normal(self.scale / (blocks * rank)),
        (blocks, blocks, rank, outer),
    )
    x, right, left = nn.dtypes.promote_dtype(x, right, left, dtype=self.dtype)
    out = product(x.reshape(*lead, num_in), right, left)
    out = out.reshape(*lead, *self.features)
    if not self.use_bias:
      return out
    bias = self.param("bias", nn.initializers.zeros, self.features)
    return out + bias.astype(out.dtype).reshape(
        (1,) * len(lead) + self.features
    )


def _normal(variance: float) -> nn.initializers.Initializer:
  """Normal numbers, cut at two deviations as those of dense kernels are."""
  cut = 0.87962566103423978  # Deviation of what is left of a unit normal.
  return nn.initializers.truncated_normal(variance**0.5 / cut)


def product(
    x: Float[Array, "*t D"],
    right: Float[Array, "b P b R"],
    left: Float[Array, "b b R S"],
) -> Float[Array, "*t E"]:
  """Returns x M by its factors, 2 R b (D + E) FLOPs a row."""
  blocks, inner = right.shape[:2]
  lead = x.shape[:-1]
  x = x.reshape(*lead, blocks, inner)
  between = jnp.einsum("...ap,apjr->...jar", x, right)
  out = jnp.einsum("...jar,jars->...sj", between, left)
  return out.reshape(*lead, -1)


def matrix_of(
    right: Num[Any, "b P b R"], left: Num[Any, "b b R S"]
) -> Float[Array, "D E"]:
  """Returns M."""
  found = jnp.einsum("apjr,jars->apsj", right, left)
  blocks, inner, outer, _ = found.shape
  return found.reshape(blocks * inner, outer * blocks)


def kernel_of(module: Mapping[str, Any]) -> Array:
  """The matrix of a projection's parameters; [D, E] of a Monarch one."""
  if "kernel" in module:
    return module["kernel"]
  return matrix_of(module["right"], module["left"])


def project(
    matrix: Float[np.ndarray, "D E"], sizes: projections.Monarch
) -> tuple[
    Float[np.ndarray, "b P b R"],
    Float[np.ndarray, "b b R S"],
    Float[np.ndarray, "b b Q"],
]:
  """Returns the nearest Monarch matrix, and what it leaves out.

  Args:
    matrix: A.
    sizes: Blocks and rank.

  Returns:
    (right, left, discarded): factors of equal size, and the singular values of
    each slice [a, j] that are left out, Q of them.

  Raises:
    UserError: The matrix cannot be cut so.
  """
  sizes.check("the matrix", *matrix.shape)
  blocks, rank = sizes.blocks, sizes.rank
  cut = matrix.astype(np.float64).reshape(
      blocks, matrix.shape[0] // blocks, -1, blocks
  )
  u, values, v = np.linalg.svd(cut.transpose(0, 3, 1, 2), full_matrices=False)
  roots = np.sqrt(values[..., :rank])
  right = (u[..., :rank] * roots[..., None, :]).transpose(0, 2, 1, 3)
  left = (v[..., :rank, :] * roots[..., None]).transpose(1, 0, 2, 3)
  kind = matrix.dtype
  return right.astype(kind), left.astype(kind), values[..., rank:]


def project_model(
    config: configs.TransformerConfig, params: Mapping[str, Any], text: str
) -> tuple[configs.TransformerConfig, dict[str, Any], dict[str, float]]:
  """Turns a model of dense matrices into one of Monarch matrices.

  Args:
    config: The model's.
    params: Its parameters, layers one by one.
    text: As in `TransformerConfig.projection`.

  Returns:
    (config, params, errors): of the new model, and |M - A| / |A| of each of its
    matrices, by its path.

  Raises:
    UserError: It is not dense, or cannot be cut so.
  """
  configs.require_dense(config, "A projection to Monarch matrices")
  new = dataclasses.replace(scanning.unrolled(config), projection=text)
  sizes = new.monarch
  if sizes is None:
    raise UserError(f"projection={text} is what the model has already.")
  changed: dict[str, Any] = dict(scanning.unstack(params))
  off: dict[str, float] = {}
  for layer in range(config.num_layers):
    name = f"layers_{layer}"
    changed[name] = dict(changed[name])
    for part in ("attn", "mlp"):
      if sizes.is_of(part):
        of_part, errors = _project_part(changed[name][part], part, sizes)
        changed[name][part] = of_part
        off |= {f"{name}/{part}/{k}": error for k, error in errors.items()}
  return new, changed, off


def _project_part(
    modules: Mapping[str, Any], part: str, sizes: projections.Monarch
) -> tuple[dict[str, Any], dict[str, float]]:
  found, errors = dict(modules), {}
  for name in _MODULES[part]:
    if name not in modules:
      continue
    kernel = np.asarray(modules[name]["kernel"])
    # Heads are part of the side that they are on: [D, N, H] or [N, H, D].
    num_in = math.prod(kernel.shape[:-1]) if name == "out" else len(kernel)
    matrix = kernel.reshape(num_in, -1)
    right, left, discarded = project(matrix, sizes)
    rest = {k: v for k, v in modules[name].items() if k != "kernel"}
    found[name] = rest | {
        "right": jnp.asarray(right),
        "left": jnp.asarray(left),
    }
    size = np.linalg.norm(matrix.astype(np.float64))
    errors[name] = float(np.linalg.norm(discarded) / max(size, 1e-30))
  return found, errors
