"""What is read off a run: each block's attention, weights and entropies.

Letters as in `joma.block`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.block import loss as loss_lib
from joma.block import model
from joma.block import run as run_lib
from joma.theory import metrics


class BlockObservation(NamedTuple):
  """What is read off one block.

  Attributes:
    attn_logits: Z.
    v: U_C^T W.
    attended: b-bar = E[b].
    correction: The integral in the module's docstring so far.
    embedding_norms: |u_l|^2 of each contextual token.
    entropy: Of softmax(z / T), mean over queries, in nats.
    implied_entropy: Of softmax(sum_k v_k^2 / (2 T)), what `entropy` is if exp
      attention starts at 0 and obeys Theorem 1; also for frozen attention.
    stable_rank: Of W.
    stable_rank_change: Of W - W(0); 0 before the first step.
  """

  attn_logits: Float[Array, "Q M"]
  v: Float[Array, "M F"]
  attended: Float[Array, "M"]
  correction: Float[Array, "M"]
  embedding_norms: Float[Array, "M"]
  entropy: Float[Array, ""]
  implied_entropy: Float[Array, ""]
  stable_rank: Float[Array, ""]
  stable_rank_change: Float[Array, ""]


class Observation(NamedTuple):
  """What is read off a run, over samples that a step may not have seen.

  Attributes:
    blocks: From the bottom.
    loss: In nats.
    accuracy: In [0, 1].
  """

  blocks: tuple[BlockObservation, ...]
  loss: Float[Array, ""]
  accuracy: Float[Array, ""]


def observe(
    state: run_lib.TrainState,
    batch: run_lib.Batch,
    setting: run_lib.BlockSetting,
) -> Observation:
  """Reads off a run what `Observation` lists."""
  pushes = loss_lib.no_pushes(batch, setting)
  loss, (logits, weights) = loss_lib.mean_loss(
      state.params, pushes, state, batch, setting
  )
  blocks = []
  for i, (block, embedding) in enumerate(
      zip(setting.blocks, run_lib.embeddings(state, setting), strict=True)
  ):
    params = state.params["blocks"][model.block_name(i)]
    v = embedding @ params["W"]
    # Theorem 1 of exp attention from z = 0: z / T = sum_k v_k^2 / (2 T).
    squares = jnp.sum(v**2, axis=1) / (2 * block.kind.temperature)
    scaled = params["Z"] / block.kind.temperature
    blocks.append(
        BlockObservation(
            attn_logits=params["Z"],
            v=v,
            attended=weights[i].mean(axis=0),
            correction=state.corrections[i],
            embedding_norms=jnp.sum(embedding**2, axis=1),
            entropy=metrics.attention_entropy(scaled).mean(),
            implied_entropy=metrics.attention_entropy(squares),
            stable_rank=metrics.stable_rank(params["W"]),
            stable_rank_change=metrics.stable_rank(
                params["W"] - state.start[i]
            ),
        )
    )
  # Of the same forward pass as loss and attention.
  is_right = jnp.argmax(logits, axis=1) == batch.label
  return Observation(tuple(blocks), loss, is_right.mean())
