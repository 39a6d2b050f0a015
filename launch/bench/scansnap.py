"""Measures what the one-layer experiments cost, each in a fresh process.

  python -m launch.bench.scansnap --output=bench.json

prints tables and writes the same numbers as JSON. --what lists some of

  sweep   Figure 6's sweep, compilation included: where its time goes, and the
          least that its matrix products could take on this machine.
  torch   The same training in PyTorch, one run and one sequence at a time, over
          one-hot tokens: some steps of each data setting, extrapolated.
  length  Time of a step against the sequence length T; it should not grow.
  memory  10,000 tokens and 1,000 next tokens: time of a step, peak memory.

Other programs on the machine falsify the times. Memory is in 1e9 bytes.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import importlib
import json
import pathlib
import random
import tempfile
import time
from typing import Any, Literal
from unittest import mock

from absl import flags
import jax
from jaxtyping import Array, Float
import numpy as np

from launch.bench import harness
from launch.bench import torch_peer
from launch.command import flag_config
from scansnap_jax import config as config_lib
from scansnap_jax import data
from scansnap_jax import ensemble
from scansnap_jax import run as run_lib
from scansnap_jax import train
from scansnap_jax.experiment import checkpoint
from scansnap_jax.experiment.processes import devices

_COMPILATION = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "trace",
    "/jax/core/compile/backend_compile_duration": "compile",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """What to measure, and its sizes; smaller ones are for tests.

  Attributes:
    what: The measurements.
    torch: Whether `torch` is among them.
    num_seeds: Seeds of `sweep`, which has 64 runs a seed.
    num_steps: Steps of each run of `sweep`.
    torch_steps: Steps that `torch` times in each data setting.
    seq_lens: Sequence lengths T of `length`.
    length_steps: Steps of `length`.
    memory_num_last: Query tokens of `memory`; M is 20 times as many.
    memory_steps: Steps of `memory`.
  """

  what: tuple[Literal["all", "sweep", "torch", "length", "memory"], ...] = (
      "all",
  )
  torch: bool = True
  num_seeds: int = 10
  num_steps: int = 100
  torch_steps: int = 20
  seq_lens: tuple[int, ...] = (16, 128, 1024, 16384, 262144)
  length_steps: int = 500
  memory_num_last: int = 500
  memory_steps: int = 5


def measure(config: BenchConfig) -> harness.Row:
  """Makes and prints the measurements, each in a process of its own.

  Raises:
    UserError: If PyTorch is to be measured and is not installed.
  """
  chosen = [name for name in _MEASUREMENTS if {name, "all"} & set(config.what)]
  if not config.torch:
    chosen = [name for name in chosen if name != "torch"]
  harness.require(["torch"] if "torch" in chosen else (), "--notorch")
  # Names no device: a child's memory starts from what this process holds.
  results: harness.Row = {"machine": harness.machine_facts()}
  harness.tell("machine", results["machine"])
  for name in chosen:
    results[name] = _run_child(name, config)
    if name == "torch" and "sweep" in results:
      ours_s = results["sweep"]["total_s"]
      results[name]["ratio"] = results[name]["sweep_s"] / ours_s
    harness.tell(name, results[name])
  return results


def _run_child(name: str, config: BenchConfig) -> harness.Row:
  """Makes one measurement, and times the whole process, imports included."""
  arguments = flag_config.to_flagfile(config, {"child": name}).splitlines()
  started = time.monotonic()
  row = harness.run_child("launch.bench.scansnap", arguments)
  return row | {"process_s": time.monotonic() - started}


class Stopwatch:
  """Seconds spent in the pieces of the training loop, and memory held by then.

  Attributes:
    seconds: By piece. Tracing and compiling are pieces of their own.
    peak_rss_gb: Peak of the process up to the last end of each piece.
  """

  def __init__(self):
    self.seconds = dict.fromkeys(("trace", "compile"), 0.0)
    self.peak_rss_gb: dict[str, float] = {}

  def timed(self, piece: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn`, waiting for its result and adding its time to a piece."""

    def call(*args: object, **kwargs: object) -> object:
      compiling_s = self.seconds["trace"] + self.seconds["compile"]
      started = time.monotonic()
      result = jax.block_until_ready(fn(*args, **kwargs))
      spent_s = time.monotonic() - started + compiling_s
      spent_s -= self.seconds["trace"] + self.seconds["compile"]
      leaves = jax.tree.leaves(result)
      # JAX reports the time of a call that is traced.
      if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        self.seconds[piece] = self.seconds.get(piece, 0.0) + spent_s
        self.peak_rss_gb[piece] = harness.peak_rss_gb()
      return result

    return call

  def hear(self, event: str, duration_secs: float, **_: object) -> None:
    """Adds what JAX reports of a compilation."""
    if event in _COMPILATION:
      self.seconds[_COMPILATION[event]] += duration_secs


