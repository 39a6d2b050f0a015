"""What a round of speculative decoding leaves to the next one.

Letters: B batch, S guesses of the round.
"""

import dataclasses

import jax
import jax.numpy as jnp

from joma.inference import decode_steps
from joma.inference.cache import storage


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Round:
  """Between two rounds.

  Attributes:
    came: What the round has yielded, int32 [B, S + 1], the first `counts` of
      each row.
    counts: Tokens of each sequence, 0 where it had ended before, int32 [B].
    newest: The last token of each sequence, which is not taken in yet, int32
      [B].
    positions: Where it stands, int32 [B].
    num_left: Tokens that may still come, int32 [B].
    is_done: Whether the sequence has ended, bool [B].
    is_finite: Whether the logits of what came were numbers, bool [B].
    number: Rounds so far, int32.
  """

  came: storage.Leaf
  counts: storage.Leaf
  newest: storage.Leaf
  positions: storage.Leaf
  num_left: storage.Leaf
  is_done: storage.Leaf
  is_finite: storage.Leaf
  number: storage.Leaf


def first(state: decode_steps.DecodeState, max_new_tokens: int) -> Round:
  """Returns the round that yields the token behind each prompt.

  Args:
    state: After the prompts.
    max_new_tokens: Of each sequence, at most.
  """
  num_left = jnp.full_like(state.tokens, max_new_tokens - 1)
  return Round(
      came=state.tokens[:, None],
      counts=jnp.ones_like(state.tokens),
      newest=state.tokens,
      positions=state.positions,
      num_left=num_left,
      is_done=state.is_done | (num_left <= 0),
      is_finite=state.is_finite,
      number=jnp.int32(0),
  )
