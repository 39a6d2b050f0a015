"""What a policy may have besides its sizes: the protocols, a method each.

A policy has the methods that are its own, and no class overrides another's;
`calls` asks for them and says what stands where one is missing.

Letters: B batch, T tokens of a prompt, K key and value heads, C slots.
"""

from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int, Num

from joma.inference.cache import cache_options
from joma.inference.cache import policy as policy_lib
from joma.inference.cost import cache_plan
from joma.transformer import config as configs
from joma.transformer import hooks

Arrays = policy_lib.Arrays
# A score, the policy's arrays of slots, and those of sequences.
Prompted = tuple[Float[Array, "B K T"], Arrays, Arrays]
Entered = tuple[Float[Array, "B K"], Arrays, Arrays]
Observed = tuple[Float[Array, "B K C"], Arrays, Arrays]


@runtime_checkable
class Prioritises(Protocol):
  """Orders slots by more than their score."""

  def priority(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Num[Array, "B K C"]:
    """Returns what slots are worth at `position`; the least leaves."""
    ...


@runtime_checkable
class Wraps(Protocol):
  """Changes what other policies make of a token."""

  def wrapped(self) -> tuple[policy_lib.Policy, ...]:
    """Returns those policies, that whose layers' slots count last."""
    ...


@runtime_checkable
class ReadsPrompts(Protocol):
  """Scores the tokens of a prompt."""

  def read_prompt(self, prompt: policy_lib.Prompt) -> Prompted:
    """Returns score, aux and state after a prompt."""
    ...


@runtime_checkable
class Rehearses(Protocol):
  """Scores a text by what the model attends to when it reads it once more.

  Attributes:
    request: What is said between the text and its repetition.
  """

  @property
  def request(self) -> str:
    """What asks for the repetition."""
    ...

  def read_rehearsal(
      self, prompt: policy_lib.Prompt, starts: Int[Array, "B"]
  ) -> Prompted:
    """Returns score, aux and state of a prompt that holds its text twice.

    Args:
      prompt: The text, the request, and the text again.
      starts: Tokens of the text itself: of the others none can stay.
    """
    ...


@runtime_checkable
class WeighsRows(Protocol):
  """Counts some queries of a prompt for more than others."""

  def row_weights(
      self, positions: Int[Array, "B T"], lengths: Int[Array, "B"]
  ) -> Float[Array, "B T"] | None:
    """Returns the weight of each query in `Prompt.col_mass`; None is 1."""
    ...


@runtime_checkable
class MarksTokens(Protocol):
  """Gives a new token more than a score of 0."""

  def enter(self, token: policy_lib.Token, state: Arrays) -> Entered:
    """Returns score and aux of a new token, and the new state."""
    ...


@runtime_checkable
class Observes(Protocol):
  """Changes scores by what a step attended to."""

  def observe(self, slots: policy_lib.Slots, step: policy_lib.Step) -> Observed:
    """Returns score, aux and state after a step."""
    ...


@runtime_checkable
class Frees(Protocol):
  """Empties slots before others need them."""

  def freed(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Bool[Array, "B K C"]:
    """Returns which slots are of no use from the token at `position` on.

    Protected ones stay all the same.
    """
    ...


@runtime_checkable
class Merges(Protocol):
  """Lets tokens that leave change the values of those that stay."""

  def merged(
      self,
      slots: policy_lib.Slots,
      leaving: Int[Array, "B K L"],
      stays: Bool[Array, "B K C"],
      position: Int[Array, "B"],
  ) -> Float[Array, "B K C H"]:
    """Returns values of all slots; those of slots that do not stay are any.

    Args:
      slots: Before anything has left.
      leaving: Slots among which are all those that leave.
      stays: Whether a slot holds a token that stays.
      position: Of the token for which the others leave.
    """
    ...


@runtime_checkable
class HasAux(Protocol):
  """Keeps a number or more a slot."""

  def init_aux(
      self, batch: int, num_kv_heads: int, capacity: int, num_groups: int
  ) -> Arrays:
    """Returns empty arrays, [B, K, C, ...] each."""
    ...


@runtime_checkable
class HasState(Protocol):
  """Keeps a row or more a sequence."""

  def init_state(
      self, batch: int, num_kv_heads: int, head_dim: int, num_groups: int
  ) -> Arrays:
    """Returns empty arrays, [B, ...] each."""
    ...


@runtime_checkable
class HasKernel(Protocol):
  """Is a rule that a decode kernel knows."""

  def kernel_options(self) -> dict[str, Any]:
    """Returns the options with which `kernels_pallas.decode` is this policy."""
    ...


@runtime_checkable
class KnowsMass(Protocol):
  """Has a sum of attention as its score."""

  def kept_mass(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Float[Array, "B K"] | None:
    """Returns the share of all attention so far that went to what is kept.

    None where the score as it is set up is no such sum.
    """
    ...


@runtime_checkable
class SharesLayers(Protocol):
  """Gives layers different numbers of slots."""

  def capacities(self, num_layers: int, capacity: int) -> tuple[int, ...]:
    """Returns the slots of each layer; their mean is `capacity`."""
    ...


@runtime_checkable
class Fits(Protocol):
  """Has sizes that few slots do not allow."""

  def fitted(self, slots: int, named: frozenset[str]) -> policy_lib.Policy:
    """Returns the policy for so many slots, but for the fields `named`."""
    ...


@runtime_checkable
class Plans(Protocol):
  """Costs other than a score of each slot a step."""

  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """Returns what its cache costs, by the slots of each layer."""
    ...


@runtime_checkable
class IsCosted(Protocol):
  """Takes more than a number of slots in the cost table."""

  def costed(self, room: cache_plan.Room, name: str) -> cache_plan.CachePlan:
    """Returns what its cache costs in the room it is given."""
    ...


@runtime_checkable
class HasOwnCache(Protocol):
  """Keeps tokens in something else than slots that all heads have alike."""

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
      options: cache_options.CacheOptions,
  ) -> hooks.KVCache:
    """Returns an empty cache of one layer; see `kv_cache.init`."""
    ...
