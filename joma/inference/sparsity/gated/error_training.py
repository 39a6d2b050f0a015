"""Predictors that learn from the error of an MLP's output, not from labels.

  loss = E ||sum over i of (1 - p_i) h_i w_i||^2 / E ||y||^2
  p = sigmoid(scores - border), border between their num-th and next

so that about `num` blocks are open, whichever they are; h_i w_i is what neuron
i adds to y. Which blocks count is nowhere said: two neurons that undo each
other may both be left out. A batch is a pure function of (seed, step).

Letters: R rows, D width, U blocks, r rank.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
import optax

from joma.inference.sparsity import predictors
from joma.inference.sparsity.gated import weights as weights_lib

Weights = weights_lib.Weights
Predictor = Mapping[str, Array]


def loss(
    predictor: Predictor,
    weights: Weights,
    x: Float[Array, "R D"],
    num: int,
    block_size: int = 1,
) -> Float[Array, ""]:
  """Share of the output's square that gates leave out; see the module."""
  hidden = weights.dense_hidden(x)
  scores = predictors.scores(predictor, x)
  ranked = jax.lax.top_k(scores, min(num + 1, scores.shape[-1]))[0]
  border = jax.lax.stop_gradient(ranked[:, -2:].mean(axis=-1, keepdims=True))
  closed = jnp.repeat(jax.nn.sigmoid(border - scores), block_size, axis=-1)
  lost = jnp.square((closed * hidden) @ weights.kernels["down"]).sum()
  whole = jnp.square(hidden @ weights.kernels["down"]).sum()
  return lost / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)


@functools.partial(
    jax.jit,
    static_argnames=("num", "rank", "num_steps", "batch", "block_size", "seed"),
)
def train(
    weights: Weights,
    x: Float[Array, "R D"],
    *,
    num: int,
    rank: int,
    num_steps: int,
    batch: int = 256,
    lr: float = 3e-3,
    block_size: int = 1,
    seed: int = 0,
) -> tuple[dict[str, Array], Float[Array, "n"]]:
  """Returns a layer's predictor, and the loss of each step.

  Args:
    weights: Of the layer's MLP.
    x: What it reads, of the training texts.
    num: Blocks that are to be chosen.
    rank: r.
    num_steps: Of AdamW; the learning rate falls to a tenth along a cosine.
    batch: Rows of a step.
    lr: Highest learning rate.
    block_size: Neurons of a block.
    seed: Of the first values and the batches.
  """
  width, neurons = weights.kernels["up"].shape
  keys = jax.random.split(jax.random.key(seed), 3)
  start = _start(keys[:2], width, neurons // block_size, rank)
  rate = optax.cosine_decay_schedule(lr, max(1, num_steps), alpha=0.1)
  optimizer = optax.adamw(rate, weight_decay=0.01)
  slope = jax.value_and_grad(loss)

  def update(state: Any, step: Array) -> tuple[Any, Array]:
    predictor, moments = state
    key = jax.random.fold_in(keys[2], step)
    rows = x[jax.random.randint(key, (batch,), 0, len(x))]
    value, slopes = slope(predictor, weights, rows, num, block_size)
    changes, moments = optimizer.update(slopes, moments, predictor)
    return (optax.apply_updates(predictor, changes), moments), value

  state = start, optimizer.init(start)
  (predictor, _), losses = jax.lax.scan(update, state, jnp.arange(num_steps))
  return predictor, losses


def _start(
    keys: Array, width: int, num_units: int, rank: int
) -> dict[str, Array]:
  draw = lambda key, n, m: jax.random.normal(key, (n, m)) / np.sqrt(n)
  return {
      "project": draw(keys[0], width, rank),
      "expand": draw(keys[1], rank, num_units),
      "bias": jnp.zeros((num_units,)),
  }
