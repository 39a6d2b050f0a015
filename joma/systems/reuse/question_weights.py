"""How much a question's tokens attend to those of a text before it.

Letters: N heads, Q tokens of the question, S tokens of the text, T of a call.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from joma.transformer import model as models
from scansnap_jax.experiment import errors

# Text and question to the weights of the question's rows.
Read = Callable[
    [Int[np.ndarray, "S"], Int[np.ndarray, "Q"]], Float[np.ndarray, "N Q S"]
]


def reader(
    model: models.Transformer, params: PyTree, room: int, layer: int = -1
) -> Read:
  """Returns what reads a text and a question, by one compiled program.

  Args:
    model: The Transformer.
    params: Its parameters.
    room: T, most tokens of a call.
    layer: Whose weights are read; the last one's is the method.
  """
  number = range(model.config.num_layers)[layer]

  def read(
      text: Int[np.ndarray, "S"], question: Int[np.ndarray, "Q"]
  ) -> Float[np.ndarray, "N Q S"]:
    size, length = len(text), len(text) + len(question)
    if length > room:
      raise errors.UserError(
          f"room={room} is too little for {length} tokens: what is carried, a"
          " chunk and the question."
      )
    tokens = np.zeros((1, room), np.int32)
    tokens[0, :length] = np.concatenate([text, question])
    positions = np.full((1, room), -1, np.int32)
    positions[0, :length] = np.arange(length)
    weights = np.asarray(_weights(model, number, params, tokens, positions))
    return weights[:, size:length, :size]

  return read


@functools.partial(jax.jit, static_argnums=(0, 1))
def _weights(
    model: models.Transformer,
    layer: int,
    params: PyTree,
    tokens: Int[Array, "1 T"],
    positions: Int[Array, "1 T"],
) -> Float[Array, "N T T"]:
  """Attention weights of one layer."""
  found: Any = model.apply(
      {"params": params}, tokens, positions=positions, mutable="intermediates"
  )
  seen = found[1]["intermediates"][f"layers_{layer}"]["attn"]
  return seen["attn_weights"][0][0].astype(jnp.float32)
