"""Figure 2 of JoMA: does attention follow the MLP as Theorem 1 says?

Normalized correlation of z(t) with what Theorem 1 makes of the lower MLP layer,
sum_k (v_k^2 - |w_k|^2 x-bar) / (2 T), and with either of its two terms alone
(https://arxiv.org/abs/2310.00535). Beside it stand slope and relative error, to
which correlation is blind, and the exact law.

20 classes, each one fixed context over 20 tokens, one query, width 30, softmax
attention at T = 1/2, phi = identity with the hidden nodes as outputs: logits
f^T W, cross-entropy over the classes. W and z start at N(0, 1) / 100 and train
by 2000 full-batch steps at rate 0.1. Two modes of contexts
(`data.class_contexts`): a bump that moves with the class, and random.

Letters: R runs, S times, M tokens, K classes and hidden nodes.
"""

from collections.abc import Callable
import functools
import itertools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np

from joma import config as config_lib
from joma.theory import data
from joma.theory import dynamics
from joma.theory import flow
from joma.theory import invariants
from joma.theory import metrics
from scansnap_jax.dynamics import Scalar

Mode = Literal["gaussian", "random"]
MODES: tuple[Mode, ...] = get_args(Mode)

_WIDTH = 30
_CURVES = (
    "correlation",
    "first_term",
    "second_term",
    "slope",
    "relative_error",
    "exact_relative_error",
    "drift",
    "loss",
)


class Figure2Run(NamedTuple):
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


def draw(key: Key[Array, ""], mode: Mode) -> Start:
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
) -> Figure2Run:
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
) -> Figure2Run:
  attn_logits = path.params.attn_logits[:, 0]
  squares = jnp.sum(path.v**2, axis=-1) / (2 * block.temperature)
  # The whole of W, although the theorem has v alone: so does the paper's code.
  norms = jnp.sum(path.params.lower**2, axis=(1, 2)) / (2 * block.temperature)
  shared = -jnp.outer(norms, context)
  full = squares + shared
  offset = attn_logits[:1] - full[:1]
  correlate = jax.vmap(metrics.normalized_correlation)

  def check(**second_term):
    return invariants.check_invariant(
        *(path.params.attn_logits, path.v),
        attention=block.attention,
        temperature=block.temperature,
        **(second_term if block.attention == "softmax" else {}),
    )

  change = jnp.linalg.norm(path.attended - path.attended[:1], axis=-1)
  return Figure2Run(
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
) -> Figure2Run:
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
  train_one = lambda start: run(
      start, step_size=step_size, steps_per_record=steps_per_record, **options
  )
  return jax.vmap(train_one)(starts)


def run_all(config: config_lib.Figure2Config) -> dict[str, Figure2Run]:
  """Trains every seed in both modes; leaves have a leading axis R."""
  seeds = config.first_seed + np.arange(config.num_seeds)
  keys = jax.vmap(jax.random.key)(seeds)
  starts = [
      jax.vmap(functools.partial(draw, mode=mode))(keys) for mode in MODES
  ]
  runs = train(
      jax.tree.map(lambda *parts: jnp.concatenate(parts), *starts),
      temperature=config.temperature,
      step_size=config.step_size,
      num_records=config.num_steps // config.record_every,
      steps_per_record=config.record_every,
  )
  halves = jax.tree.map(lambda x: np.split(x, 2), jax.device_get(runs))
  is_half = lambda x: isinstance(x, list)
  return {
      mode: jax.tree.map(lambda x, i=i: x[i], halves, is_leaf=is_half)
      for i, mode in enumerate(MODES)
  }


def steps(config: config_lib.Figure2Config) -> np.ndarray:
  """The steps at which runs are measured, 0 and the last included."""
  return np.arange(0, config.num_steps + 1, config.record_every)


def measure(
    config: config_lib.Figure2Config,
    *,
    on_metrics: Callable[[int, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
  """Trains all runs and holds Theorem 1 against them.

  Args:
    config: The settings.
    on_metrics: Called with the step and a row of means over seeds.

  Returns:
    `steps`; for each mode and curve (`Figure2Run`, slope and relative_error
    being those of the printed law) the mean, smallest and largest over seeds
    [S] and, under `final`, the last value of each run [R]; and the finding.
  """
  summary: dict[str, Any] = {
      "num_seeds": config.num_seeds,
      "steps": steps(config),
      **{mode: _summarize(runs) for mode, runs in run_all(config).items()},
  }
  if on_metrics is not None:
    for i, step in enumerate(summary["steps"].tolist()):
      names = itertools.product(MODES, _CURVES)
      row = {f"{m}_{name}": summary[m][name]["mean"][i] for m, name in names}
      on_metrics(step, row)
  return {**summary, "finding": _finding(summary)}


def _summarize(runs: Figure2Run) -> dict[str, Any]:
  curves = {
      "correlation": runs.correlation,
      "first_term": runs.first_term,
      "second_term": runs.second_term,
      "slope": runs.printed.slope,
      "relative_error": runs.printed.relative_error,
      "exact_relative_error": runs.exact.relative_error,
      "drift": runs.drift,
      "loss": runs.loss,
  }
  bands = {
      name: {
          "mean": np.mean(curve, axis=0),
          "min": np.min(curve, axis=0),
          "max": np.max(curve, axis=0),
      }
      for name, curve in curves.items()
  }
  final = {name: curve[:, -1] for name, curve in curves.items()}
  return {**bands, "final": final}


def _finding(summary: dict[str, Any]) -> str:
  final = [summary[mode]["final"] for mode in MODES]
  least = min(float(of_mode["correlation"].min()) for of_mode in final)
  error = [float(of_mode["relative_error"].mean()) for of_mode in final]
  slope = [float(of_mode["slope"].mean()) for of_mode in final]
  exact = max(float(of_mode["exact_relative_error"].max()) for of_mode in final)
  direction = "keeps" if least > 0.8 else "loses"
  scale = "keeps" if max(error) < 0.1 else "loses"
  law = "holds" if exact < 0.05 else "fails"
  return (
      f"At step {summary['steps'][-1]} the printed law {direction} the"
      f" direction (normalized correlation at least {least:.3f} over"
      f" {summary['num_seeds']} seeds and both modes) and {scale} the scale:"
      f" slope {slope[0]:.2f} and {slope[1]:.2f}, relative error {error[0]:.1f}"
      f" and {error[1]:.1f} (gaussian, random; mean); the exact law {law}, with"
      f" relative error up to {exact:.4f}."
  )
