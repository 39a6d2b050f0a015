"""Layers that look at sinks and the last tokens alone keep no others.

Letters: B batch, W last queries, K key and value heads, G query heads of each,
T tokens of a prompt, C slots.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from joma.inference.cache import kv_cache
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.inference.cost import cache_plan
from scansnap_jax.experiment import errors

# The share of a layer that has not been judged.
_UNKNOWN = -1.0
# Last tokens of a lazy layer, the newest among them, where nothing says.
_WINDOW = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimLayerKV(policy_lib.Policy):
  """Lazy layers keep sinks and the last tokens, the others all (2410.13846).

  A layer is lazy for a text if the last queries of its prompt give more than
  `threshold` of their weights, averaged over queries and heads, to the first
  `num_sinks` and the last `num_recent` + 1 tokens. Each text is judged by
  itself, at the end of a prompt that is longer than what a lazy layer keeps.

  Other texts have no such end: they are judged once, by the step at which they
  are twice as long. Capacities are those of layers that keep all; where these
  are full, the oldest tokens but the sinks leave. A budget is what lazy layers
  keep.

  Paper's settings: 4 sinks and 1,024 newest tokens; thresholds .9 for Llama 3,
  .65 for Llama 2, .8 for Mistral, .85 for Qwen.

  Attributes:
    threshold: In [0, 1]; 1 keeps everything.
    num_queries: Last queries of a prompt that are asked.
  """

  label: ClassVar[str] = "SimLayerKV"
  uses_queries: ClassVar[bool] = True
  reads_part: ClassVar[bool] = True
  ranks_heads_alone: ClassVar[bool] = False
  num_sinks: int = 4
  threshold: float = 0.9
  num_queries: int = 1

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.threshold <= 1:
      raise errors.UserError(f"threshold={self.threshold} must be in [0, 1].")
    if self.num_queries < 1:
      raise errors.UserError(
          f"num_queries={self.num_queries} must be at least 1."
      )

  def default_recent(self, capacity: int) -> int:
    return max(min(_WINDOW, capacity - self.num_sinks) - 1, 0)

  def fitted(self, slots: int, named: frozenset[str]) -> policy_lib.Policy:
    """Lazy layers have so many slots."""
    if "num_recent" in named:
      return self
    if slots <= self.num_sinks:
      raise errors.UserError(
          f"num_sinks={self.num_sinks} leave none of {slots} slots to the last"
          " tokens."
      )
    return dataclasses.replace(self, num_recent=slots - self.num_sinks - 1)

  def plan(
      self, capacities: tuple[int, ...], name: str
  ) -> cache_plan.CachePlan:
    """Places decide, in slots that lazy layers have as well."""
    return cache_plan.window(capacities, name)

  def costed(self, room: cache_plan.Room, name: str) -> cache_plan.CachePlan:
    """The share that is kept is that of the layers that keep everything."""
    num_layers = room.model.num_layers
    num_full = math.ceil(room.kept * num_layers)
    own = {field.name for field in dataclasses.fields(self)}
    settings: dict[str, Any] = {
        key: value for key, value in room.settings.items() if key in own
    }
    sized = dataclasses.replace(self, **settings).with_capacity(room.length)
    kept = min(sized.num_sinks + (sized.num_recent or 0) + 1, room.length)
    rows = (room.length,) * num_full + (kept,) * (num_layers - num_full)
    return cache_plan.window(rows, name)

  def init_state(
      self, batch: int, num_kv_heads: int, head_dim: int, num_groups: int
  ) -> rules.Arrays:
    return jnp.full(batch, _UNKNOWN, jnp.float32)

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    weights, rows = prompt.last_weights(self.num_queries)
    last = (prompt.lengths - 1)[:, None]
    near = self._is_near(prompt.positions, last)[:, None, None, None]
    given = jnp.where(near, weights, 0.0).sum(axis=-1).mean(axis=(1, 2))
    num_rows = jnp.maximum((rows >= 0).sum(axis=-1), 1)
    share = given.sum(axis=-1) / num_rows
    share = jnp.where(prompt.lengths > self._num_lazy(), share, _UNKNOWN)
    batch, length, heads = prompt.key.shape[:3]
    return jnp.zeros((batch, heads, length)), None, share

  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    share = slots.state
    assert isinstance(share, jax.Array)  # As `init_state` makes it.
    near = self._is_near(slots.pos, step.position[:, None, None])
    given = jnp.where(near[:, :, None], step.attn_weights, 0.0).sum(axis=-1)
    is_due = step.position + 1 >= 2 * self._num_lazy()
    found = jnp.where(is_due, given.mean(axis=(1, 2)), _UNKNOWN)
    return slots.score, None, jnp.where(share == _UNKNOWN, found, share)

  def priority(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Num[Array, "B K C"]:
    del position
    return slots.pos

  def freed(
      self, slots: policy_lib.Slots, position: Int[Array, "B"]
  ) -> Bool[Array, "B K C"]:
    """All that is not protected, where a layer is lazy."""
    del position
    lazy = self.is_lazy(slots.state)
    return jnp.broadcast_to(lazy[:, None, None], slots.pos.shape)

  def is_lazy(self, share: Float[Array, "B"]) -> Bool[Array, "B"]:
    """Whether so large a share makes a layer lazy; at 1 nothing does."""
    # Sums of weights may round to more than 1.
    return (share > self.threshold) & (self.threshold < 1)

  def _num_lazy(self) -> int:
    """Tokens that a lazy layer keeps."""
    return self.num_sinks + (self.num_recent or 0) + 1

  def _is_near(
      self, pos: Int[Array, "*s"], last: Int[Array, "*#s"]
  ) -> Bool[Array, "*s"]:
    """Whether tokens are among the first or the last ones."""
    is_recent = pos >= last - (self.num_recent or 0)
    return (pos >= 0) & ((pos < self.num_sinks) | is_recent)


def without_unused(
    caches: Sequence[kv_cache.SlotCache], position: Int[Array, "B"]
) -> tuple[kv_cache.SlotCache, ...]:
  """Gives slots back that lazy layers leave empty: after a prompt.

  A layer is made smaller where it is lazy for every text. On the host: the
  caches' shapes are other ones then, for which a step compiles anew.

  Args:
    caches: Of this policy, one a layer.
    position: Of each sequence's next token.
  """
  found = []
  for cache in caches:
    policy = cache.policy
    assert isinstance(policy, SimLayerKV)  # Whose caches they are.
    size = policy._num_lazy()
    if size < cache.capacity and bool(policy.is_lazy(cache.state).all()):
      cache = kv_cache.compact(cache, size, position)
    found.append(cache)
  return tuple(found)
