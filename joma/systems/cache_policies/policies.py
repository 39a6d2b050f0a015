"""Policies of a KV cache, one short class each; see `policy` for what one is.

Here are those that go by position, by chance or by attention; those that go by
keys and values are in `key_policies`; what shares slots out among heads is in
`head_budgets`, and what only selects in `quest`. `policy_names` knows them all.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots.
"""

import dataclasses
import itertools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from joma.inference.cache import policy as policy_lib
from joma.transformer import full_cache
from scansnap_jax.experiment import errors

Reduce = Literal["sum", "max"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(policy_lib.Policy):
  """Nothing leaves; a token too many makes the output NaN, not a window."""

  num_recent: int | None = 0
  evicts: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(policy_lib.Policy):
  """The last C tokens."""

  num_recent: int | None = 0

  def priority(self, slots, position):
    return slots.pos


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(Window):
  """First tokens, attention's sinks, and a window (arXiv 2309.17453).

  The paper counts positions within the cache: `kv_cache.init(...,
  positions="rolled")`.
  """

  num_sinks: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(policy_lib.Policy):
  """Any unprotected token, drawn anew at each step.

  Attributes:
    seed: Of the draws, which differ by layer, head and position alone.
  """

  num_recent: int | None = 0
  seed: int = 0

  def priority(self, slots, position):
    num_kv_heads, capacity = slots.pos.shape[1:]
    # Slots first: more of them, or padding, leave the others' draws alone.
    draw = lambda step: jax.random.uniform(
        policy_lib.random_key(self.seed, slots.layer, step),
        (capacity, num_kv_heads),
    ).T
    return jax.vmap(draw)(position)


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(policy_lib.Policy):
  """Heavy hitters: what attention has given a token so far (arXiv 2306.14048).

  Causal and per key head: a prompt's queries count in full, later ones over
  what is kept. `score="ema"` is A2SF (arXiv 2407.20485).

  Attributes:
    score: "sum" of weights, "mean" over the queries since the token, or "ema",
      the sum with a factor `decay` a step.
    decay: In (0, 1]; of "ema" alone.
    reduce: How query heads that share a key head vote. "max" of a prompt is of
      the heads' sums.
  """

  score: Literal["sum", "mean", "ema"] = "sum"
  decay: float = 0.98
  reduce: Reduce = "sum"

  def __post_init__(self):
    super().__post_init__()
    _check_one_of("score", self.score, ("sum", "mean", "ema"))
    _check_one_of("reduce", self.reduce, ("sum", "max"))
    if not 0 < self.decay <= 1:
      raise errors.UserError(f"decay={self.decay} must be in (0, 1].")

  def kernel_options(self):
    return {
        "num_sinks": self.num_sinks,
        "num_recent": self.num_recent,
        "score": self.score,
        "decay": self.decay if self.score == "ema" else 1.0,
        "reduce": self.reduce,
    }

  @property
  def uses_col_mass(self):
    return True

  def row_weights(self, positions, lengths):
    if self.score != "ema":
      return None
    age = (lengths[:, None] - 1 - positions).astype(jnp.float32)
    return jnp.where(positions >= 0, jnp.float32(self.decay) ** age, 0.0)

  def read_prompt(self, prompt):
    return policy_lib.group_sum(prompt.col_mass, self.reduce), None, None

  def priority(self, slots, position):
    if self.score != "mean":
      return slots.score
    num_queries = jnp.maximum(position[:, None, None] - slots.pos, 1)
    return slots.score / num_queries

  def observe(self, slots, step):
    given = policy_lib.group_sum(step.attn_weights, self.reduce)
    decay = self.decay if self.score == "ema" else 1.0
    return decay * slots.score + given, slots.aux, slots.state

  def kept_mass(self, slots, position):
    if self.score == "ema" or self.reduce == "max":
      return super().kept_mass(slots, position)
    kept = jnp.where(slots.pos >= 0, slots.score, 0.0).sum(axis=-1)
    return kept / jnp.maximum(position * slots.num_groups, 1)[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scissorhands(policy_lib.Policy):
  """Tokens that were often above average lately (arXiv 2305.17118).

  The score counts, among the last queries, those that gave the token more than
  1 / n, of n tokens seen; heads that share a key head are averaged.

  Attributes:
    history: Queries that are remembered, 1 to 32: a bit each.
  """

  history: int = 32

  def __post_init__(self):
    super().__post_init__()
    if not 1 <= self.history <= 32:
      raise errors.UserError(f"history={self.history} must be from 1 to 32.")

  def init_aux(self, batch, num_kv_heads, capacity, num_groups):
    return jnp.zeros((batch, num_kv_heads, capacity), jnp.uint32)

  def read_prompt(self, prompt):
    attn_weights, rows = prompt.last_weights(self.history)
    num_seen = jnp.maximum(rows + 1, 1)[:, None, :, None]
    is_above = attn_weights.mean(axis=2) * num_seen > 1
    ages = jnp.arange(self.history - 1, -1, -1, dtype=jnp.uint32)
    bits = is_above.astype(jnp.uint32) << ages[None, None, :, None]
    bits = bits.sum(axis=2, dtype=jnp.uint32)
    return self._count(bits), bits, None

  def enter(self, token, state):
    zeros = jnp.zeros(token.key.shape[:2])
    return zeros, zeros.astype(jnp.uint32), state

  def observe(self, slots, step):
    num_seen = jnp.isfinite(step.attn_logits[:, :, :1]).sum(-1)
    is_above = step.attn_weights.mean(axis=2) * num_seen > 1
    bits = (slots.aux << 1) | is_above.astype(jnp.uint32)
    bits = bits & jnp.uint32(2**self.history - 1)
    return self._count(bits), bits, slots.state

  def _count(self, bits):
    return jax.lax.population_count(bits).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(policy_lib.Policy):
  """What the last query alone gave, averaged over heads (arXiv 2401.06104).

  All heads of a layer keep the same tokens.
  """

  num_recent: int | None = 0

  def read_prompt(self, prompt):
    attn_weights, _ = prompt.last_weights(1)
    return self._of_layer(attn_weights[:, :, :, 0]), None, None

  def observe(self, slots, step):
    return self._of_layer(step.attn_weights), slots.aux, slots.state

  def _of_layer(self, attn_weights):
    mean = attn_weights.mean(axis=(1, 2))[:, None]
    num_kv_heads = attn_weights.shape[1]
    return jnp.broadcast_to(mean, (len(mean), num_kv_heads, mean.shape[-1]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(policy_lib.Policy):
  """What a prompt's last queries gave, smoothed along the text.

  The paper (arXiv 2404.14469) stops evicting after the prompt. Here the score
  goes on as a mean with the window's length as its memory.

  Attributes:
    window: The last queries of a prompt, which stay themselves.
    kernel_size: Positions that are averaged over, odd.
  """

  window: int = 32
  kernel_size: int = 5

  def __post_init__(self):
    super().__post_init__()
    if self.window < 1:
      raise errors.UserError(f"window={self.window} must be at least 1.")
    if self.kernel_size < 1 or self.kernel_size % 2 == 0:
      raise errors.UserError(f"kernel_size={self.kernel_size} must be odd.")

  def _num_recent(self, capacity):
    return self.window if self.num_recent is None else self.num_recent

  def read_prompt(self, prompt):
    attn_weights, rows = prompt.last_weights(self.window)
    first = rows[:, :1]  # The window itself is not scored.
    is_before = (prompt.positions >= 0) & (prompt.positions < first)
    num_rows = jnp.maximum((rows >= 0).sum(-1), 1)[:, None, None]
    mean = attn_weights.sum(axis=3).mean(axis=2) / num_rows
    mean = jnp.where(is_before[:, None], mean, 0.0)
    return _moving_mean(mean, self.kernel_size), None, None

  def observe(self, slots, step):
    given = step.attn_weights.mean(axis=2)
    score = slots.score + (given - slots.score) / self.window
    return score, slots.aux, slots.state


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
  """SnapKV with more slots in early layers (arXiv 2406.02069).

  Attributes:
    beta: The last layer has capacity / beta slots, but not fewer than it
      protects and one; the others lie on a line whose mean is the capacity.
  """

  beta: float = 20.0

  def __post_init__(self):
    super().__post_init__()
    if self.beta < 1:
      raise errors.UserError(f"beta={self.beta} must be at least 1.")

  def capacities(self, num_layers, capacity):
    least = self.num_sinks + self._num_recent(capacity) + 1
    last = max(round(capacity / self.beta), min(least, capacity))
    step = 2 * (capacity - last) / max(num_layers - 1, 1)
    # Sums that are rounded: the total is exact.
    total = lambda n: round(n * (2 * capacity - last) - step * n * (n - 1) / 2)
    ends = [total(n) for n in range(num_layers)] + [num_layers * capacity]
    return tuple(b - a for a, b in itertools.pairwise(ends))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keyformer(policy_lib.Policy):
  """H2O of noisy, ever flatter weights (arXiv 2403.09054).

  Each key has a Gumbel draw z; a query adds softmax((logits + z) / tau), and
  tau grows from tau_start to tau_end over the steps that follow a prompt.

  Attributes:
    tau_start: Above 0.
    tau_end: Above 0.
    num_steps: Positions, from 0, over which tau goes from the one to the other.
    seed: Of the draws, which differ by layer, head and position alone.
    reduce: As in `H2O`.
  """

  tau_start: float = 1.0
  tau_end: float = 2.0
  num_steps: int = 1024
  seed: int = 0
  reduce: Reduce = "sum"

  def __post_init__(self):
    super().__post_init__()
    _check_one_of("reduce", self.reduce, ("sum", "max"))
    for name in ("tau_start", "tau_end", "num_steps"):
      if getattr(self, name) <= 0:
        raise errors.UserError(f"{name}={getattr(self, name)} must be above 0.")

  def init_aux(self, batch, num_kv_heads, capacity, num_groups):
    return jnp.zeros((batch, num_kv_heads, capacity))

  def read_prompt(self, prompt):
    """The noise is one more channel of the keys."""
    batch, seq_len, num_kv_heads, _ = prompt.key.shape
    noise = self._noise(prompt.layer, jnp.arange(seq_len), num_kv_heads).T
    noise = jnp.broadcast_to(noise[None], (batch, num_kv_heads, seq_len))
    if prompt.options.logits_soft_cap is not None:
      raise errors.UserError("Keyformer does not read prompts with soft caps.")
    widen = lambda x, channel: jnp.concatenate([x, channel], axis=-1)
    scale = prompt.options.scale
    channel = noise.swapaxes(1, 2)[..., None] / scale
    query = prompt.query.astype(jnp.float32)
    key = widen(prompt.rotated_key.astype(jnp.float32), channel)
    options = dataclasses.replace(prompt.options, scale=scale / self.tau_start)
    result = full_cache.attend_many(
        widen(query, jnp.ones_like(query[..., :1])),
        key.swapaxes(1, 2),
        jnp.zeros_like(key).swapaxes(1, 2),
        prompt.positions,
        options,
        return_col_mass=True,
    )
    assert result.col_mass is not None  # It was asked for.
    grouped = (batch, num_kv_heads, -1, seq_len)
    col_mass = result.col_mass.reshape(grouped)
    return policy_lib.group_sum(col_mass, self.reduce), noise, None

  def enter(self, token, state):
    batch, num_kv_heads = token.key.shape[:2]
    noise = self._noise(token.layer, token.position, num_kv_heads)
    return jnp.zeros((batch, num_kv_heads)), noise, state

  def observe(self, slots, step):
    done = jnp.clip(step.position / self.num_steps, 0.0, 1.0)
    tau = self.tau_start + (self.tau_end - self.tau_start) * done
    noisy = (step.attn_logits + slots.aux[:, :, None]) / tau[
        :, None, None, None
    ]
    given = policy_lib.group_sum(jax.nn.softmax(noisy), self.reduce)
    return slots.score + given, slots.aux, slots.state

  def _noise(self, layer, positions, num_kv_heads) -> Any:
    draw = lambda position: jax.random.gumbel(
        policy_lib.random_key(self.seed, layer, position), (num_kv_heads,)
    )
    return jax.vmap(draw)(positions)


def _moving_mean(score, kernel_size):
  """Mean of neighbours along the last axis, zeros beyond the ends."""
  around = kernel_size // 2
  padded = jnp.pad(score, ((0, 0), (0, 0), (around, around)))
  length = score.shape[-1]
  total = sum(padded[..., i : i + length] for i in range(kernel_size))
  return total / kernel_size


def _check_one_of(name, value, choices):
  if value not in choices:
    raise errors.UserError(f"{name}={value!r} must be one of {choices}.")
