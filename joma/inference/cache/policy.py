"""What a policy of a KV cache is: which of its slots the next token takes.

A policy is a frozen dataclass with pure functions, the same for a prompt read
at once and for tokens one by one. The cache (`kv_cache.SlotCache`) asks it in
one order:

  1. slot = the first empty one, else the unprotected one of least `priority`,
     the first of equal ones
  2. the new key and value take it, with what `enter` gives them
  3. the query attends to all kept keys, the new one among them
  4. `observe` sees the attention weights and updates scores

`rules` are the methods that a policy may have, and `calls` calls them.

Letters: B batch, T tokens of a prompt, D width, N query heads, K key and value
heads, G = N / K, C slots, H head size.
"""

import dataclasses
from typing import ClassVar, Literal, Protocol, final, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from joma.transformer import hooks
from joma.transformer.weighing import rule
from kernels_pallas import logits
from scansnap_jax.experiment import errors

# How query heads that share a key head vote.
Reduce = Literal["sum", "max"]
# A policy's own arrays; None is none.
Arrays = PyTree[Array] | None
# Colour, marker, and line as matplotlib takes it.
Look = tuple[str, str, str | tuple[int, tuple[float, ...]]]


@dataclasses.dataclass(frozen=True)
class Slots:
  """What is kept, as a policy sees it.

  Attributes:
    key: Rotated where keys are kept rotated.
    value: Of the same tokens.
    score: The policy's, float32.
    pos: Of each token; -1 is empty.
    aux: The policy's own arrays, each [B, K, C, ...].
    state: The policy's own arrays, each [B, ...].
    layer: Of the model, from 0.
    num_groups: G.
  """

  key: Float[Array, "B K C H"]
  value: Float[Array, "B K C H"]
  score: Float[Array, "B K C"]
  pos: Int[Array, "B K C"]
  aux: Arrays = None
  state: Arrays = None
  layer: int = 0
  num_groups: int = 1


@dataclasses.dataclass(frozen=True)
class Token:
  """A new token of each sequence.

  Attributes:
    key: As it is kept.
    value: Of the token.
    raw_key: Before rotation.
    raw_query: Before rotation.
    position: In the sequence; -1 where a sequence has no token.
    rotate: The model's rotary positions.
    scale: Of the attention logits.
    layer: Of the model.
    out_kernel: What heads' outputs are multiplied with; None where nobody says.
    x: The layer's input, where the policy asks for it; else it may be None.
  """

  key: Float[Array, "B K H"]
  value: Float[Array, "B K H"]
  raw_key: Float[Array, "B K H"]
  raw_query: Float[Array, "B K G H"]
  position: Int[Array, "B"]
  rotate: hooks.Rotate
  scale: float
  layer: int
  out_kernel: Float[Array, "N H D"] | None = None
  x: Float[Array, "B D"] | None = None


