"""Training predictors on a capture, all layers at once, and calibrating them.

  loss = mean over layers of the two class-weighted binary cross-entropies

Of a layer whose share rho of units counts, one that does weighs 1 / (2 rho),
one that does not 1 / (2 - 2 rho). Rows are split by whole texts: those that a
threshold is calibrated on were never trained on. A batch is a pure function of
(seed, step), so a run that was stopped continues bitwise.

Letters: L layers, D width, U units, R rows.
"""

from collections.abc import Callable, Mapping
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped
import numpy as np
import optax

from joma.inference.sparsity import contextual_config
from joma.inference.sparsity import predictors
from joma.inference.sparsity.study import capture
from scansnap_jax.experiment import checkpoint
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import metric_stream
from scansnap_jax.experiment.processes import preemption

# Rows that shares of units are counted in, and that are calibrated on at once.
_MANY_ROWS = 2048

ByKind = Mapping[str, Any]
# Parameters, and the state of the optimizer.
State = tuple[PyTree, optax.OptState]


class Examples(NamedTuple):
  """Rows: what predictors read, and which units count, by kind."""

  inputs: Mapping[str, Shaped[np.ndarray, "R L D"]]
  is_positive: Mapping[str, Bool[np.ndarray, "R L U"]]


class Data(NamedTuple):
  """A capture as examples.

  Attributes:
    shards: The capture.
    config: Of the predictors.
    train_rows: Rows 0 to this are trained on, those after are held out.
  """

  shards: capture.Shards
  config: contextual_config.PredictorConfig
  train_rows: int

  def examples(self, ids: Int[np.ndarray, "R"]) -> Examples:
    """Rows by number."""
    held = {name: self.shards.rows(name, ids) for name in capture.FIELDS}
    layer_in, num_heads = held["layer_in"], held["heads"].shape[-1]
    num_top = contextual_config.count(self.config.head_fraction, num_heads)
    is_ahead = self.config.lookahead == 1
    # A layer ahead: heads by what the layer before them read, if there is one.
    order = np.maximum(np.arange(layer_in.shape[1]) - is_ahead, 0)
    ranked = np.argsort(-held["heads"], axis=-1, kind="stable")
    heads = np.zeros(ranked.shape, bool)
    np.put_along_axis(heads, ranked[..., :num_top], True, axis=-1)
    return Examples(
        {
            "mlp": layer_in if is_ahead else held["mlp_in"],
            "heads": layer_in[:, order],
        },
        {"mlp": held["units"], "heads": heads},
    )

  def batch(self, step: int) -> Examples:
    """The batch of a step, drawn from the rows to train on."""
    # A pure function of seed and step: a restart needs the step alone.
    rng = np.random.default_rng((self.config.seed, step))
    size = min(self.config.batch_size, self.train_rows)
    return self.examples(rng.integers(self.train_rows, size=size))

  @property
  def held_out(self) -> Int[np.ndarray, "R"]:
    """Numbers of the rows that are not trained on."""
    return np.arange(self.train_rows, self.shards.num_rows)


def split(
    shards: capture.Shards,
    config: contextual_config.PredictorConfig,
    held_out_fraction: float,
) -> Data:
  """Holds out the last texts of a capture.

  Raises:
    UserError: If no text is left on one of the sides.
  """
  num_texts = shards.num_texts
  num_held = contextual_config.count(held_out_fraction, num_texts)
  if not 0 < num_held < num_texts:
    raise errors.UserError(
        f"held_out_fraction={held_out_fraction} of {num_texts} texts leaves"
        " none to train on: capture more texts, or hold out fewer."
    )
  # Whole texts: tokens of one text on both sides would be nearly the same rows.
  seq_len = shards.num_rows // num_texts
  return Data(shards, config, (num_texts - num_held) * seq_len)


