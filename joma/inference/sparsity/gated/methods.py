"""What a token reads of an MLP's weights, and what comes out.

Quantized     all, in few bits: what leaving out is measured against
Teal          entries of x and of h above thresholds, in size
              (https://arxiv.org/abs/2408.14690)
RSparse       as Teal; entries below go through matrices of low rank
              (R-Sparse, https://arxiv.org/abs/2504.19449)
Cats          neurons with a large act(gate); gate is computed of all
              (https://arxiv.org/abs/2404.08763)
Oracle        the neurons that move the residual stream most
Sketched      those that do by copies of gate and up of low rank
Coded         those that do by copies of gate and up in few bits; `is_filled`
              has the others as the copies and one of down make them
Learned       the blocks that a predictor scores highest

A method is static and hashable; what it was calibrated to are arrays of its
layer. `read` counts weights of 16 bits, those of copies as the share that their
bits are.

Letters: D width, F neurons, U blocks of neurons, r rank, g numbers of a group.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from joma.inference.sparsity import predictors
from joma.inference.sparsity import sparsity_labels
from joma.inference.sparsity.gated import weights as weights_lib

Weights = weights_lib.Weights


class Update(NamedTuple):
  """What a method makes of x.

  Attributes:
    out: As the MLP's.
    read: Weights that each token read.
  """

  out: Float[Array, "*b D"]
  read: Float[Array, "*b"]


@runtime_checkable
class Method(Protocol):
  """See the module."""

  def update(
      self,
      weights: Weights,
      x: Float[Array, "*b D"],
      arrays: Mapping[str, Any],
  ) -> Update:
    """Computes the MLP of x.

    Args:
      weights: Of the layer.
      x: What the MLP reads.
      arrays: What the method was calibrated to, of this layer.
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
  """All weights, rounded.

  Attributes:
    bits: Of a code.
    group_size: g, inputs of an output that share a scale of 16 bits.
  """

  bits: int = 8
  group_size: int = 32

  def update(
      self,
      weights: Weights,
      x: Float[Array, "*b D"],
      arrays: Mapping[str, Any],
  ) -> Update:
    """Reads all codes."""
    del arrays
    kernels = {
        name: rounded(kernel, self.bits, self.group_size)
        for name, kernel in weights.kernels.items()
    }
    weights = dataclasses.replace(weights, kernels=kernels)
    share = share_of_codes(self.bits, self.group_size)
    read = jnp.full(x.shape[:-1], share * weights.size)
    return Update(weights.out(weights.dense_hidden(x)), read)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teal:
  """Thresholds `least_x` and `least_h`."""

  def update(
      self,
      weights: Weights,
      x: Float[Array, "*b D"],
      arrays: Mapping[str, Any],
  ) -> Update:
    """Reads rows of matrices whose input is large."""
    product = (
        lambda name, kept, x: jnp.where(kept, x, 0) @ weights.kernels[name]
    )
    return _by_inputs(weights, x, arrays, product)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RSparse:
  """Thresholds as Teal's; `low_NAME` of each matrix has `first` and `last`.

  Attributes:
    rank: r.
  """

  rank: int

  def update(
      self,
      weights: Weights,
      x: Float[Array, "*b D"],
      arrays: Mapping[str, Any],
  ) -> Update:
    """Adds what small inputs give by a matrix of low rank."""

    def product(name: str, kept: Array, x: Array) -> Array:
      low = arrays[f"low_{name}"]
      large = jnp.where(kept, x, 0) @ weights.kernels[name]
      return large + (jnp.where(kept, 0, x) @ low["first"]) @ low["last"]

    found = _by_inputs(weights, x, arrays, product)
    per_matrix = self.rank * sum(weights.kernels["up"].shape)
    return found._replace(read=found.read + per_matrix * len(weights.kernels))


