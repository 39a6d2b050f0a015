"""Positions that are added to embeddings: sinusoidal and learned ones."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.transformer import config as configs
from scansnap_jax.experiment import errors


def check_learned_positions(
    config: configs.TransformerConfig, num_positions: int
) -> None:
  """Raises UserError where learned positions end before the tokens do."""
  if config.positions == "learned" and num_positions > config.max_len:
    raise errors.UserError(
        f"This model has {config.max_len} learned positions and was asked for"
        f" {num_positions}: give it shorter texts."
    )


def sinusoids(
    positions: Int[Array, "B T"], embed_dim: int
) -> Float[Array, "B T D"]:
  """Sines and cosines of t 10000^(-2 j / D) in turn (arXiv 1706.03762)."""
  even = jnp.arange(0, embed_dim, 2, dtype=jnp.float32)
  angles = (
      positions.astype(jnp.float32)[..., None]
      * (10_000.0 ** (-even / embed_dim))[None, None]
  )
  both = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
  return both.reshape(*positions.shape, -1)[..., :embed_dim]