def train(
    data: Data,
    folder: pathlib.Path,
    on_progress: Callable[[int], None] = lambda num_steps: None,
) -> dict[str, dict[str, Array]]:
  """Trains from the last checkpoint on; returns the predictors.

  Args:
    data: What to learn.
    folder: Where `metrics.jsonl` and `checkpoints/` go.
    on_progress: Told how many steps have been taken since.

  Raises:
    UserError: If a rank is too large, or the loss is no number.
    Stopped: If asked to stop; the state has been saved.
  """
  config = data.config
  optimizer = _optimizer(config)
  params = _start(data)
  state = (params, optimizer.init(params))
  weights = _class_weights(data)
  update = jax.jit(
      functools.partial(_update, config=config, optimizer=optimizer),
      donate_argnums=0,
  )
  with (
      checkpoint.Checkpointer(folder / "checkpoints") as checkpointer,
      preemption.stop_requests() as stop_requested,
  ):
    restored = checkpointer.restore_latest(state)
    start = 0 if restored is None else restored.step
    state = state if restored is None else restored.tree
    on_progress(start)
    with metric_stream.MetricStream(
        folder / "metrics.jsonl", resume_below=start + 1 if start else None
    ) as stream:
      for step in range(start, config.num_steps):
        state, losses = update(state, data.batch(step), weights)
        on_progress(1)
        end, stop = step + 1, stop_requested()
        if end % config.checkpoint_every == 0 or end == config.num_steps:
          _record(stream, end, losses)
          checkpointer.save(end, state)
        # Between two checkpoints: saved, and no row is written twice.
        elif stop:
          _check_finite(end, losses)
          checkpointer.save(end, state)
        if stop:
          raise preemption.Stopped(f"predictors at step {end}")
  return state[0]


def _record(
    stream: metric_stream.MetricStream, step: int, losses: ByKind
) -> None:
  _check_finite(step, losses)
  values = {f"{kind}_loss": float(loss) for kind, loss in losses.items()}
  stream.write(step, values)


def _check_finite(step: int, losses: ByKind) -> None:
  if not np.isfinite([float(loss) for loss in losses.values()]).all():
    raise errors.UserError(
        f"The predictors diverged before step {step}: use a smaller lr."
    )


def _start(data: Data) -> dict[str, dict[str, Array]]:
  shards, fields = data.shards, data.shards.manifest["fields"]
  num_layers, embed_dim = fields["layer_in"]["shape"]
  num_heads = fields["heads"]["shape"][-1]
  return predictors.init(
      data.config, num_layers, embed_dim, shards.num_units, num_heads
  )


def _optimizer(config: contextual_config.PredictorConfig):
  rate = optax.cosine_decay_schedule(
      config.lr, max(1, config.num_steps), alpha=0.1
  )
  decays = lambda params: jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key != "bias", params
  )
  return optax.adamw(rate, weight_decay=config.weight_decay, mask=decays)


def _class_weights(data: Data) -> ByKind:
  """Of units that do not count and of those that do, by kind and layer."""
  some = np.linspace(0, data.train_rows - 1, _MANY_ROWS).astype(int)
  is_positive = data.examples(np.unique(some)).is_positive
  if not data.config.class_balance:
    return {
        kind: jnp.ones((2, found.shape[1]))
        for kind, found in is_positive.items()
    }
  weights = {}
  for kind, found in is_positive.items():
    # Both classes weigh a half together, however rare one is; bounded, for a
    # class that some rows never show.
    share = np.clip(found.mean(axis=(0, 2)), 1e-4, 1 - 1e-4)
    weights[kind] = jnp.asarray(np.stack([0.5 / (1 - share), 0.5 / share]))
  return weights