def train_watched(config: config_lib.ScanSnapConfig) -> tuple[float, Stopwatch]:
  """Trains in a temporary folder; returns the seconds and where they went."""
  watch = Stopwatch()
  jax.monitoring.register_event_duration_secs_listener(watch.hear)
  with tempfile.TemporaryDirectory() as folder, _instruments(watch):
    started = time.monotonic()
    train.train_and_evaluate(config, pathlib.Path(folder))
    total_s = time.monotonic() - started
  jax.monitoring.unregister_event_duration_listener(watch.hear)
  watch.seconds["rest"] = total_s - sum(watch.seconds.values())
  return total_s, watch


@contextlib.contextmanager
def _instruments(watch: Stopwatch) -> Iterator[None]:
  """Times the pieces of the training loop, which carries no instruments."""
  lift = ensemble.Ensemble.map

  def lift_timed(
      self: ensemble.Ensemble, fn: Callable[..., Any], **kwargs: Any
  ) -> Callable[..., Any]:
    lifted = lift(self, fn, **kwargs)
    # Drawing is timed as a whole, with the way from and to the host.
    return lifted if fn is run_lib.draw else watch.timed(fn.__name__, lifted)

  saver = checkpoint.Checkpointer
  with contextlib.ExitStack() as stack:
    patch = lambda *args: stack.enter_context(mock.patch.object(*args))
    for name in ("__init__", "restore_latest", "save", "close"):
      patch(saver, name, watch.timed("checkpoint", getattr(saver, name)))
    patch(train, "draw_batches", watch.timed("draw", train.draw_batches))
    patch(ensemble.Ensemble, "map", lift_timed)
    yield


def measure_sweep(config: BenchConfig) -> harness.Row:
  """Trains Figure 6's sweep on all cores."""
  sweep = _sweep(config)
  total_s, watch = train_watched(sweep)
  peak_gb = harness.peak_rss_gb()
  flops, rate = matmul_flops(sweep), _matmul_flops_per_s(sweep)
  return {
      "devices": devices.describe(),
      "num_runs": sweep.num_runs,
      "num_steps": sweep.num_steps,
      "total_s": total_s,
      "seconds": watch.seconds,
      "peak_rss_gb": peak_gb,
      "matmul_flops": flops,
      "matmul_flops_per_s": rate,
      "arithmetic_limit_s": flops / rate,
      "times_the_limit": total_s / (flops / rate),
  }


def _sweep(config: BenchConfig) -> config_lib.ScanSnapConfig:
  return dataclasses.replace(
      config_lib.figure6(),
      num_seeds=config.num_seeds,
      num_steps=config.num_steps,
  )


def matmul_flops(config: config_lib.ScanSnapConfig) -> int:
  """Operations of a sweep's matrix products: Y^T f and its two gradients.

  Each multiplies [B, M] by [M, M] or [M, B] by [B, M], which is 2 B M^2.
  """
  sizes = [
      data.make_classes(config.data, n).num_tokens for n in config.num_last
  ]
  per_step = sum(3 * 2 * config.batch_size * size**2 for size in sizes)
  return config.num_runs // len(sizes) * config.num_steps * per_step


def _matmul_flops_per_s(config: config_lib.ScanSnapConfig) -> float:
  """Best rate in five of [B, M] @ [M, M], one chain of products a device."""
  size = data.make_classes(config.data, max(config.num_last)).num_tokens
  layout = ensemble.make_ensemble(jax.device_count())
  multiply = layout.map(_multiply_often, num_products=500)
  normal = np.random.default_rng(0).normal
  shape = (layout.num_members, config.batch_size, size)
  left = layout.scatter(normal(size=shape).astype(np.float32))
  # Of this scale it keeps the norm of what it multiplies.
  right = normal(scale=size**-0.5, size=(size, size)).astype(np.float32)
  run = lambda: jax.block_until_ready(multiply(left, right))
  seconds = float(harness.seconds_of(run, 6)[1:].min())
  return 500 * shape[0] * 2 * config.batch_size * size**2 / seconds


def _multiply_often(
    left: Float[Array, "B M"], right: Float[Array, "M M"], *, num_products: int
) -> Float[Array, "B M"]:
  return jax.lax.fori_loop(0, num_products, lambda _, x: x @ right, left)


def measure_torch(config: BenchConfig) -> harness.Row:
  """Times PyTorch with one and two threads; the faster of them counts."""
  sweep, rows, steps_s = _sweep(config), [], 0.0
  for num_last in sweep.num_last:
    classes = data.make_classes(sweep.data, num_last)
    one, two = (
        time_torch(sweep, classes, config.torch_steps, n) for n in (1, 2)
    )
    rows.append({"M": classes.num_tokens, "one_thread_s": one, "two_s": two})
    steps_s += min(one, two)
  num_steps = sweep.num_runs // len(sweep.num_last) * sweep.num_steps
  return {"steps": rows, "sweep_s": steps_s * num_steps}


