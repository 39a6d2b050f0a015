"""Columns of attention: what they gave, and rows in which they give less.

Letters: B batch, T queries, S keys, N query heads, K key and value heads, E
columns that are looked at, H head size.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.transformer import hooks
from kernels_pallas import logits as logits_lib


def calibrate(
    out: Float[Array, "*b H"],
    part: Float[Array, "*b H"],
    mass: Float[Array, "*b"],
    beta: float | Float[Array, ""],
) -> Float[Array, "*b H"]:
  """Scales what S gave, and the rest so that rows sum to 1.

  Args:
    out: Of attention, or its weights.
    part: What of it columns of S gave.
    mass: m, their weights in all.
    beta: Their factor.
  """
  is_all = mass > 1 - 1e-6
  rest = (1 - beta * mass) / jnp.where(is_all, 1.0, 1 - mass)
  wide, part = out.astype(jnp.float32), part.astype(jnp.float32)
  scaled = beta * part + rest[..., None] * (wide - part)
  return jnp.where(is_all[..., None], wide, scaled).astype(out.dtype)


def read(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    chosen: Int[Array, "B N E"],
    lse: Float[Array, "B N T"],
    options: hooks.AttentionOptions,
) -> tuple[Float[Array, "B N T E"], Float[Array, "B N E H"]]:
  """Weights of the chosen columns, and their values."""
  num_groups = query.shape[2] // key.shape[2]
  index = jnp.maximum(chosen, 0)[..., None]
  gather = lambda x: jnp.take_along_axis(
      jnp.repeat(x.swapaxes(1, 2), num_groups, axis=1), index, axis=2
  )
  products = jnp.einsum(
      "BTNH,BNEH->BNTE",
      query,
      gather(key),
      preferred_element_type=jnp.float32,
  )
  attn_logits = logits_lib.soft_cap(
      options.scale * products, options.logits_soft_cap
  )
  steps = jnp.arange(query.shape[1])[None, None, :, None]
  seen: Bool[Array, "B N T E"] = (chosen[:, :, None] >= 0) & (
      chosen[:, :, None] <= steps
  )
  exponent = jnp.where(seen, attn_logits - lse[..., None], -jnp.inf)
  return jnp.exp(exponent), gather(value).astype(jnp.float32)
