"""Training of JoMA blocks below a linear read-out, and what is seen meanwhile.

The hidden nodes h of a block, or of several, are read out as logits h A, A
[F, K], for K classes (https://arxiv.org/abs/2310.00535, Section 2). Two losses:

  cross_entropy   -ln softmax(h A)[label]
  stationary      (mean_k (h A)_k) - (h A)[label], the cross-entropy made linear
                  at zero logits. If A is frozen, the gradient that reaches h
                  never changes: Assumption 1 of JoMA holds exactly.

Pure functions of one member of an ensemble, as scansnap_jax/ensemble.py lifts
them. A rate of 0 freezes what it belongs to, so that one program serves frozen
and trained attention, embeddings and read-outs.

Besides what is measured, each run integrates the second term of softmax
attention's exact law of Theorem 1 (`invariants`), for each of its blocks:

  correction = eta_z int E[b b^T sum_k gh_k v_k] / T,   gh_k = -dL / d(W^T f)_k.

Letters: B batch, M tokens, Q queries, D width, F hidden nodes, K classes, N
steps, S records.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped
import optax

from joma.block import model
from joma.theory import dynamics
from joma.theory import metrics


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """What all members share; static.

  Attributes:
    blocks: From the bottom; see `model.JomaStack`.
    num_classes: K.
    draw: Draws a batch from a key and the member's source.
    activations: What `Run.activation` chooses from, instead of the blocks' own.
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
  draw: Callable[[Array, Any], Batch]
  activations: tuple[str, ...] = ("relu",)
  optimizer: Literal["sgd", "adam"] = "sgd"
  max_attn_logit: float = float("inf")
  readout_scale: float | None = None
  has_fresh_batches: bool = False


class Run(NamedTuple):
  """What tells members apart.

  Attributes:
    seed: Of data and initial values.
    is_stationary: Train on the stationary loss, not on the cross-entropy.
    activation: Index of phi in `Setting.activations`.
    source: What `Setting.draw` takes.
    lr_w: Learning rate of every W.
    lr_z: Of every Z.
    lr_readout: Of A.
    lr_u: Of every trained embedding.
  """

  seed: Shaped[Any, ""]
  is_stationary: Shaped[Any, ""]
  activation: Shaped[Any, ""]
  source: Any
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

  run: Run
  step: Int[Array, ""]
  params: PyTree
  constants: PyTree
  opt_state: PyTree
  start: tuple[Float[Array, "D F"], ...]
  corrections: tuple[Float[Array, "M"], ...]


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


