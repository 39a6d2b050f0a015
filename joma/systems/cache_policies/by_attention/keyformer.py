"""Heavy hitters of noisy, ever flatter weights.

Letters: B batch, T tokens of a prompt, K key and value heads, G query heads of
each, C slots.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from joma.transformer import full_cache
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keyformer(policy_lib.Policy):
  """H2O of noisy, ever flatter weights (arXiv 2403.09054).

  Each key has a Gumbel draw z; a query adds softmax((logits + z) / tau), and
  tau grows from tau_start to tau_end over the steps that follow a prompt.

  Paper's settings: temperatures from 1 to 2, 50 to 70 % of the cache.

  Attributes:
    tau_start: Above 0.
    tau_end: Above 0.
    num_steps: Positions, from 0, over which tau goes from the one to the other.
    seed: Of the draws, which differ by layer, head and position alone.
    reduce: As in `H2O`.
  """

  label: ClassVar[str] = "Keyformer"
  uses_queries: ClassVar[bool] = True
  draws: ClassVar[bool] = True
  estimates_attention: ClassVar[bool] = True
  tau_start: float = 1.0
  tau_end: float = 2.0
  num_steps: int = 1024
  seed: int = 0
  reduce: policy_lib.Reduce = "sum"

  def __post_init__(self):
    super().__post_init__()
    require.one_of("reduce", self.reduce, ("sum", "max"))
    for name in ("tau_start", "tau_end", "num_steps"):
      if getattr(self, name) <= 0:
        raise errors.UserError(f"{name}={getattr(self, name)} must be above 0.")

  def init_aux(
      self, batch: int, num_kv_heads: int, capacity: int, num_groups: int
  ) -> rules.Arrays:
    return jnp.zeros((batch, num_kv_heads, capacity))

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    """The noise is one more channel of the keys."""
    batch, seq_len, num_kv_heads, _ = prompt.key.shape
    noise = self._noise(prompt.layer, jnp.arange(seq_len), num_kv_heads).T
    noise = jnp.broadcast_to(noise[None], (batch, num_kv_heads, seq_len))
    if prompt.options.logits_soft_cap is not None:
      raise errors.UserError("keyformer does not read prompts with soft caps.")
    widen = lambda x, channel: jnp.concatenate([x, channel], axis=-1)
    scale = prompt.options.scale
    channel = noise.swapaxes(1, 2)[..., None] / scale
    query = prompt.query.astype(jnp.float32)
    key = widen(prompt.rotated_key.astype(jnp.float32), channel)
    options = dataclasses.replace(
        prompt.options, scale=scale / self.tau_start, weights=None
    )
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

  def enter(
      self, token: policy_lib.Token, state: rules.Arrays
  ) -> rules.Entered:
    batch, num_kv_heads = token.key.shape[:2]
    noise = self._noise(token.layer, token.position, num_kv_heads)
    return jnp.zeros((batch, num_kv_heads)), noise, state

  def observe(
      self, slots: policy_lib.Slots, step: policy_lib.Step
  ) -> rules.Observed:
    done = jnp.clip(step.position / self.num_steps, 0.0, 1.0)
    tau = self.tau_start + (self.tau_end - self.tau_start) * done
    noisy = (step.attn_logits + slots.aux[:, :, None]) / tau[
        :, None, None, None
    ]
    given = policy_lib.group_sum(jax.nn.softmax(noisy), self.reduce)
    return slots.score + given, slots.aux, slots.state

  def _noise(
      self, layer: int, positions: Int[Array, "T"], num_kv_heads: int
  ) -> Float[Array, "T K"]:
    draw = lambda position: jax.random.gumbel(
        policy_lib.random_key(self.seed, layer, position), (num_kv_heads,)
    )
    return jax.vmap(draw)(positions)
