"""What a policy of a KV cache is: which of its slots the next token takes.

A policy is a frozen dataclass with pure functions, the same for a prompt read
at once and for tokens one by one. The cache (`kv_cache.SlotCache`) asks it in
one order:

  1. slot = the first empty one, else the unprotected one of least `priority`,
     the first of equal ones
  2. the new key and value take it, with what `enter` gives them
  3. the query attends to all kept keys, the new one among them
  4. `observe` sees the attention weights and updates scores

Letters: B batch, T tokens of a prompt, N query heads, K key and value heads,
G = N / K, C slots, H head size.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.inference.cost import cache_plan
from joma.transformer import attention
from joma.transformer import config as configs
from kernels_pallas import logits
from scansnap_jax.experiment import errors

# How query heads that share a key head vote.
Reduce = Literal["sum", "max"]
# Colour, marker, and line as matplotlib takes it.
Look = tuple[str, str, str | tuple[int, tuple[float, ...]]]


@dataclasses.dataclass(frozen=True)
class Slots:
  """What is kept, as a policy sees it.

  Attributes:
    key: [B, K, C, H], rotated where keys are kept rotated.
    value: [B, K, C, H].
    score: Float32 [B, K, C], the policy's.
    pos: Int32 [B, K, C]; -1 is empty.
    aux: The policy's own arrays, each [B, K, C, ...].
    state: The policy's own arrays, each [B, ...].
    layer: Of the model, from 0.
    num_groups: G.
  """

  key: Any
  value: Any
  score: Any
  pos: Any
  aux: Any = None
  state: Any = None
  layer: int = 0
  num_groups: int = 1


@dataclasses.dataclass(frozen=True)
class Token:
  """A new token of each sequence.

  Attributes:
    key: [B, K, H], as it is kept.
    value: [B, K, H].
    raw_query: [B, K, G, H], before rotation.
    position: Int32 [B].
    rotate: The model's rotary positions.
    scale: Of the attention logits.
    layer: Of the model.
  """

  key: Any
  value: Any
  raw_query: Any
  position: Any
  rotate: attention.Rotate
  scale: float
  layer: int


@dataclasses.dataclass(frozen=True)
class Step:
  """What one decode step saw.

  Attributes:
    attn_logits: Float32 [B, K, G, C], -inf for slots that were not seen.
    attn_weights: Their softmax.
    position: Int32 [B], the query's.
  """

  attn_logits: Any
  attn_weights: Any
  position: Any


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Prompts that were read at once, each attending to all of its own.

  Attributes:
    query: Rotated [B, T, N, H].
    key: As it is kept [B, T, K, H].
    rotated_key: [B, T, K, H].
    value: [B, T, K, H].
    raw_query: Before rotation.
    positions: Int32 [B, T]; -1 is padding, at the end.
    lengths: Int32 [B].
    col_mass: Float32 [B, K, G, T]: what each key got from all queries by
      `Policy.row_weights`; None where the policy does not ask for it.
    rotate: The model's rotary positions.
    options: Of attention.
    layer: Of the model.
  """

  query: Any
  key: Any
  rotated_key: Any
  value: Any
  raw_query: Any
  positions: Any
  lengths: Any
  col_mass: Any
  rotate: attention.Rotate
  options: attention.AttentionOptions
  layer: int

  def last_weights(
      self, num_rows: int
  ) -> tuple[Float[Array, "B K G W T"], Int[Array, "B W"]]:
    """Attention weights of each sequence's last queries, and their positions.

    Rows before the first token have weights 0 and positions below 0.
    """
    rows = self.lengths[:, None] - num_rows + jnp.arange(num_rows)[None]
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
    unnormalized = jnp.exp(attn_logits - highest)
    total = unnormalized.sum(axis=-1, keepdims=True)
    return unnormalized / jnp.maximum(total, 1e-30), rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """Keeps the newest tokens and the first ones; the others by `priority`.

  Attributes:
    num_sinks: First tokens of a sequence that never leave.
    num_recent: Last tokens before the new one that do not leave; None is half
      of the capacity.
    evicts: Whether anything leaves.
    ranks_heads_alone: Whether the priority of a head's slots is a number of
      that head's own, which can be compared with those of other heads.
    draws: Whether it has a `seed`, by which chance decides.
    reads_part: Whether all tokens stay, and a budget is what a step reads.
    label: Name in figures and sentences; empty is the flag's own.
    look: Colour, marker and line in figures; None is any that is free.
  """

  num_sinks: int = 0
  num_recent: int | None = None
  evicts: ClassVar[bool] = True
  ranks_heads_alone: ClassVar[bool] = True
  draws: ClassVar[bool] = False
  reads_part: ClassVar[bool] = False
  label: ClassVar[str] = ""
  look: ClassVar[Look | None] = None

  def __post_init__(self):
    for name in ("num_sinks", "num_recent"):
      size = getattr(self, name)
      if size is not None and size < 0:
        raise errors.UserError(f"{name}={size} must be at least 0.")

  def with_capacity(self, capacity: int) -> "Policy":
    """Returns the policy with all sizes set.

    Raises:
      UserError: If more slots are protected than leave one to replace.
    """
    num_recent = self._num_recent(capacity)
    if self.num_sinks + num_recent > capacity - 1:
      raise errors.UserError(
          f"num_sinks={self.num_sinks} and num_recent={num_recent} protect"
          f" {self.num_sinks + num_recent} slots; of a capacity of {capacity}"
          f" at most {capacity - 1} can be, for the new token needs one."
      )
    return dataclasses.replace(self, num_recent=num_recent)

  def _num_recent(self, capacity: int) -> int:
    if self.num_recent is not None:
      return self.num_recent
    return max(min(capacity // 2, capacity - 1 - self.num_sinks), 0)

  def capacities(self, num_layers: int, capacity: int) -> tuple[int, ...]:
    """Slots of each layer; their mean is `capacity`."""
    return (capacity,) * num_layers

  def fitted(self, slots: int, named: frozenset[str]) -> "Policy":
    """Returns the policy with sizes that so few slots of a KV head allow.

    Args:
      slots: What an evaluation grants a KV head.
      named: Fields that somebody has set, which stay as they are.
    """
    del slots, named
    return self

  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """Returns what its cache costs; here each step changes every score.

    Args:
      capacities: Slots of each layer.
      name: In tables.
    """
    return cache_plan.scored(capacities, name)

  def is_protected(
      self, pos: Int[Array, "B K C"], position: Int[Array, "B"]
  ) -> Bool[Array, "B K C"]:
    """Whether a slot may not leave at the step of `position`."""
    oldest = position[:, None, None] - (self.num_recent or 0)
    return (pos >= 0) & ((pos < self.num_sinks) | (pos >= oldest))

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: Any,
      options: Any,
  ) -> Any:
    """Returns a cache of another kind than slots, or None; `kv_cache.init`."""
    return None

  def kept_mass(
      self, slots: Slots, position: Int[Array, "B"]
  ) -> Float[Array, "B K"]:
    """Share of all attention so far that went to what is kept, or NaN."""
    return jnp.full(slots.pos.shape[:2], jnp.nan)

  def kernel_options(self) -> dict[str, Any] | None:
    """Options with which `kernels_pallas.decode` is this policy.

    None where no kernel is.
    """
    return None

  @property
  def uses_col_mass(self) -> bool:
    """Whether `read_prompt` wants `Prompt.col_mass`."""
    return False

  def row_weights(
      self, positions: Int[Array, "B T"], lengths: Int[Array, "B"]
  ) -> Float[Array, "B T"] | None:
    """Weight of each query of a prompt in `Prompt.col_mass`; None is 1."""
    return None

  def init_aux(
      self, batch: int, num_kv_heads: int, capacity: int, num_groups: int
  ) -> Any:
    """Arrays of the policy's own, a number or more a slot; None is none."""
    return None

  def init_state(
      self, batch: int, num_kv_heads: int, head_dim: int, num_groups: int
  ) -> Any:
    """Arrays of the policy's own, a row a sequence; None is none."""
    return None

  def read_prompt(
      self, prompt: Prompt
  ) -> tuple[Float[Array, "B K T"], Any, Any]:
    """Returns score, aux and state after a prompt."""
    batch, seq_len, num_kv_heads = prompt.key.shape[:3]
    return jnp.zeros((batch, num_kv_heads, seq_len)), None, None

  def enter(
      self, token: Token, state: Any
  ) -> tuple[Float[Array, "B K"], Any, Any]:
    """Returns score and aux of a new token, and the new state."""
    return jnp.zeros(token.key.shape[:2]), None, state

  def priority(
      self, slots: Slots, position: Int[Array, "B"]
  ) -> Float[Array, "B K C"]:
    """What a slot is worth to the token at `position`; the least leaves."""
    return slots.score

  def observe(
      self, slots: Slots, step: Step
  ) -> tuple[Float[Array, "B K C"], Any, Any]:
    """Returns score, aux and state after a step."""
    return slots.score, slots.aux, slots.state


def rank(
    policy: Policy, slots: Slots, position: Int[Array, "B"]
) -> Float[Array, "B K C"]:
  """Priority, with -inf for empty slots and inf for protected ones."""
  priority = policy.priority(slots, position).astype(jnp.float32)
  protected = policy.is_protected(slots.pos, position)
  return jnp.where(
      slots.pos < 0, -jnp.inf, jnp.where(protected, jnp.inf, priority)
  )


def group_sum(col_mass: Float[Array, "B K G T"], reduce: str) -> Array:
  """Joins the query heads that share a key head."""
  return col_mass.sum(axis=2) if reduce == "sum" else col_mass.max(axis=2)


def random_key(seed: int, layer: int, position: Int[Array, ""] | int) -> Array:
  """A key for a layer and a position: batches draw as their sequences alone."""
  key = jax.random.fold_in(jax.random.key(seed), layer)
  return jax.random.fold_in(key, position)