def _by_inputs(weights: Weights, x: Array, arrays: Any, product: Any) -> Update:
  """A method that leaves out small inputs of every matrix."""
  x_kept = is_large(x, arrays["least_x"])
  hidden = weights.hidden(lambda name: product(name, x_kept, x))
  h_kept = is_large(hidden, arrays["least_h"])
  out = weights.biased("down", product("down", h_kept, hidden))
  inputs = len(weights.inner) * _share(x_kept) + _share(h_kept)
  return Update(out, inputs * weights.matrix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cats:
  """Threshold `least` of |act|; the matrix before it is read whole."""

  def update(
      self,
      weights: Weights,
      x: Float[Array, "*b D"],
      arrays: Mapping[str, Any],
  ) -> Update:
    """Reads the matrix before the activation, then rows of the others."""
    kept = is_large(activation(weights, x), arrays["least"])
    out = weights.out(jnp.where(kept, weights.dense_hidden(x), 0))
    rest = _share(kept) * len(weights.inner)
    return Update(out, weights.matrix * (1 + rest))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chooser:
  """Computes the `num` blocks of the greatest scores.

  Attributes:
    block_size: Neurons of a block; divides F.
  """

  block_size: int = 1

  def scores(
      self, weights: Weights, x: Float[Array, "*b D"], arrays: Mapping[str, Any]
  ) -> Float[Array, "*b U"]:
    """Of the blocks."""
    raise NotImplementedError

  def overhead(self, weights: Weights) -> int | float:
    """Weights that scores take."""
    raise NotImplementedError

  def kept(
      self, weights: Weights, x: Float[Array, "*b D"], arrays: Mapping[str, Any]
  ) -> Bool[Array, "*b F"]:
    """Marks the chosen neurons."""
    scores = self.scores(weights, x, arrays)
    kept = sparsity_labels.keep_top(scores, arrays["num"])
    return jnp.repeat(kept, self.block_size, axis=-1)

  def update(
      self,
      weights: Weights,
      x: Float[Array, "*b D"],
      arrays: Mapping[str, Any],
  ) -> Update:
    """Reads chosen neurons whole."""
    kept = self.kept(weights, x, arrays)
    out = weights.out(jnp.where(kept, weights.dense_hidden(x), 0))
    return Update(out, _share(kept) * weights.size + self.overhead(weights))

  def _of_blocks(
      self, weights: Weights, hidden: Float[Array, "*b F"]
  ) -> Float[Array, "*b U"]:
    """How far blocks move the residual stream, their neurons by themselves."""
    moves = weights.moves().reshape((1,) * (hidden.ndim - 1) + (-1,))
    squares = jnp.square(hidden * moves)
    return sparsity_labels.to_blocks(squares, self.block_size).sum(axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(_Chooser):
  """Knows h."""

  def scores(
      self, weights: Weights, x: Float[Array, "*b D"], arrays: Mapping[str, Any]
  ) -> Float[Array, "*b U"]:
    """By h itself."""
    del arrays
    return self._of_blocks(weights, weights.dense_hidden(x))

  def overhead(self, weights: Weights) -> int | float:
    """Nothing: no method can do as much."""
    del weights
    return 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sketched(_Chooser):
  """By h of `low_up` and `low_gate`.

  Attributes:
    rank: r.
  """

  rank: int

  def scores(
      self, weights: Weights, x: Float[Array, "*b D"], arrays: Mapping[str, Any]
  ) -> Float[Array, "*b U"]:
    """By the sketch."""
    low = lambda name: arrays[f"low_{name}"]
    product = lambda name: (x @ low(name)["first"]) @ low(name)["last"]
    return self._of_blocks(weights, weights.hidden(product))

  def overhead(self, weights: Weights) -> int | float:
    """Both factors of each inner matrix, and the norms of down's rows."""
    width, num = weights.kernels["up"].shape
    return len(weights.inner) * self.rank * (width + num) + num


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coded(_Chooser):
  """By h of copies in few bits.

  Attributes:
    bits: Of a code.
    group_size: g, as in `Quantized`.
    is_filled: Whether neurons that are not chosen are as the copies have them,
      of down too, instead of 0.
  """

  bits: int = 4
  group_size: int = 32
  is_filled: bool = False

  def scores(
      self, weights: Weights, x: Float[Array, "*b D"], arrays: Mapping[str, Any]
  ) -> Float[Array, "*b U"]:
    """By the copies."""
    del arrays
    return self._of_blocks(weights, self._hidden(weights, x))

  def update(
      self,
      weights: Weights,
      x: Float[Array, "*b D"],
      arrays: Mapping[str, Any],
  ) -> Update:
    """Reads chosen neurons whole, and the copies of the others."""
    found = super().update(weights, x, arrays)
    if not self.is_filled:
      return found
    rest = jnp.where(self.kept(weights, x, arrays), 0, self._hidden(weights, x))
    return found._replace(out=found.out + rest @ self._copy(weights, "down"))

  def overhead(self, weights: Weights) -> int | float:
    """All codes, and the norms of down's rows."""
    share = share_of_codes(self.bits, self.group_size)
    num_copies = len(weights.inner) + self.is_filled
    return share * weights.matrix * num_copies + weights.kernels["up"].shape[1]

  def _hidden(self, weights: Weights, x: Array) -> Array:
    return weights.hidden(lambda name: x @ self._copy(weights, name))

  def _copy(self, weights: Weights, name: str) -> Array:
    return rounded(weights.kernels[name], self.bits, self.group_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned(_Chooser):
  """By `predictor`, see `predictors`.

  Attributes:
    rank: r.
  """

  rank: int

  def scores(
      self, weights: Weights, x: Float[Array, "*b D"], arrays: Mapping[str, Any]
  ) -> Float[Array, "*b U"]:
    """By the predictor."""
    del weights
    return predictors.scores(arrays["predictor"], x)

  def overhead(self, weights: Weights) -> int | float:
    """The predictor's matrices and biases."""
    width, num = weights.kernels["up"].shape
    num_units = num // self.block_size
    return self.rank * (width + num_units) + num_units


def activation(
    weights: Weights, x: Float[Array, "*b D"]
) -> Float[Array, "*b F"]:
  """What the activation function returns: of gate, or of up alone."""
  first = weights.inner[-1]
  biases = {"up": weights.biases[first]} if first in weights.biases else {}
  kernels = {"up": weights.kernels[first]}
  alone = dataclasses.replace(weights, kernels=kernels, biases=biases)
  return alone.dense_hidden(x)


def is_large(x: Array, least: Array) -> Array:
  """What is exactly 0 adds nothing, whatever the threshold."""
  return (jnp.abs(x) >= least.reshape((1,) * x.ndim)) & (x != 0)


def rounded(
    kernel: Float[Array, "n m"], bits: int, size: int
) -> Float[Array, "n m"]:
  """What comes back of codes: a scale and an offset for `size` inputs each.

  Args:
    kernel: Inputs first.
    bits: Of a code.
    size: g; a last group that is not full has its own.
  """
  num = kernel.shape[0]
  padded = jnp.pad(kernel, ((0, -num % size), (0, 0)), mode="edge")
  groups = padded.reshape(-1, size, kernel.shape[1])
  low = groups.min(axis=1, keepdims=True)
  step = (groups.max(axis=1, keepdims=True) - low) / (2**bits - 1)
  codes = jnp.round((groups - low) / jnp.maximum(step, 1e-30))
  return (low + step * codes).reshape(padded.shape)[:num]


def share_of_codes(bits: int, size: int) -> float:
  """Bytes of codes, scales and offsets, as a share of those of the weights."""
  return (bits + 2 * weights_lib.BITS / size) / weights_lib.BITS


def _share(kept: Bool[Array, "*b n"]) -> Float[Array, "*b"]:
  return kept.mean(axis=-1, dtype=jnp.float32)
