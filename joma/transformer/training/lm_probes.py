"""What a language-model run is asked between its steps, as pure functions.

They are called as the steps of `lm_step` are: on one device, a mesh, or under
`pmap`, whose axis has the name `axis_name`.

Letters: B batch, T positions, N batches of `batches` and else heads, L layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from joma.systems.probes import read as named
from joma.theory import metrics
from joma.transformer import probes
from joma.transformer.layers import monarch
from joma.transformer.layers import scanning
from joma.transformer.text import batches as batches_lib
from joma.transformer.training import lm_step


class Probes(NamedTuple):
  """What is read off each layer of a run, nothing dropped; see `probes`.

  Attributes:
    entropy: Of attention in nats, mean over queries and heads. The code of
      JoMA's Figure 6 has ln(a + 1e-8), which is T 1e-8 less at most.
    effective_support: In keys, mean likewise.
    sink_rate: Share of heads that are sinks.
    stable_rank: Of the MLP's lower matrix, W_up.
  """

  entropy: Float[Array, "L"]
  effective_support: Float[Array, "L"]
  sink_rate: Float[Array, "L"]
  stable_rank: Float[Array, "L"]


def probe(
    params: PyTree,
    batches: batches_lib.Batch,
    *,
    task: lm_step.Task,
    axis_name: str | None = None,
) -> Probes:
  """Probes every layer, averaged over batches with leaves [N, B, T]."""

  def add(so_far: PyTree, batch: batches_lib.Batch) -> tuple[PyTree, None]:
    found = _head_sums(params, batch, task), batch.weights.sum()
    return jax.tree.map(jnp.add, so_far, found), None

  shape = (task.config.model.num_layers, task.config.model.num_heads)
  start = (jnp.zeros((3, *shape)), jnp.zeros(()))
  sums, _ = jax.lax.scan(add, start, batches)
  sums, total = lm_step.sum_over(sums, axis_name)
  entropy, effective_support, sink_mass = sums / total
  # Parameters are the same in every batch: looked at once.
  layers = scanning.unstack(params)
  kernels = [
      monarch.kernel_of(layers[f"layers_{layer}"]["mlp"]["up"])
      for layer in range(shape[0])
  ]
  is_sink = sink_mass > probes.SINK_THRESHOLD
  return Probes(
      entropy=entropy.mean(axis=-1),
      effective_support=effective_support.mean(axis=-1),
      sink_rate=is_sink.astype(jnp.float32).mean(axis=-1),
      stable_rank=jnp.stack([metrics.stable_rank(k) for k in kernels]),
  )


def probe_by_name(
    params: PyTree,
    batches: batches_lib.Batch,
    *,
    task: lm_step.Task,
    names: tuple[str, ...],
    axis_name: str | None = None,
) -> named.TextSums:
  """Sums named probes over the texts of batches with leaves [N, B, T].

  Args:
    params: Parameters.
    batches: With an axis, this device's part; a row is a text.
    task: The run.
    names: Of `systems.probes.names`, but for those of updates.
    axis_name: As in `train`.
  """

  def sums(batch: batches_lib.Batch) -> named.TextSums:
    seen = _seen(params, batch, task)
    is_token = jnp.asarray(batch.weights) > 0
    return probes.by_name(names, seen, task.config.model, is_token)

  def add(so_far: PyTree, batch: batches_lib.Batch) -> tuple[PyTree, None]:
    return jax.tree.map(jnp.add, so_far, sums(batch)), None

  first = jax.tree.map(lambda leaf: leaf[0], batches)
  start = jax.tree.map(jnp.zeros_like, jax.eval_shape(sums, first))
  return lm_step.sum_over(jax.lax.scan(add, start, batches)[0], axis_name)


def _head_sums(
    params: PyTree, batch: batches_lib.Batch, task: lm_step.Task
) -> Float[Array, "3 L N"]:
  """Sums entropy, effective support and sink mass over a batch's queries."""
  found = []
  for layer, attn_weights in enumerate(_attn_weights(params, batch, task)):
    window = task.config.model.window_of(layer)
    visible = probes.count_visible(attn_weights.shape[-1], window)
    seen = probes.attention(attn_weights, visible)
    rows = jnp.stack([seen.entropy, seen.effective_support, seen.sink_mass])
    found.append(jnp.einsum("PBNT,BT->PN", rows, batch.weights))
  return jnp.stack(found, axis=1)


def entropy_of_first(
    params: PyTree,
    batches: batches_lib.Batch,
    *,
    task: lm_step.Task,
    axis_name: str | None = None,
) -> Float[Array, "L"]:
  """Entropy of the very first sequence, mean over its queries and heads."""
  del axis_name  # It is on the first device, whose result is read.
  first = jax.tree.map(lambda leaf: leaf[0, :1], batches)
  entropy, _, _ = _head_sums(params, first, task) / first.weights.sum()
  return entropy.mean(axis=-1)


def attn_maps(
    params: PyTree,
    batches: batches_lib.Batch,
    *,
    task: lm_step.Task,
    axis_name: str | None = None,
) -> Float[Array, "L N T T"]:
  """Attention weights of the very first sequence, every layer and head."""
  del axis_name  # It is on the first device, whose result is read.
  first = jax.tree.map(lambda leaf: leaf[0, :1], batches)
  return jnp.stack([maps[0] for maps in _attn_weights(params, first, task)])


def _attn_weights(
    params: PyTree, batch: batches_lib.Batch, task: lm_step.Task
) -> list[Float[Array, "B N T T"]]:
  """Attention weights [B, N, T, T] of each layer."""
  seen = _seen(params, batch, task)
  config = task.config.model
  return [
      probes.weights_of(seen, layer, config, batch.inputs.shape)
      for layer in range(config.num_layers)
  ]


def _seen(
    params: PyTree, batch: batches_lib.Batch, task: lm_step.Task
) -> PyTree:
  """What the model's layers, one by one, leave to be looked at."""
  model = task.model.clone(config=scanning.unrolled(task.model.config))
  variables = {"params": scanning.unstack(params)}
  return model.apply(variables, batch.inputs, mutable="intermediates")[1]
