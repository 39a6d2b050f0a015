"""How many slots a cache has and a step reads, and what each slot costs.

One plan stands for every policy of a kind: what those that score all slots move
is the same, whatever they keep. Imports no jax.

Letters: L layers, K key and value heads, T tokens so far, C slots.
"""

from collections.abc import Mapping
import dataclasses
import itertools
import math

from joma.transformer import config as configs
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

# float32 score and int32 position.
_STATE = 8
_POSITION = 4
# A score is read and written, a position read.
_SCORED = 12

Capacities = int | tuple[int, ...] | tuple[tuple[int, ...], ...]


def value_group(head_dim: int, group_size: int) -> int:
  """Channels of a group of values: all where groups do not divide the head."""
  return head_dim if head_dim % group_size else group_size


@dataclasses.dataclass(frozen=True)
class Coding:
  """Keys and values in four bits, with a scale and an offset a group.

  Attributes:
    num_exact: Slots that stand as they are beside the codes; only blocks of so
      many are coded.
    group_size: Tokens of a key's group, and channels of a value's.
  """

  num_exact: int
  group_size: int

  def bytes_of(self, slots: int, head_dim: int, itemsize: int) -> int:
    """Bytes of keys and values of so many slots of a head.

    Args:
      slots: Coded and not.
      head_dim: H.
      itemsize: Bytes of a scale, and of a number that is not coded.
    """
    coded = slots // self.num_exact * self.num_exact
    group = value_group(head_dim, self.group_size)
    key_groups = coded // self.group_size * head_dim
    value_groups = coded * (head_dim // group)
    # Keys and values, half a byte each.
    total = coded * head_dim + 2 * (key_groups + value_groups) * itemsize
    return total + 2 * self.num_exact * head_dim * itemsize


@dataclasses.dataclass(frozen=True)
class CodedSlots:
  """As `Coding`, of slots from which tokens leave; all have room for a code.

  Attributes:
    num_exact: Vectors that stand as they are beside the codes, each with the
      number of its slot.
    group_size: Slots of a key's group, and channels of a value's.
  """

  num_exact: int
  group_size: int

  def bytes_of(self, slots: int, head_dim: int, itemsize: int) -> int:
    """Bytes of keys and values of so many slots of a head.

    Args:
      slots: Of the head.
      head_dim: H.
      itemsize: Bytes of a scale, and of a number that is not coded.
    """
    key_groups = math.ceil(slots / self.group_size)
    coded = key_groups * self.group_size
    value_groups = coded * (head_dim // value_group(head_dim, self.group_size))
    scales = 2 * (key_groups * head_dim + value_groups) * itemsize
    exact = self.num_exact * (2 * head_dim * itemsize + _POSITION)
    return coded * head_dim + scales + exact


def num_channels(head_dim: int, kept: float) -> int:
  """Channels of a share of them, rounded up."""
  return max(1, math.ceil(kept * head_dim))


@dataclasses.dataclass(frozen=True)
class FewerChannels:
  """Keys without some of their channels, beside whole values.

  Attributes:
    num_exact: Slots whose keys are whole; only blocks of so many are not.
    kept: Share of channels.
  """

  num_exact: int
  kept: float

  def bytes_of(self, slots: int, head_dim: int, itemsize: int) -> int:
    """Bytes of keys and values of so many slots of a head.

    Args:
      slots: Whole and not.
      head_dim: H.
      itemsize: Bytes of a number.
    """
    few = num_channels(head_dim, self.kept)
    cut = slots // self.num_exact * self.num_exact * few
    total = (cut + (slots + self.num_exact) * head_dim) * itemsize
    # Which channels they are, and what queries have asked of each.
    return total + 4 * (few + head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePlan:
  """Slots and their cost.

  Attributes:
    name: In tables.
    capacities: C; one number, one a layer, or one a layer and KV head. None
      keeps every token.
    slot_state: Bytes that a slot holds besides key and value.
    slot_traffic: Bytes besides key and value that a step moves of a slot.
    scored_queries: Of a prompt, last queries whose attention is summed to
      choose what stays; None is all, 0 none.
    page_size: Slots of a page with a least and a largest key, by which pages
      are chosen to be read; 0 is no pages.
    read_capacity: Slots that are read of the chosen pages; None is all.
    coding: Of keys and values; None is the cache's type.
  """

  name: str
  capacities: Capacities | None = None
  slot_state: int = 0
  slot_traffic: int = 0
  scored_queries: int | None = 0
  page_size: int = 0
  read_capacity: int | None = None
  coding: Coding | CodedSlots | FewerChannels | None = None

  @property
  def evicts(self) -> bool:
    """Whether tokens are dropped."""
    return self.capacities is not None

  def slots(
      self, config: configs.TransformerConfig, length: int
  ) -> tuple[tuple[int, ...], ...]:
    """Returns slots [L, K].

    Raises:
      UserError: If `capacities` has not one entry a layer or head, or one is
        not from 1 to T.
    """
    shape = (config.num_layers, config.num_kv_heads)
    found = self.capacities
    if found is None:
      found = length
    if isinstance(found, int):
      found = (found,) * shape[0]
    rows = tuple(
        (row,) * shape[1] if isinstance(row, int) else row for row in found
    )
    if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
      raise errors.UserError(
          "capacities must be one number, one for each of the"
          f" {shape[0]} layers, or one for each layer and each of its"
          f" {shape[1]} KV heads."
      )
    for row in rows:
      for slot in row:
        require.between("capacity", slot, 1, length)
    return rows

  def read_slots(
      self, config: configs.TransformerConfig, length: int
  ) -> tuple[tuple[int, ...], ...]:
    """Returns the slots [L, K] of which key and value are read in a step."""
    most = self.read_capacity
    if most is None:
      return self.slots(config, length)
    require.between("read_capacity", most, 1, length)
    return tuple(
        tuple(min(slot, most) for slot in row)
        for row in self.slots(config, length)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
  """What the cost table lets a policy keep, and of what.

  Attributes:
    kept: Fraction of the tokens, or of what else the policy shares out.
    length: T.
    model: Its sizes.
    settings: Values of the policy's own fields, by name; fields that it lacks
      are left aside.
  """

  kept: float
  length: int
  model: configs.TransformerConfig
  settings: Mapping[str, int | float]

  @property
  def capacity(self) -> int:
    """Slots of a KV head."""
    return max(1, int(self.kept * self.length))


def full() -> CachePlan:
  """Every token stays."""
  return CachePlan(name="full")


def window(capacities: Capacities, name: str = "window") -> CachePlan:
  """The last tokens, with or without sinks: their places decide."""
  return CachePlan(
      name=name,
      capacities=capacities,
      slot_state=_STATE,
      slot_traffic=_POSITION,
  )


def scored(
    capacities: Capacities,
    name: str = "scored",
    scored_queries: int | None = None,
) -> CachePlan:
  """Every step changes every slot's score.

  Args:
    capacities: C.
    name: In tables.
    scored_queries: Of a prompt; None is all.
  """
  return CachePlan(
      name=name,
      capacities=capacities,
      slot_state=_STATE,
      slot_traffic=_SCORED,
      scored_queries=scored_queries,
  )


def paged(
    read_capacity: int, page_size: int = 16, name: str = "paged"
) -> CachePlan:
  """All tokens stay, a step reads the best pages."""
  require.at_least("page_size", page_size, 1)
  return CachePlan(name=name, page_size=page_size, read_capacity=read_capacity)


def pyramid(
    mean: int, num_layers: int, beta: int | float = 20.0, least: int = 1
) -> tuple[int, ...]:
  """Capacities that fall linearly with depth (arXiv 2406.02069).

  Args:
    mean: Slots of a layer on average.
    num_layers: L.
    beta: The last layer has 1 / beta of the mean; from 1.
    least: Slots that the last layer has at least, where the mean is as many.

  Returns:
    One a layer; their sum is exactly L times the mean.

  Raises:
    UserError: If beta is below 1.
  """
  if not beta >= 1:
    raise errors.UserError(f"beta must be at least 1, got {beta}.")
  last = max(round(mean / beta), min(least, mean))
  step = 2 * (mean - last) / max(num_layers - 1, 1)
  # Sums of the first n layers are rounded, and not the layers: the errors of
  # single layers then cancel, and the total is exact.
  total = lambda n: round(n * (2 * mean - last) - step * n * (n - 1) / 2)
  ends = [total(n) for n in range(num_layers)] + [num_layers * mean]
  return tuple(b - a for a, b in itertools.pairwise(ends))


def split_heads(
    full_fraction: int | float,
    num_streaming: int,
    length: int,
    config: configs.TransformerConfig,
) -> tuple[tuple[int, ...], ...]:
  """Some heads keep all, the others sinks and a window (arXiv 2410.10819).

  Args:
    full_fraction: Of the KV heads, rounded up.
    num_streaming: Slots of the others.
    length: T.
    config: The model's.
  """
  if not 0 <= full_fraction <= 1:
    raise errors.UserError(
        f"full_fraction must lie in [0, 1], got {full_fraction}."
    )
  heads = config.num_kv_heads
  num_full = math.ceil(full_fraction * heads)
  row = (length,) * num_full + (min(num_streaming, length),) * (
      heads - num_full
  )
  return (row,) * config.num_layers
