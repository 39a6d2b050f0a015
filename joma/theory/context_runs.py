"""Training on one fixed context a class, and Theorem 1 held against it.

20 classes, each one fixed context over 20 tokens, one query, width 30, phi =
identity with the hidden nodes as outputs: logits f^T W, cross-entropy over the
classes (Figures 2 and 3 of JoMA, https://arxiv.org/abs/2310.00535). W and z
start at N(0, 1) / 100.

The hidden nodes are one a class, K. Letters as in `joma.theory`.
"""

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from joma.theory import data
from joma.theory import dynamics
from joma.theory import flow
from joma.theory import invariants
from joma.theory import metrics
from scansnap_jax.dynamics import Scalar

Mode = Literal["gaussian", "random"]


MODES: tuple[Mode, ...] = get_args(Mode)


_WIDTH = 30


class ContextRun(NamedTuple):
  """A run at its recorded steps.

  Attributes:
    correlation: Normalized correlation of z with z(0) plus the full predictor
      [S], Figure 2; close to 1 at first, as z(0) is on both sides.
    first_term: The same with sum_k v_k^2 / (2 T) alone.
    second_term: The same with -x-bar |W|_F^2 / (2 T) alone.
    printed: Theorem 1 as printed, for changes, b-bar taken at the start.
    exact: Theorem 1 with the exact second term.
    drift: |b-bar(t) - b-bar(0)| / |b-bar(0)| [S].
    v: U_C^T W [S, M, K]; Figure 3 shows v[:, :4, 0].
    loss: Cross-entropy in nats [S].
  """

  correlation: Float[Array, "S"]
  first_term: Float[Array, "S"]
  second_term: Float[Array, "S"]
  printed: invariants.InvariantCheck
  exact: invariants.InvariantCheck
  drift: Float[Array, "S"]
  v: Float[Array, "S M K"]
  loss: Float[Array, "S"]


class Start(NamedTuple):
  """What a run begins with.

  Attributes:
    contexts: x of each class [K, M], rows that sum to 1.
    lower: W [D, K].
    attn_logits: z [M].
  """

  contexts: Float[Array, "K M"]
  lower: Float[Array, "D K"]
  attn_logits: Float[Array, "M"]


def draw_start(key: Key[Array, ""], mode: Mode) -> Start:
  """Draws contexts (`data.class_contexts`) and initial values."""
  context_key, w_key, z_key = jax.random.split(key, 3)
  contexts = data.class_contexts(context_key, mode)
  num_classes, num_tokens = contexts.shape
  return Start(
      contexts,
      jax.random.normal(w_key, (_WIDTH, num_classes)) / 100,
      jax.random.normal(z_key, (num_tokens,)) / 100,
  )


def run(
    start: Start,
    *,
    attention: dynamics.Attention = "softmax",
    temperature: float = 0.5,
    step_size: Scalar = 0.1,
    num_records: int = 2000,
    steps_per_record: int | Int[Array, ""] = 1,
) -> ContextRun:
  """Trains once and holds Theorem 1 against it.

  Args:
    start: Contexts and initial values.
    attention: Softmax in the paper. With exp attention `printed` and `exact`
      both are its own law; attention bursts near step 850, in finite time for
      the flow, where steps of 0.1 are too long for any law.
    temperature: T.
    step_size: Learning rate of W and z.
    num_records: How many times to record after the start.
    steps_per_record: Steps from one record to the next.

  Returns:
    Measurements at steps 0, steps_per_record, ...
  """
  num_classes, num_tokens = start.contexts.shape
  # Unit vectors embed tokens and query: any orthonormal columns give the same v
  # and z.
  unit = jnp.eye(len(start.lower), dtype=start.lower.dtype)
  batch = dynamics.Batch(
      start.contexts,
      jnp.zeros(num_classes, int),
      unit[:, :num_tokens],
      unit[:, num_tokens : num_tokens + 1],
  )
  block = dynamics.Block(attention=attention, temperature=temperature)
  path = flow.descend(
      dynamics.Params(start.lower, start.attn_logits[None]),
      *(batch, block, cross_entropy),
      eta_w=step_size,
      eta_z=step_size,
      num_records=num_records,
      steps_per_record=steps_per_record,
  )
  hidden = lambda params: dynamics.hidden(params, batch, block)
  loss = jax.vmap(lambda params: cross_entropy(hidden(params), ()))
  context = start.contexts.mean(axis=0)
  return _observe(path, context, block, loss(path.params))


def cross_entropy(
    hidden: Float[Array, "K K"], upper: tuple[()]
) -> Float[Array, ""]:
  """Computes the mean of -ln softmax(h_n)[n], sample n being of class n."""
  del upper
  return -jnp.diagonal(jax.nn.log_softmax(hidden, axis=-1)).mean()


def _observe(
    path: flow.Trajectory,
    context: Float[Array, "M"],
    block: dynamics.Block,
    loss: Float[Array, "S"],
) -> ContextRun:
  attn_logits = path.params.attn_logits[:, 0]
  squares = jnp.sum(path.v**2, axis=-1) / (2 * block.temperature)
  # The whole of W, although the theorem has v alone: so does the paper's code.
  norms = jnp.sum(path.params.lower**2, axis=(1, 2)) / (2 * block.temperature)
  shared = -jnp.outer(norms, context)
  full = squares + shared
  # The law is one of changes: its constant is fixed at the start.
  offset = attn_logits[:1] - full[:1]
  correlate = jax.vmap(metrics.normalized_correlation)

  def check(**second_term: Array) -> invariants.InvariantCheck:
    return invariants.check_invariant(
        *(path.params.attn_logits, path.v),
        attention=block.attention,
        temperature=block.temperature,
        **(second_term if block.attention == "softmax" else {}),
    )

  change = jnp.linalg.norm(path.attended - path.attended[:1], axis=-1)
  return ContextRun(
      correlate(attn_logits, full + offset),
      correlate(attn_logits, squares),
      correlate(attn_logits, shared),
      check(attended=path.attended[0]),
      check(correction=path.correction),
      change / jnp.linalg.norm(path.attended[0]),
      path.v,
      loss,
  )


@functools.partial(jax.jit, static_argnames=("temperature", "num_records"))
def train(
    starts: Start,
    *,
    temperature: float,
    step_size: Scalar,
    num_records: int,
    steps_per_record: int | Int[Array, ""],
) -> ContextRun:
  """Trains from many starts at once; leaves have a leading axis R.

  Args:
    starts: Contexts and initial values, with a leading axis R.
    temperature: T.
    step_size: As for `run`.
    num_records: As for `run`.
    steps_per_record: As for `run`.

  Returns:
    The runs, in the order of the starts.
  """
  options = dict(temperature=temperature, num_records=num_records)
  # One program for all starts: vmap keeps each run's arithmetic apart.
  train_one = lambda start: run(
      start, step_size=step_size, steps_per_record=steps_per_record, **options
  )
  return jax.vmap(train_one)(starts)
