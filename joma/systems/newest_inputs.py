"""What convolutions of queries, keys and values read of the tokens before.

The newest w - 1 of each, by name, whatever the text.

Letters: B batch, T new tokens, W = w - 1, H head size.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from joma.systems.score_rules import convolved
from joma.transformer import config as configs

PARTS = ("query", "key", "value")


def none(
    config: configs.TransformerConfig, batch_size: int, width: int
) -> dict[str, Array]:
  """Zeros, the inputs before the first token, by name [B, w - 1, ., H].

  Args:
    config: The model's.
    batch_size: B.
    width: w, tokens that the convolutions read.
  """
  heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
  return {
      part: jnp.zeros((batch_size, width - 1, num, config.head_dim))
      for part, num in zip(PARTS, heads, strict=True)
  }


def put_before(
    inputs: dict[str, Array],
    vectors: tuple[Array, Array, Array],
    lengths: Int[Array, "B"],
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Puts the newest inputs before new ones.

  Args:
    inputs: The newest of queries, keys and values, by name [B, W, ., H].
    vectors: New queries, keys and values [B, T, ., H].
    lengths: Tokens of each text among them; padding follows.

  Returns:
    Both, by name, and the inputs that are then the newest.
  """
  both, after = {}, {}
  for part, x in zip(PARTS, vectors, strict=True):
    old = inputs[part]
    both[part] = jnp.concatenate([old.astype(x.dtype), x], axis=1)
    newest = convolved.last_inputs(both[part], lengths, old.shape[1])
    after[part] = newest.astype(old.dtype)
  return both, after