def init(run: Run, shared: PyTree = (), *, setting: Setting) -> TrainState:
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
  each: list[Any] = [
      params["blocks"][f"blocks_{i}"] for i in range(len(setting.blocks))
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


def draw(run: Run, step: int | Shaped[Any, ""], setting: Setting) -> Batch:
  """Draws the batch of a step: a pure function of (seed, step)."""
  _, _, data_key = _keys(run.seed)
  return setting.draw(jax.random.fold_in(data_key, step), run.source)


def draw_held_out(
    run: Run, setting: Setting, *, index: int | Shaped[Any, ""] = 0
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
  return jax.random.fold_in(jax.random.fold_in(data_key, 2**31 - 1), index)


def _keys(seed):
  return jax.random.split(jax.random.key(seed), 3)


def train(
    state: TrainState,
    shared: PyTree = (),
    *,
    setting: Setting,
    num_steps: int,
    record_every: int,
) -> tuple[TrainState, Float[Array, "N"], Observation]:
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
  held_out = draw_held_out(state.run, setting)
  # The data set is the same at every step: drawn once, outside the loop.
  data = None if setting.has_fresh_batches else held_out

  def advance(state):
    return jax.lax.scan(
        lambda state, _: _step(state, data, setting), state, length=record_every
    )

  def record(state, is_later):
    stay = lambda state: (state, jnp.zeros(record_every))
    state, losses = jax.lax.cond(is_later, advance, stay, state)
    return state, (losses, observe(state, held_out, setting))

  # The start is the first record: all are made by one piece of program.
  is_later = jnp.arange(num_steps // record_every + 1) > 0
  state, (losses, seen) = jax.lax.scan(record, state, is_later)
  return state, losses[1:].ravel(), seen


def _step(state: TrainState, data: Batch | None, setting: Setting):
  run = state.run
  batch = draw(run, state.step, setting) if data is None else data
  (loss, (_, sown)), (grads, pushes) = jax.value_and_grad(
      _loss, (0, 1), has_aux=True
  )(state.params, _no_pushes(batch, setting), state, batch, setting)
  second_terms = [
      run.lr_z * _second_term(weights, -push, v) / block.kind.temperature
      for weights, push, v, block in zip(
          sown, pushes, _all_v(state, setting), setting.blocks, strict=True
      )
  ]
  optimizer = make_optimizer(run, setting)
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
  is_taken = _largest_logit(new, setting) <= setting.max_attn_logit
  keep = lambda old, new: jnp.where(is_taken, new, old)
  old = (state.params, state.opt_state, state.corrections)
  kept = jax.tree.map(keep, old, (new.params, new.opt_state, new.corrections))
  params, opt_state, corrections = kept
  return (
      new._replace(params=params, opt_state=opt_state, corrections=corrections),
      loss,
  )


def _largest_logit(state: TrainState, setting: Setting) -> Float[Array, ""]:
  scaled = [
      jnp.abs(state.params["blocks"][f"blocks_{i}"]["Z"]).max()
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
  back = jnp.sum((weights @ v) * gh, axis=1)
  return weights.T @ back


def _no_pushes(batch: Batch, setting: Setting) -> tuple[Array, ...]:
  shape = lambda block: (len(batch.label), block.hidden_dim)
  return tuple(jnp.zeros(shape(block)) for block in setting.blocks)


def _loss(params, pushes, state, batch, setting):
  """Mean loss, logits and each block's b, with pushes on the preactivations."""
  state = state._replace(params=params)
  logits, sown = forward(state, batch, setting, pushes)
  own = jnp.take_along_axis(logits, batch.label[:, None], axis=1)[:, 0]
  over = jax.nn.logsumexp(logits, axis=1)
  over = jnp.where(state.run.is_stationary, logits.mean(axis=1), over)
  losses = over - own
  weights = [of_block["attn_weights"][0] for of_block in sown]
  return losses.mean(), (logits, weights)


def forward(
    state: TrainState,
    batch: Batch,
    setting: Setting,
    pushes: tuple[Float[Array, "B _"], ...] | None = None,
) -> tuple[Float[Array, "B K"], list[dict[str, Any]]]:
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
    pushes = _no_pushes(batch, setting)
  phis = [dynamics.ACTIVATIONS[name] for name in setting.activations]
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
  each: list[Any] = [sown[f"blocks_{i}"] for i in range(len(blocks))]
  return hidden @ state.params["readout"], each


def _with_phi(
    kind: dynamics.Block,
    phi: dynamics.Activation,
    push: Float[Array, "B F"],
) -> dynamics.Block:
  return dataclasses.replace(kind, activation=lambda pre: phi(pre + push))


def observe(state: TrainState, batch: Batch, setting: Setting) -> Observation:
  """Reads off a run what `Observation` lists."""
  pushes = _no_pushes(batch, setting)
  loss, (logits, weights) = _loss(state.params, pushes, state, batch, setting)
  blocks = []
  for i, (block, embedding) in enumerate(
      zip(setting.blocks, _embeddings(state, setting), strict=True)
  ):
    params = state.params["blocks"][f"blocks_{i}"]
    v = embedding @ params["W"]
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
  is_right = jnp.argmax(logits, axis=1) == batch.label
  return Observation(tuple(blocks), loss, is_right.mean())


def _embeddings(
    state: TrainState, setting: Setting
) -> list[Float[Array, "M D"]]:
  """The embeddings of each block's contextual tokens, as rows."""
  tables = []
  for i, block in enumerate(setting.blocks):
    name = f"blocks_{i}"
    variables = {
        "params": state.params["blocks"][name],
        "constants": state.constants.get(name, {}),
    }
    nothing = jnp.zeros((0, block.num_tokens)), jnp.zeros(0, int)
    _, batch = model.to_dynamics(block, variables, *nothing)
    tables.append(batch.embedding.T)
  return tables


def _all_v(state: TrainState, setting: Setting) -> list[Float[Array, "M F"]]:
  return [
      table @ state.params["blocks"][f"blocks_{i}"]["W"]
      for i, table in enumerate(_embeddings(state, setting))
  ]


def make_optimizer(run: Run, setting: Setting) -> optax.GradientTransformation:
  """One optimizer with a rate for each kind of parameter."""
  make = {"sgd": optax.sgd, "adam": optax.adam}[setting.optimizer]
  rates = {
      "W": run.lr_w,
      "Z": run.lr_z,
      "U": run.lr_u,
      "readout": run.lr_readout,
  }
  return optax.partition(
      {name: make(rate) for name, rate in rates.items()},
      lambda params: jax.tree.map_with_path(
          lambda path, _: path[-1].key, params
      ),
  )