@dataclasses.dataclass(frozen=True)
class Step:
  """What one decode step saw.

  Attributes:
    attn_logits: Float32, -inf for slots that were not seen.
    attn_weights: Their softmax.
    position: The query's.
  """

  attn_logits: Float[Array, "B K G C"]
  attn_weights: Float[Array, "B K G C"]
  position: Int[Array, "B"]


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Prompts that were read at once, each attending to all of its own.

  Attributes:
    query: Rotated.
    key: As it is kept.
    rotated_key: As it meets the query.
    value: Of the same tokens.
    raw_key: Before rotation.
    raw_query: Before rotation.
    positions: In the sequence; -1 is padding, at the end.
    lengths: Tokens of each prompt.
    col_mass: What each key got from all queries by `Policy.row_weights`; None
      where the policy does not ask for it.
    rotate: The model's rotary positions.
    options: Of attention.
    layer: Of the model.
    x: The layer's input, where the policy asks for it; else it may be None.
    starts: Tokens of each text, where it is followed by a request and itself;
      None where it is read once.
  """

  query: Float[Array, "B T N H"]
  key: Float[Array, "B T K H"]
  rotated_key: Float[Array, "B T K H"]
  value: Float[Array, "B T K H"]
  raw_key: Float[Array, "B T K H"]
  raw_query: Float[Array, "B T N H"]
  positions: Int[Array, "B T"]
  lengths: Int[Array, "B"]
  col_mass: Float[Array, "B K G T"] | None
  rotate: hooks.Rotate
  options: hooks.AttentionOptions
  layer: int
  x: Float[Array, "B T D"] | None = None
  starts: Int[Array, "B"] | None = None

  def last_weights(
      self, num_rows: int
  ) -> tuple[Float[Array, "B K G W T"], Int[Array, "B W"]]:
    """Attention weights of each sequence's last queries, and their positions.

    Rows before the first token have weights 0 and positions below 0.
    """
    rows = self.lengths[:, None] - num_rows + jnp.arange(num_rows)[None]
    return self.weights_at(rows), rows

  def weights_at(self, rows: Int[Array, "B W"]) -> Float[Array, "B K G W T"]:
    """Attention weights of the queries at such rows; 0 at rows below 0."""
    index = jnp.maximum(rows, 0)[:, :, None, None]
    query = jnp.take_along_axis(self.query, index, axis=1)
    attn_logits = logits.attention_logits(
        query,
        self.rotated_key,
        self.options.scale,
        self.options.logits_soft_cap,
    )
    batch, num_heads, *rest = attn_logits.shape
    groups = (self.key.shape[2], num_heads // self.key.shape[2])
    attn_logits = attn_logits.reshape(batch, *groups, *rest)
    positions, rows_ = self.positions[:, None, :], rows[:, :, None]
    is_seen = (positions >= 0) & (positions <= rows_)
    if self.options.window is not None:
      is_seen = is_seen & (positions > rows_ - self.options.window)
    is_seen = is_seen[:, None, None]
    attn_logits = jnp.where(is_seen, attn_logits, -jnp.inf)
    # Rows of nothing would be NaN.
    highest = jnp.max(attn_logits, axis=-1, keepdims=True, initial=-1e30)
    more = rule.rest_logits(
        self.options.weights,
        query,
        self.options.scale,
        self.options.logits_soft_cap,
    )
    if more is not None:  # Sinks and learned keys have their share.
      more = more.reshape(len(more), *groups, *more.shape[2:])
      highest = jnp.maximum(highest, more.max(axis=-1, keepdims=True))
    unnormalized = jnp.exp(attn_logits - highest)
    total = unnormalized.sum(axis=-1, keepdims=True)
    if more is not None:
      total += jnp.exp(more - highest).sum(axis=-1, keepdims=True)
    return unnormalized / jnp.maximum(total, 1e-30)


@runtime_checkable
class HasWindow(Protocol):
  """A policy whose newest tokens are as many as a size of its own says."""

  def default_recent(self, capacity: int) -> int:
    """Returns what `num_recent` is where it is None."""
    ...


@runtime_checkable
class SetsSizes(Protocol):
  """A policy with more sizes than `num_recent`."""

  def sized(self, capacity: int) -> "Policy":
    """Returns the policy with all sizes set."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """Keeps the newest tokens and the first ones; the others by its rule.

  A policy has those methods of `rules` that are its own; `calls` says what
  stands for each of the others.

  Attributes:
    num_sinks: First tokens of a sequence that never leave.
    num_recent: Last tokens before the new one that do not leave; None is
      what `HasWindow` says, or half of the capacity.
    evicts: Whether anything leaves.
    ranks_heads_alone: Whether the priority of a head's slots is a number of
      that head's own, which can be compared with those of other heads.
    draws: Whether it has a `seed`, by which chance decides.
    reads_part: Whether a budget is less than all slots: what a step reads, or
      what those layers keep that do not keep everything.
    uses_col_mass: Whether `read_prompt` wants `Prompt.col_mass`.
    uses_queries: Whether `read_prompt` looks at queries of `Prompt`.
    uses_input: Whether it looks at the layer's input, `Prompt.x` and `Token.x`.
    estimates_attention: Whether the priority is attention that a token has got
      or will get: from 0, so that a product with it means something.
    label: Name in figures and sentences; empty is the flag's own.
    look: Colour, marker and line in figures; None is any that is free.
  """

  num_sinks: int = 0
  num_recent: int | None = None
  evicts: ClassVar[bool] = True
  ranks_heads_alone: ClassVar[bool] = True
  draws: ClassVar[bool] = False
  reads_part: ClassVar[bool] = False
  uses_col_mass: ClassVar[bool] = False
  uses_queries: ClassVar[bool] = False
  uses_input: ClassVar[bool] = False
  estimates_attention: ClassVar[bool] = False
  label: ClassVar[str] = ""
  look: ClassVar[Look | None] = None

  def __post_init__(self):
    for name in ("num_sinks", "num_recent"):
      size = getattr(self, name)
      if size is not None and size < 0:
        raise errors.UserError(f"{name}={size} must be at least 0.")

  @final
  def with_capacity(self, capacity: int) -> "Policy":
    """Returns the policy with all sizes set.

    Raises:
      UserError: If more slots are protected than leave one to replace.
    """
    if isinstance(self, SetsSizes):
      return self.sized(capacity)
    num_recent = self.recent(capacity)
    if self.num_sinks + num_recent > capacity - 1:
      raise errors.UserError(
          f"num_sinks={self.num_sinks} and num_recent={num_recent} protect"
          f" {self.num_sinks + num_recent} slots; of a capacity of {capacity}"
          f" at most {capacity - 1} can be, for the new token needs one."
      )
    return dataclasses.replace(self, num_recent=num_recent)

  @final
  def recent(self, capacity: int) -> int:
    """Returns `num_recent`, or what stands for None in so many slots."""
    if self.num_recent is not None:
      return self.num_recent
    if isinstance(self, HasWindow):
      return self.default_recent(capacity)
    return max(min(capacity // 2, capacity - 1 - self.num_sinks), 0)

  @final
  def is_protected(
      self, pos: Int[Array, "B K C"], position: Int[Array, "B"]
  ) -> Bool[Array, "B K C"]:
    """Whether a slot may not leave at the step of `position`."""
    oldest = position[:, None, None] - (self.num_recent or 0)
    return (pos >= 0) & ((pos < self.num_sinks) | (pos >= oldest))


def group_sum(col_mass: Float[Array, "B K G T"], reduce: str) -> Array:
  """Joins the query heads that share a key head."""
  return col_mass.sum(axis=2) if reduce == "sum" else col_mass.max(axis=2)


def random_key(seed: int, layer: int, position: Int[Array, ""] | int) -> Array:
  """A key for a layer and a position: batches draw as their sequences alone."""
  key = jax.random.fold_in(jax.random.key(seed), layer)
  return jax.random.fold_in(key, position)