def _update(
    state: State,
    batch: Examples,
    weights: ByKind,
    *,
    config: contextual_config.PredictorConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[State, ByKind]:
  """One step of AdamW; returns the new state and the losses before it."""
  params, opt_state = state

  def total(params: ByKind) -> tuple[Float[Array, ""], ByKind]:
    losses = {
        kind: loss(
            params[kind],
            jnp.asarray(batch.inputs[kind]),
            jnp.asarray(batch.is_positive[kind]),
            weights[kind],
            config.nonlinearity,
        )
        for kind in predictors.KINDS
    }
    return sum(losses.values(), jnp.zeros(())), losses

  grads, losses = jax.grad(total, has_aux=True)(params)
  updates, opt_state = optimizer.update(grads, opt_state, params)
  return (optax.apply_updates(params, updates), opt_state), losses


def loss(
    predictor: Mapping[str, Array],
    inputs: Shaped[Array, "R L D"],
    is_positive: Bool[Array, "R L U"],
    weights: Float[Array, "2 L"],
    nonlinearity: str = "none",
) -> Float[Array, ""]:
  """Mean weighted cross-entropy over layers, rows and units, in nats.

  Args:
    predictor: Of all layers, leaves [L, ...].
    inputs: What it reads.
    is_positive: Which units count.
    weights: Of each layer's units that do not and that do.
    nonlinearity: f.
  """
  found = all_scores(predictor, inputs, nonlinearity)
  weight = jnp.where(
      is_positive, weights[1][None, :, None], weights[0][None, :, None]
  )
  sign = jnp.where(is_positive, -1.0, 1.0)
  return (weight * jax.nn.softplus(sign * found)).mean()


def all_scores(
    predictor: Mapping[str, Array],
    inputs: Shaped[Array, "R L D"],
    nonlinearity: Any = "none",
) -> Float[Array, "R L U"]:
  """Scores of every layer's units: `predictors.scores`, over layers."""
  one = functools.partial(predictors.scores, nonlinearity=nonlinearity)
  return jax.vmap(one, in_axes=(0, 1), out_axes=1)(predictor, inputs)


def calibrate(params: ByKind, data: Data, recall: float) -> dict[str, Array]:
  """Thresholds [L] of each kind with which held-out units that count are found.

  Of n scores of such units in ascending order the one at floor((n + 1)(1 -
  recall)) is just above the threshold: an exchangeable new one is as high with
  probability of at least `recall` (split conformal prediction,
  https://arxiv.org/abs/2107.07511). Below 1 of n + 1 it is -inf.

  Args:
    params: Predictors of all layers.
    data: Rows that were not trained on.
    recall: Share of the units that count which is to be found, in (0, 1].

  Raises:
    UserError: If recall is out of range.
  """
  contextual_config.require_share("recall", recall)
  compiled = jax.jit(
      functools.partial(all_scores, nonlinearity=data.config.nonlinearity)
  )
  found = {kind: [] for kind in predictors.KINDS}
  num_parts = -(-len(data.held_out) // _MANY_ROWS)
  for ids in np.array_split(data.held_out, num_parts):
    examples = data.examples(ids)
    for kind in predictors.KINDS:
      values = compiled(params[kind], examples.inputs[kind])
      found[kind].append((np.asarray(values), examples.is_positive[kind]))
  return {
      kind: jnp.asarray(_thresholds(parts, recall))
      for kind, parts in found.items()
  }


def _thresholds(
    parts: list[tuple[np.ndarray, np.ndarray]], recall: float
) -> Float[np.ndarray, "L"]:
  num_layers = parts[0][0].shape[1]
  return np.array(
      [
          threshold(
              np.concatenate([s[:, i][p[:, i]] for s, p in parts]), recall
          )
          for i in range(num_layers)
      ],
      np.float32,
  )


def threshold(scores: Float[np.ndarray, "n"], recall: float) -> float:
  """What `recall` of exchangeable new scores exceed, see `calibrate`."""
  rank = int(np.floor((len(scores) + 1) * (1 - recall) + 1e-9))
  if rank < 1:
    return -np.inf
  found = np.partition(scores, rank - 1)[rank - 1]
  return float(np.nextafter(found, np.float32(-np.inf), dtype=np.float32))
