"""What a run descends on: the loss of a batch, by way of every block.

Two losses of the logits h A (https://arxiv.org/abs/2310.00535, Section 2):

  cross_entropy   -ln softmax(h A)[label]
  stationary      (mean_k (h A)_k) - (h A)[label], the cross-entropy made linear
                  at zero logits. If A is frozen, the gradient that reaches h
                  never changes: Assumption 1 of JoMA holds exactly.

Letters as in `joma.block`.
"""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from joma.block import model
from joma.block import run as run_lib
from joma.theory import dynamics

# What a block sows, by name, each value in a tuple of one.
Sown = Mapping[str, tuple[Array, ...]]


# Of each block, added to its preactivations.
Pushes = tuple[Float[Array, "B _"], ...]


def no_pushes(batch: run_lib.Batch, setting: run_lib.BlockSetting) -> Pushes:
  """Zeros to add to each block's preactivations W^T f."""
  shape = lambda block: (len(batch.label), block.hidden_dim)
  return tuple(jnp.zeros(shape(block)) for block in setting.blocks)


def mean_loss(
    params: PyTree,
    pushes: Pushes,
    state: run_lib.TrainState,
    batch: run_lib.Batch,
    setting: run_lib.BlockSetting,
) -> tuple[
    Float[Array, ""], tuple[Float[Array, "B K"], list[Float[Array, "B _"]]]
]:
  """Computes the mean loss of a batch; differentiable in its first two.

  Args:
    params: In place of the state's.
    pushes: Added to W^T f of each block: their gradients are -gh.
    state: The run so far.
    batch: Samples.
    setting: The network.

  Returns:
    The loss in nats, and with it the logits and each block's b.
  """
  state = state._replace(params=params)
  logits, sown = forward(state, batch, setting, pushes)
  own = jnp.take_along_axis(logits, batch.label[:, None], axis=1)[:, 0]
  over = jax.nn.logsumexp(logits, axis=1)
  # Both losses differ in this term alone; a traced choice keeps one program.
  over = jnp.where(state.run.is_stationary, logits.mean(axis=1), over)
  losses = over - own
  weights = [of_block["attn_weights"][0] for of_block in sown]
  return losses.mean(), (logits, weights)


def forward(
    state: run_lib.TrainState,
    batch: run_lib.Batch,
    setting: run_lib.BlockSetting,
    pushes: Pushes | None = None,
) -> tuple[Float[Array, "B K"], list[Sown]]:
  """Computes the logits.

  Args:
    state: The run so far.
    batch: Samples.
    setting: The network.
    pushes: Added to W^T f of each block: their gradients are -gh.

  Returns:
    Logits, and what each block sows.
  """
  if pushes is None:
    pushes = no_pushes(batch, setting)
  phis = [dynamics.ACTIVATIONS[name] for name in setting.activations]
  # The run's own activation, chosen while it runs: all share one program.
  phi = lambda pre: jax.lax.switch(state.run.activation, phis, pre)
  blocks = tuple(
      block.clone(kind=_with_phi(block.kind, phi, push))
      for block, push in zip(setting.blocks, pushes, strict=True)
  )
  hidden, sown = model.JomaStack(blocks).apply(
      {"params": state.params["blocks"], "constants": state.constants},
      *(batch.counts, batch.query),
      mutable=["intermediates"],
  )
  sown = sown["intermediates"]
  each = [sown[model.block_name(i)] for i in range(len(blocks))]
  return hidden @ state.params["readout"], each


def _with_phi(
    kind: dynamics.Block,
    phi: dynamics.Activation,
    push: Float[Array, "B F"],
) -> dynamics.Block:
  return dataclasses.replace(kind, activation=lambda pre: phi(pre + push))
