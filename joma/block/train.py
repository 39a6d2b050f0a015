"""Steps of one run, and its records on the way.

Besides what is measured, each run integrates the second term of softmax
attention's exact law of Theorem 1 (`invariants`), for each of its blocks:

  correction = eta_z int E[b b^T sum_k gh_k v_k] / T,   gh_k = -dL / d(W^T f)_k

(https://arxiv.org/abs/2310.00535). Letters as in `joma.block`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree
import optax

from joma.block import loss as loss_lib
from joma.block import model
from joma.block import observe as observe_lib
from joma.block import run as run_lib


def train(
    state: run_lib.TrainState,
    shared: PyTree = (),
    *,
    setting: run_lib.BlockSetting,
    num_steps: int,
    record_every: int,
) -> tuple[run_lib.TrainState, Float[Array, "N"], observe_lib.Observation]:
  """Takes N steps of one run.

  Args:
    state: The run so far.
    shared: Nothing; for `Ensemble.map`.
    setting: The network and its task.
    num_steps: N, a multiple of `record_every`.
    record_every: Steps from one observation to the next.

  Returns:
    The new state, the batch loss before each update, and observations, leaves
    [S, ...]: before the first step and after every `record_every` of them.

  Raises:
    ValueError: If N is no multiple of `record_every`.
  """
  del shared
  if num_steps % record_every:
    raise ValueError(f"{num_steps=} is no multiple of {record_every=}.")
  held_out = run_lib.draw_held_out(state.run, setting)
  # The data set is the same at every step: drawn once, outside the loop.
  data = None if setting.has_fresh_batches else held_out

  def advance(
      state: run_lib.TrainState,
  ) -> tuple[run_lib.TrainState, Float[Array, "_"]]:
    return jax.lax.scan(
        lambda state, _: _step(state, data, setting), state, length=record_every
    )

  def record(
      state: run_lib.TrainState, is_later: Bool[Array, ""]
  ) -> tuple[run_lib.TrainState, tuple[Array, observe_lib.Observation]]:
    stay = lambda state: (state, jnp.zeros(record_every))
    state, losses = jax.lax.cond(is_later, advance, stay, state)
    return state, (losses, observe_lib.observe(state, held_out, setting))

  # The start is the first record: all are made by one piece of program.
  is_later = jnp.arange(num_steps // record_every + 1) > 0
  state, (losses, seen) = jax.lax.scan(record, state, is_later)
  return state, losses[1:].ravel(), seen


def _step(
    state: run_lib.TrainState,
    data: run_lib.Batch | None,
    setting: run_lib.BlockSetting,
) -> tuple[run_lib.TrainState, Float[Array, ""]]:
  """Takes one step; returns the new state and the loss before it."""
  run = state.run
  batch = run_lib.draw(run, state.step, setting) if data is None else data
  (loss, (_, sown)), (grads, pushes) = jax.value_and_grad(
      loss_lib.mean_loss, (0, 1), has_aux=True
  )(state.params, loss_lib.no_pushes(batch, setting), state, batch, setting)
  # At the parameters of this step, before they move: dv_k/dt = E[gh_k b], and
  # gh is minus the gradient of what is added to the preactivations.
  second_terms = [
      run.lr_z * _second_term(weights, -push, v) / block.kind.temperature
      for weights, push, v, block in zip(
          sown,
          pushes,
          run_lib.all_v(state, setting),
          setting.blocks,
          strict=True,
      )
  ]
  optimizer = run_lib.make_optimizer(run, setting)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  new = state._replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      corrections=tuple(
          sum_ + term
          for sum_, term in zip(state.corrections, second_terms, strict=True)
      ),
  )
  # A step that bursts leaves the run where it was, for good: its batch and
  # gradient would be the same again. Comparison with NaN is false.
  is_taken = _largest_logit(new, setting) <= setting.max_attn_logit
  keep = lambda old, new: jnp.where(is_taken, new, old)
  old = (state.params, state.opt_state, state.corrections)
  kept = jax.tree.map(keep, old, (new.params, new.opt_state, new.corrections))
  params, opt_state, corrections = kept
  return (
      new._replace(params=params, opt_state=opt_state, corrections=corrections),
      loss,
  )


def _largest_logit(
    state: run_lib.TrainState, setting: run_lib.BlockSetting
) -> Float[Array, ""]:
  """Largest |z / T| of any block."""
  scaled = [
      jnp.abs(state.params["blocks"][model.block_name(i)]["Z"]).max()
      / block.kind.temperature
      for i, block in enumerate(setting.blocks)
  ]
  return jnp.stack(scaled).max()


def _second_term(
    weights: Float[Array, "B M"],
    gh: Float[Array, "B F"],
    v: Float[Array, "M F"],
) -> Float[Array, "M"]:
  """Computes E[b b^T sum_k gh_k v_k]; the mean is in gh."""
  # From the right, so that no matrix [M, M] is made of b b^T.
  back = jnp.sum((weights @ v) * gh, axis=1)
  return weights.T @ back