def time_torch(
    config: config_lib.ScanSnapConfig,
    classes: data.SequenceClasses,
    num_steps: int,
    num_threads: int,
) -> float:
  """Median seconds of a step of one run, from drawing to updating."""
  torch = torch_peer.load(num_threads)
  bound = classes.num_tokens**-0.5
  shape = (classes.num_tokens, classes.num_tokens)
  draw = lambda: torch.empty(shape).uniform_(-bound, bound).requires_grad_()
  params = {"Y": draw(), "Z": draw()}
  optimizers = [
      torch.optim.SGD([param], lr=1.0, momentum=config.optimizer.momentum)
      for param in params.values()
  ]

  def step() -> None:
    loss = torch_loss(params, *torch_batch(config, classes))
    for optimizer in optimizers:
      optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
      optimizer.step()

  return float(np.median(harness.seconds_of(step, num_steps + 3)[3:]))


def torch_batch(
    config: config_lib.ScanSnapConfig, classes: data.SequenceClasses
) -> tuple[torch_peer.Tensor, torch_peer.Tensor, torch_peer.Tensor]:
  """Draws sequence by sequence: one-hot X [B, T-1, M], queries and labels."""
  torch = importlib.import_module("torch")
  seq_len = config.data.seq_len or 128
  probs = torch.from_numpy(classes.probs)
  drawn = random.choices(range(classes.num_classes), k=config.batch_size)
  tokens = torch.stack([
      torch.multinomial(probs[n], seq_len - 1, replacement=True) for n in drawn
  ])
  context = torch.nn.functional.one_hot(tokens, classes.num_tokens).float()
  query, label = torch.from_numpy(np.stack([classes.query, classes.label]))
  return context, query[drawn], label[drawn]


def torch_loss(
    params: dict[str, torch_peer.Tensor],
    context: torch_peer.Tensor,
    query: torch_peer.Tensor,
    label: torch_peer.Tensor,
) -> torch_peer.Tensor:
  """Cross-entropy of Y^T f with f = LN(X^T b) and b = softmax(X z_m)."""
  torch = importlib.import_module("torch")
  attn_logits = torch.einsum("btm,bm->bt", context, params["Z"][query])
  attn_weights = torch.softmax(attn_logits, dim=1)
  attended = torch.einsum("btm,bt->bm", context, attn_weights)
  features = attended / attended.norm(dim=1, keepdim=True)
  return torch.nn.functional.cross_entropy(features @ params["Y"], label)


def measure_length(config: BenchConfig) -> harness.Row:
  """Times one run of Syn-Small at several sequence lengths."""
  rows = []
  for seq_len in config.seq_lens:
    small = config_lib.ScanSnapConfig(
        data=config_lib.DataConfig(seq_len=seq_len),
        num_seeds=1,
        num_steps=config.length_steps,
        log_every=100,
        checkpoint_every=config.length_steps,
    )
    _, watch = [train_watched(small) for _ in range(2)][1]  # Compiled by then.
    draw_s = watch.seconds["draw"] / small.num_steps
    train_s = watch.seconds["train"] / small.num_steps
    both_s = draw_s + train_s
    rows.append(dict(T=seq_len, draw_s=draw_s, train_s=train_s, step_s=both_s))
  return {"steps": rows}


def measure_memory(config: BenchConfig) -> harness.Row:
  """Trains one run with many tokens, and saves it at the end."""
  large = config_lib.ScanSnapConfig(
      data=config_lib.DataConfig(
          num_next_per_last=2,
          num_common=config.memory_num_last,
          num_distinct_per_next=8,
      ),
      model=config_lib.ModelConfig(zero_init=False),
      num_last=(config.memory_num_last,),
      num_seeds=1,
      num_steps=config.memory_steps,
  )
  num_tokens = 20 * config.memory_num_last
  total_s, watch = train_watched(large)
  training_s = watch.seconds["draw"] + watch.seconds["train"]
  return {
      "num_tokens": num_tokens,
      "num_classes": 2 * config.memory_num_last,
      "num_steps": large.num_steps,
      "step_s": training_s / large.num_steps,
      "total_s": total_s,
      "seconds": watch.seconds,
      # Y, Z and their momenta in float32.
      "state_gb": 4 * 4 * num_tokens**2 / 1e9,
      "peak_rss_gb_unsaved": watch.peak_rss_gb["train"],
      "peak_rss_gb": harness.peak_rss_gb(),
  }


_MEASUREMENTS = {
    "sweep": measure_sweep,
    "torch": measure_torch,
    "length": measure_length,
    "memory": measure_memory,
}


def _measure_or_be_child(child: str | None, config: BenchConfig) -> harness.Row:
  """Measures; or one thing, for the process that wants it of a fresh one."""
  if child is None:
    return measure(config)
  harness.require(["torch"] if child == "torch" else (), "--notorch")
  found = _MEASUREMENTS[child](config)
  print(json.dumps(found))
  return found


if __name__ == "__main__":
  _CHILD = flags.DEFINE_enum(
      "child",
      None,
      [*_MEASUREMENTS],
      "Internal: what to measure in this process.",
  )
  harness.run(
      BenchConfig(),
      lambda config: _measure_or_be_child(_CHILD.value, config),
      num_cpu_devices=0,
  )
