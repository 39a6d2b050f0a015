"""Rules that say which neurons of an MLP a token computes.

Predicted     the blocks that a trained predictor scores highest, or above its
              calibrated threshold (Deja Vu, https://arxiv.org/abs/2310.17157)
Griffin       one choice a text, by the prompt: blocks of largest
              sqrt(sum_t (h_t / ||h_t||)^2) (https://arxiv.org/abs/2404.01365)
Cats          neurons with |act(z)| above a threshold; z is computed of all
              (https://arxiv.org/abs/2404.08763)
Teal          entries of x and of h above thresholds, in size; no neuron is
              left out as such (https://arxiv.org/abs/2408.14690)
Oracle        the truly strongest blocks: what prediction is measured against
Random        blocks drawn for each token: what knowing nothing gives

A rule is static and hashable; what it has learned or was calibrated to are
arrays of its layer. `Predicted`, `Griffin` and `Random` know before they
compute a neuron; the others are for measuring, and `Cats` and `Teal` read
weights as `weights_read` says.

Letters: B batch, T tokens, D width, F neurons, U blocks of neurons.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.inference.sparsity import contextual_config
from joma.inference.sparsity import predictors
from joma.inference.sparsity import sparsity_labels

MISSING_KV = ("always_compute_kv", "zero", "recompute")


class View(NamedTuple):
  """What a rule may look at, of one layer and a batch.

  Attributes:
    resid: What a predictor reads.
    hidden_pre: z, what the activation function reads.
    hidden: h, what W_down reads.
    strengths: Of the blocks, see `sparsity_labels`.
    activation: act(z).
    is_prompt: Tokens of the prompt.
    arrays: What the rule was calibrated to, of this layer.
    layer: Which one.
    block_size: Neurons of a block.
  """

  resid: Float[Array, "B T D"]
  hidden_pre: Float[Array, "B T F"]
  hidden: Float[Array, "B T F"]
  strengths: Float[Array, "B T U"]
  activation: Float[Array, "B T F"]
  is_prompt: Bool[Array, "B T"]
  arrays: Mapping[str, Any]
  layer: int
  block_size: int


# How many are chosen; an array where it is traced.
Number = int | Int[Array, ""] | None


class MlpShape(NamedTuple):
  """Sizes of one MLP: D, F, and matrices that read x, 2 where it is gated."""

  embed_dim: int
  hidden_dim: int
  num_inner: int

  @property
  def weights(self) -> int:
    """Weights of the dense MLP, biases aside."""
    return (self.num_inner + 1) * self.embed_dim * self.hidden_dim


class Kept(NamedTuple):
  """Shares that a rule computed: of the neurons, and of the entries of x."""

  hidden: float
  inputs: float = 1.0


@runtime_checkable
class UnitRule(Protocol):
  """A rule; see the module."""

  def keep(self, view: View) -> Bool[Array, "B T U"] | Bool[Array, "B T F"]:
    """Marks the blocks, or the neurons, of every token."""
    ...

  def number(self, arrays: Mapping[str, Any]) -> Number:
    """Blocks to choose; None where no number rules."""
    ...

  def keep_inputs(
      self, x: Float[Array, "B T D"], arrays: Mapping[str, Any]
  ) -> Bool[Array, "B T D"] | None:
    """Marks the entries of x that are read; None is all."""
    ...

  def weights_read(self, shape: MlpShape, kept: Kept) -> float:
    """Weights that a token reads, those of the rule included."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Blocks:
  """A rule that chooses blocks as a whole.

  Attributes:
    num: Blocks; None is what `num_blocks` among the arrays says, which may be
      traced.
  """

  num: int | None = None

  def number(self, arrays: Mapping[str, Any]) -> Number:
    """Blocks to choose; None where no number rules."""
    return arrays.get("num_blocks") if self.num is None else self.num

  def chosen(self, arrays: Mapping[str, Any]) -> int | Int[Array, ""]:
    """Blocks to choose, of a rule that needs to be told."""
    num = self.number(arrays)
    assert num is not None, "neither num nor num_blocks is given"
    return num

  def keep_inputs(
      self, x: Float[Array, "B T D"], arrays: Mapping[str, Any]
  ) -> None:
    """All."""
    del x, arrays
    return None

  def weights_read(self, shape: MlpShape, kept: Kept) -> float:
    """Whole neurons: their rows of every matrix."""
    return kept.hidden * shape.weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predicted(_Blocks):
  """Deja Vu.

  Attributes:
    num: Blocks; None is as above, and where arrays have no number either, all
      above the calibrated threshold.
    nonlinearity: f of the predictor.
    rank: r of the predictor.
    num_units: U.
  """

  nonlinearity: contextual_config.Nonlinearity = "none"
  rank: int = 1
  num_units: int = 1

  def scores(
      self, arrays: Mapping[str, Any], resid: Float[Array, "*b D"]
  ) -> Array:
    """Of the blocks; where a threshold rules, above it."""
    found = predictors.scores(arrays["mlp"], resid, self.nonlinearity)
    if self.number(arrays) is None:
      return found - arrays["mlp_threshold"].reshape((1,) * found.ndim)
    return found

  def keep(self, view: View) -> Bool[Array, "B T U"]:
    """By score."""
    found, num = self.scores(view.arrays, view.resid), self.number(view.arrays)
    return found > 0 if num is None else sparsity_labels.keep_top(found, num)

  def weights_read(self, shape: MlpShape, kept: Kept) -> float:
    """The chosen neurons and the predictor."""
    predictor = self.rank * (shape.embed_dim + self.num_units) + self.num_units
    return super().weights_read(shape, kept) + predictor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Griffin(_Blocks):
  """Chosen once, from the prompt.

  Attributes:
    num: As in `Predicted`, without a threshold.
  """

  def scores(
      self,
      hidden: Float[Array, "B T F"],
      is_prompt: Bool[Array, "B T"],
      block_size: int,
  ) -> Float[Array, "B U"]:
    """Squares of the statistic, of each block."""
    hidden = jnp.where(is_prompt[..., None], hidden.astype(jnp.float32), 0)
    # Each token's activations at length 1: no token outweighs the others.
    squares = jnp.square(hidden)
    squares = squares / jnp.maximum(
        squares.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny
    )
    sums = squares.sum(axis=1)
    return sparsity_labels.to_blocks(sums, block_size).sum(axis=-1)

  def keep(self, view: View) -> Bool[Array, "B T U"]:
    """The same blocks at every token of a text."""
    found = self.scores(view.hidden, view.is_prompt, view.block_size)
    kept = sparsity_labels.keep_top(found, self.chosen(view.arrays))
    shape = (*view.hidden.shape[:2], kept.shape[-1])
    return jnp.broadcast_to(kept[:, None], shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(_Blocks):
  """Knows the strengths.

  Attributes:
    num: As in `Predicted`, without a threshold.
  """

  def keep(self, view: View) -> Bool[Array, "B T U"]:
    """The strongest."""
    return sparsity_labels.keep_top(view.strengths, self.chosen(view.arrays))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(_Blocks):
  """Knows nothing.

  Attributes:
    num: As in `Predicted`, without a threshold.
    seed: Of the draws.
  """

  seed: int = 0

  def keep(self, view: View) -> Bool[Array, "B T U"]:
    """Other blocks at every token, and in every layer."""
    key = jax.random.fold_in(jax.random.key(self.seed), view.layer)
    drawn = jax.random.uniform(key, view.strengths.shape)
    return sparsity_labels.keep_top(drawn, self.chosen(view.arrays))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cats:
  """Reads the matrix before the activation whole, the others where it is large.

  Attributes:
    threshold: Name of its threshold among the arrays.
  """

  threshold: str = "cats"

  def keep(self, view: View) -> Bool[Array, "B T F"]:
    """Neurons with a large activation."""
    least = view.arrays[self.threshold].reshape(1, 1, 1)
    return _is_large(view.activation, least)

  def number(self, arrays: Mapping[str, Any]) -> None:
    """None rules."""
    del arrays
    return None

  def keep_inputs(
      self, x: Float[Array, "B T D"], arrays: Mapping[str, Any]
  ) -> None:
    """All."""
    del x, arrays
    return None

  def weights_read(self, shape: MlpShape, kept: Kept) -> float:
    """One matrix, and the kept rows of the others."""
    matrix = shape.embed_dim * shape.hidden_dim
    return matrix + kept.hidden * (shape.weights - matrix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teal:
  """Leaves out small entries of what each matrix of the MLP reads.

  Attributes:
    input_threshold: Name of the threshold of x among the arrays.
    threshold: Of h.
  """

  input_threshold: str = "teal_inputs"
  threshold: str = "teal"

  def keep(self, view: View) -> Bool[Array, "B T F"]:
    """Large entries of h."""
    least = view.arrays[self.threshold].reshape(1, 1, 1)
    return _is_large(view.hidden, least)

  def number(self, arrays: Mapping[str, Any]) -> None:
    """None rules."""
    del arrays
    return None

  def keep_inputs(
      self, x: Float[Array, "B T D"], arrays: Mapping[str, Any]
  ) -> Bool[Array, "B T D"]:
    """Large entries of x."""
    return _is_large(x, arrays[self.input_threshold].reshape(1, 1, 1))

  def weights_read(self, shape: MlpShape, kept: Kept) -> float:
    """Kept columns of the matrices that read x, kept rows of W_down."""
    matrix = shape.embed_dim * shape.hidden_dim
    return matrix * (shape.num_inner * kept.inputs + kept.hidden)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadRule:
  """Which heads a token computes.

  Attributes:
    num: Heads; None is what `num_heads` among the arrays says, or, where they
      have none, all above the calibrated threshold.
    chosen_by: A predictor, the strengths themselves, or chance.
    missing_kv: What becomes of keys and values of heads that a token leaves
      out: they are computed all the same, they are zero, or they are computed
      from kept inputs as soon as a later token chooses the head.
    period: Steps that inputs are kept for; then all that is missing is made.
    nonlinearity: f of the predictor.
    rank: r of the predictor.
    seed: Of the draws.
  """

  num: int | None = None
  chosen_by: Literal["predicted", "oracle", "random"] = "predicted"
  missing_kv: Literal["always_compute_kv", "zero", "recompute"] = (
      "always_compute_kv"
  )
  period: int = 16
  nonlinearity: contextual_config.Nonlinearity = "none"
  rank: int = 1
  seed: int = 0

  def scores(
      self, arrays: Mapping[str, Any], resid: Float[Array, "*b D"]
  ) -> Array:
    """A predictor's, of the heads; where a threshold rules, above it."""
    found = predictors.scores(arrays["heads"], resid, self.nonlinearity)
    if self.number(arrays) is None:
      return found - arrays["heads_threshold"].reshape((1,) * found.ndim)
    return found

  def number(self, arrays: Mapping[str, Any]) -> Number:
    """Heads to choose; None where no number rules."""
    return arrays.get("num_heads") if self.num is None else self.num

  def drawn(self, shape: tuple[int, ...], layer: int) -> Array:
    """Scores of chance."""
    key = jax.random.fold_in(jax.random.key(self.seed), layer)
    return jax.random.uniform(key, shape)

  def keep(
      self, scores: Float[Array, "*b N"], arrays: Mapping[str, Any]
  ) -> Bool[Array, "*b N"]:
    """Marks the chosen heads; where a threshold rules, at least one."""
    num = self.number(arrays)
    if num is not None:
      return sparsity_labels.keep_top(scores, num)
    # One at least: a layer without a head would have no output to read.
    return (scores > 0) | sparsity_labels.keep_top(scores, 1)


def _is_large(x: Array, least: Array) -> Array:
  """What is exactly 0 adds nothing, whatever the threshold."""
  return (jnp.abs(x) >= least) & (x != 0)


def kv_heads(
    chosen: Bool[Array, "*b N"], num_kv_heads: int
) -> Bool[Array, "*b K"]:
  """Marks KV heads of which some query head is chosen."""
  return chosen.reshape(*chosen.shape[:-1], num_kv_heads, -1).any(axis=-1)
