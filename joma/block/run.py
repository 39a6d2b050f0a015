"""One run of JoMA blocks below a linear read-out: settings, start, data.

The hidden nodes h of a block, or of several, are read out as logits h A, A
[F, K], for K classes (https://arxiv.org/abs/2310.00535, Section 2). `loss`
holds them against labels, `train` takes steps, `observe` reads a run.

Pure functions of one member of an ensemble, as scansnap_jax/ensemble.py lifts
them. A rate of 0 freezes what it belongs to, so that one program serves frozen
and trained attention, embeddings and read-outs. Letters as in `joma.block`.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped
import optax

from joma.block import model


class Batch(NamedTuple):
  """Samples of a classification task.

  Attributes:
    counts: Of each contextual token.
    query: Each in [0, Q).
    label: Each in [0, K).
  """

  counts: Float[Any, "B M"]
  query: Int[Any, "B"]
  label: Int[Any, "B"]


# Of a key and of what the member draws from.
DrawBatch = Callable[[Array, PyTree], Batch]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSetting:
  """What all members share; static.

  Attributes:
    blocks: From the bottom; see `model.JomaStack`.
    num_classes: K.
    draw: Draws a batch from a key and the member's source.
    activations: What `BlockRun.activation` chooses from, instead of the
      blocks' own.
    optimizer: Theorem 1 holds for `sgd` alone.
    max_attn_logit: No step is taken to an attention logit |z / T| beyond this,
      nor to one that is not a number: exp attention bursts in finite time.
    readout_scale: Standard deviation of A's initial values times sqrt(F); None
      is the identity, for which F = K.
    has_fresh_batches: Draw a batch for each step; else the first one, drawn
      from the member's seed, is the whole data set.
  """

  blocks: tuple[model.JomaBlock, ...]
  num_classes: int
  draw: DrawBatch
  activations: tuple[str, ...] = ("relu",)
  optimizer: Literal["sgd", "adam"] = "sgd"
  max_attn_logit: float = float("inf")
  readout_scale: float | None = None
  has_fresh_batches: bool = False


class BlockRun(NamedTuple):
  """What tells members apart.

  Attributes:
    seed: Of data and initial values.
    is_stationary: Train on the stationary loss, not on the cross-entropy.
    activation: Index of phi in `BlockSetting.activations`.
    source: What `BlockSetting.draw` takes.
    lr_w: Learning rate of every W.
    lr_z: Of every Z.
    lr_readout: Of A.
    lr_u: Of every trained embedding.
  """

  seed: Shaped[Any, ""]
  is_stationary: Shaped[Any, ""]
  activation: Shaped[Any, ""]
  source: PyTree
  lr_w: Shaped[Any, ""]
  lr_z: Shaped[Any, ""]
  lr_readout: Shaped[Any, ""]
  lr_u: Shaped[Any, ""]


class TrainState(NamedTuple):
  """What a run carries from step to step.

  Attributes:
    run: The member.
    step: Steps taken.
    params: "blocks", those of `model.JomaStack`, and "readout", A.
    constants: Fixed random embeddings.
    opt_state: Of the optimizer.
    start: W of each block before the first step.
    corrections: For each block [M]; see the module.
  """

  run: BlockRun
  step: Int[Array, ""]
  params: PyTree
  constants: PyTree
  opt_state: PyTree
  start: tuple[Float[Array, "D F"], ...]
  corrections: tuple[Float[Array, "M"], ...]


def init(
    run: BlockRun, shared: PyTree = (), *, setting: BlockSetting
) -> TrainState:
  """Initial parameters and optimizer state of a run, from its seed."""
  del shared
  block_key, readout_key, _ = _keys(run.seed)
  batch = draw(run, 0, setting)
  variables = model.JomaStack(setting.blocks).init(
      block_key, batch.counts[:1], batch.query[:1]
  )
  shape = (setting.blocks[-1].hidden_dim, setting.num_classes)
  if setting.readout_scale is None:
    readout = jnp.eye(*shape)
  else:
    scale = setting.readout_scale * shape[0] ** -0.5
    readout = scale * jax.random.normal(readout_key, shape)
  params = {"blocks": variables["params"], "readout": readout}
  each: list[Mapping[str, Array]] = [
      params["blocks"][model.block_name(i)] for i in range(len(setting.blocks))
  ]
  return TrainState(
      run,
      jnp.zeros((), jnp.int32),
      params,
      variables.get("constants", {}),
      make_optimizer(run, setting).init(params),
      tuple(block["W"] for block in each),
      tuple(jnp.zeros_like(block["Z"][0]) for block in each),
  )


def draw(
    run: BlockRun, step: int | Shaped[Any, ""], setting: BlockSetting
) -> Batch:
  """Draws the batch of a step: a pure function of (seed, step)."""
  _, _, data_key = _keys(run.seed)
  return setting.draw(jax.random.fold_in(data_key, step), run.source)


def draw_held_out(
    run: BlockRun, setting: BlockSetting, *, index: int | Shaped[Any, ""] = 0
) -> Batch:
  """Draws a batch that no step draws; data sets have none beside themselves."""
  if not setting.has_fresh_batches:
    return draw(run, 0, setting)
  return setting.draw(held_out_key(run.seed, index), run.source)


def held_out_key(
    seed: int | Shaped[Any, ""], index: int | Shaped[Any, ""]
) -> Key[Array, ""]:
  """A key that no step of the run uses."""
  *_, data_key = _keys(seed)
  # No run takes that many steps.
  return jax.random.fold_in(jax.random.fold_in(data_key, 2**31 - 1), index)


def _keys(seed: int | Shaped[Any, ""]) -> Key[Array, "3"]:
  """Keys of the blocks, of the read-out and of the data."""
  return jax.random.split(jax.random.key(seed), 3)


def embeddings(
    state: TrainState, setting: BlockSetting
) -> list[Float[Array, "M D"]]:
  """The embeddings of each block's contextual tokens, as rows."""
  tables = []
  for i, block in enumerate(setting.blocks):
    name = model.block_name(i)
    variables = {
        "params": state.params["blocks"][name],
        "constants": state.constants.get(name, {}),
    }
    # The embeddings do not depend on samples: none are written out.
    nothing = jnp.zeros((0, block.num_tokens)), jnp.zeros(0, int)
    _, batch = model.to_dynamics(block, variables, *nothing)
    tables.append(batch.embedding.T)
  return tables


def all_v(
    state: TrainState, setting: BlockSetting
) -> list[Float[Array, "M F"]]:
  """Computes v = U_C^T W of each block."""
  return [
      table @ state.params["blocks"][model.block_name(i)]["W"]
      for i, table in enumerate(embeddings(state, setting))
  ]


def make_optimizer(
    run: BlockRun, setting: BlockSetting
) -> optax.GradientTransformation:
  """One optimizer with a rate for each kind of parameter."""
  make = {"sgd": optax.sgd, "adam": optax.adam}[setting.optimizer]
  rates = {
      "W": run.lr_w,
      "Z": run.lr_z,
      "U": run.lr_u,
      "readout": run.lr_readout,
  }
  # A parameter's kind is the last part of its path, whichever its block.
  return optax.partition(
      {name: make(rate) for name, rate in rates.items()},
      lambda params: jax.tree.map_with_path(
          lambda path, _: path[-1].key, params
      ),
  )
