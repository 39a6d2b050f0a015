"""Measures what the one-layer experiments cost, each in a fresh process.

  python -m launch.bench_scansnap --output=bench.json

prints tables and writes the same numbers as JSON. --what takes a list of

  sweep   Figure 6's sweep, compilation included: where its time goes, and the
          least that its matrix products could take on this machine.
  torch   The same training in PyTorch, one run and one sequence at a time, over
          one-hot tokens; a few steps of each data setting, extrapolated.
  length  Time of a step against the sequence length T. It should not grow.
  memory  10,000 tokens and 1,000 next tokens: time of a step, peak memory.

or `all` of them. Other programs on the machine falsify the times.
"""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Literal
from unittest import mock

from absl import flags

from launch import app
from launch import flag_config
from scansnap_jax import config as config_lib
from scansnap_jax import data
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir as workdir_lib

_COMPILE_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "trace",
    "/jax/core/compile/backend_compile_duration": "compile",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """What to measure, and its sizes; smaller ones are for tests.

  Attributes:
    what: The measurements.
    torch: Compare with PyTorch, in `torch`.
    num_seeds: Seeds of the sweep, which has 64 runs a seed.
    num_steps: Steps of each run of the sweep.
    torch_steps: Steps of PyTorch in each data setting.
    seq_lens: Sequence lengths of `length`.
    length_steps: Steps at once in `length`.
    memory_num_last: Query tokens in `memory`; M is 20 times as many.
    memory_steps: Steps in `memory`.
  """

  what: tuple[Literal["all", "sweep", "torch", "length", "memory"], ...] = (
      "all",
  )
  torch: bool = True
  num_seeds: int = 10
  num_steps: int = 100
  torch_steps: int = 20
  seq_lens: tuple[int, ...] = (16, 128, 1024, 16384, 262144)
  length_steps: int = 100
  memory_num_last: int = 500
  memory_steps: int = 5


_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")
_CHILD = flags.DEFINE_string(
    "child", None, "Internal: the one measurement to make in this process."
)
_CONFIG = flag_config.define(BenchConfig())


def main(_: list[str]) -> None:
  """Measures, prints, writes."""
  config = _CONFIG()
  if _CHILD.value:
    print(json.dumps(_MEASUREMENTS[_CHILD.value](config)))
    return
  results = measure(config)
  if _OUTPUT.value:
    workdir_lib.write_atomic(_OUTPUT.value, json.dumps(results, indent=2))


def measure(config: BenchConfig) -> dict[str, Any]:
  """Makes the measurements asked for, each in a process of its own.

  Raises:
    UserError: If PyTorch is to be measured and is not installed.
  """
  chosen = [n for n in _MEASUREMENTS if {n, "all"} & set(config.what)]
  if not config.torch:
    chosen = [name for name in chosen if name != "torch"]
  elif "torch" in chosen and importlib.util.find_spec("torch") is None:
    raise errors.UserError(
        "PyTorch is not installed: pip install 'scansnap-jax[bench]', or give"
        " --notorch."
    )
  results: dict[str, Any] = {"machine": machine_facts()}
  _print_table("machine", results["machine"].items())
  for name in chosen:
    results[name] = _run_child(name, config)
    if name == "torch" and "sweep" in results:
      results[name]["ratio"] = results[name]["sweep_s"] / (
          results["sweep"]["total_s"]
      )
    _print_table(name, _flatten(results[name]))
  return results


def machine_facts() -> dict[str, Any]:
  """The machine and the versions; importing none of them."""
  versions = {}
  for package in ("jax", "jaxlib", "numpy", "torch"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  return {
      "cpu": _cpu_model(),
      "cores": len(os.sched_getaffinity(0)),
      "load_1min": os.getloadavg()[0],
      "python": platform.python_version(),
      **versions,
  }


def _cpu_model() -> str:
  with contextlib.suppress(OSError):
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()


def _run_child(name: str, config: BenchConfig) -> dict[str, Any]:
  """Makes one measurement in a fresh process, and times all of the process."""
  arguments = flag_config.to_flagfile(config, {"child": name}).splitlines()
  started = time.monotonic()
  finished = subprocess.run(
      [sys.executable, "-m", "launch.bench_scansnap", *arguments],
      cwd=pathlib.Path(__file__).parents[1],
      stdout=subprocess.PIPE,
      text=True,
      check=True,
  )
  process_s = time.monotonic() - started
  return json.loads(finished.stdout.splitlines()[-1]) | {"process_s": process_s}


class Stopwatch:
  """Seconds spent in each piece of the training loop, and the memory by then.

  Attributes:
    seconds: By piece; tracing and compilation are pieces of their own.
    peak_rss_gb: Peak memory of the process up to the end of each piece.
  """

  def __init__(self):
    self.seconds = dict.fromkeys(("trace", "compile"), 0.0)
    self.peak_rss_gb: dict[str, float] = {}

  def timed(self, piece: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn`, waiting for its result and adding its time to a piece."""
    import jax

    def call(*args, **kwargs):
      started = time.monotonic() - self._compiling_s()
      result = jax.block_until_ready(fn(*args, **kwargs))
      spent = time.monotonic() - self._compiling_s() - started
      self.seconds[piece] = self.seconds.get(piece, 0.0) + spent
      self.peak_rss_gb[piece] = peak_rss_gb()
      return result

    return call

  def hear(self, event: str, seconds: float, **_: Any) -> None:
    """Adds what JAX reports of a compilation."""
    if event in _COMPILE_EVENTS:
      self.seconds[_COMPILE_EVENTS[event]] += seconds

  def _compiling_s(self) -> float:
    return self.seconds["trace"] + self.seconds["compile"]


def peak_rss_gb() -> float:
  """The most memory that this process has held, in 1e9 bytes."""
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def train_watched(config: config_lib.ScanSnapConfig) -> tuple[float, Stopwatch]:
  """Trains in a temporary folder; returns the seconds and where they went.

  The loop carries no instruments: they are put on it here.
  """
  import jax
  from scansnap_jax import ensemble
  from scansnap_jax import run as run_lib
  from scansnap_jax import train
  from scansnap_jax.experiment import checkpoint

  watch, lift = Stopwatch(), ensemble.Ensemble.map

  def lift_timed(self, fn, **kwargs):
    lifted = lift(self, fn, **kwargs)
    # Drawing is timed as a whole, with the way from and to the host.
    return lifted if fn is run_lib.draw else watch.timed(fn.__name__, lifted)

  saver = checkpoint.Checkpointer
  places = [(saver, n) for n in ("__init__", "save", "restore_latest", "close")]
  jax.monitoring.register_event_duration_secs_listener(watch.hear)
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    patch = lambda *args: stack.enter_context(mock.patch.object(*args))
    for owner, name in places:
      patch(owner, name, watch.timed("checkpoint", getattr(owner, name)))
    patch(train, "draw_batches", watch.timed("draw", train.draw_batches))
    patch(ensemble.Ensemble, "map", lift_timed)
    started = time.monotonic()
    train.train_and_evaluate(config, pathlib.Path(folder))
    total_s = time.monotonic() - started
  watch.seconds["rest"] = total_s - sum(watch.seconds.values())
  return total_s, watch


def measure_sweep(config: BenchConfig) -> dict[str, Any]:
  """Trains Figure 6's sweep on all cores."""
  from scansnap_jax.experiment import devices

  devices.set_up()
  sweep = _sweep_config(config)
  total_s, watch = train_watched(sweep)
  peak_gb = peak_rss_gb()
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


def matmul_flops(config: config_lib.ScanSnapConfig) -> int:
  """Operations of the three products of a step: Y^T f, and both gradients.

  Each multiplies [B, M] by [M, M], or [M, B] by [B, M]: 2 B M^2 operations.
  """
  steps_per_setting = config.num_runs // len(config.num_last) * config.num_steps
  sizes = [data.make_classes(config.data, n).num_tokens for n in config.num_last]
  per_step = [3 * 2 * config.batch_size * size**2 for size in sizes]
  return steps_per_setting * sum(per_step)


def _matmul_flops_per_s(config: config_lib.ScanSnapConfig) -> float:
  """The rate of [B, M] @ [M, M], one chain of products a device; best of 5."""
  import jax
  import numpy as np
  from scansnap_jax import ensemble

  size = data.make_classes(config.data, max(config.num_last)).num_tokens
  layout = ensemble.make_ensemble(jax.device_count())
  multiply = layout.map(_multiply_often, num_products=500)
  normal = np.random.default_rng(0).normal
  shape = (layout.num_members, config.batch_size, size)
  left = layout.scatter(normal(size=shape).astype(np.float32))
  # Keeps the norm, so that the product stays a number.
  right = (normal(size=(size, size)) / size**0.5).astype(np.float32)
  run = lambda: jax.block_until_ready(multiply(left, right))
  seconds = min(_seconds(run, 6)[1:])
  return 500 * shape[0] * 2 * config.batch_size * size**2 / seconds


def _multiply_often(left, right, *, num_products):
  import jax

  return jax.lax.fori_loop(0, num_products, lambda _, x: x @ right, left)


def _seconds(fn: Callable[[], Any], num_calls: int) -> list[float]:
  times = [time.monotonic()]
  for _ in range(num_calls):
    fn()
    times.append(time.monotonic())
  return [end - start for start, end in zip(times, times[1:], strict=False)]


def _sweep_config(config: BenchConfig) -> config_lib.ScanSnapConfig:
  return dataclasses.replace(
      config_lib.figure6(),
      num_seeds=config.num_seeds,
      num_steps=config.num_steps,
  )


def measure_torch(config: BenchConfig) -> dict[str, Any]:
  """Times PyTorch with one and two threads; the faster of them counts."""
  sweep, settings, sweep_s = _sweep_config(config), [], 0.0
  for num_last in sweep.num_last:
    step_s = {
        threads: time_torch(sweep, num_last, config.torch_steps, threads)
        for threads in (1, 2)
    }
    settings.append({"num_last": num_last, "step_s": step_s})
    num_steps = sweep.num_runs // len(sweep.num_last) * sweep.num_steps
    sweep_s += min(step_s.values()) * num_steps
  return {"settings": settings, "sweep_s": sweep_s}


def time_torch(
    config: config_lib.ScanSnapConfig,
    num_last: int,
    num_steps: int,
    num_threads: int,
) -> float:
  """Median seconds of a step of one run, drawing included."""
  torch = importlib.import_module("torch")
  torch.set_num_threads(num_threads)
  classes = data.make_classes(config.data, num_last)
  shape = (classes.num_tokens, classes.num_tokens)
  bound = classes.num_tokens**-0.5
  params = {
      name: torch.empty(shape).uniform_(-bound, bound).requires_grad_()
      for name in ("Y", "Z")
  }
  optimizers = [
      torch.optim.SGD([param], lr=1.0, momentum=config.optimizer.momentum)
      for param in params.values()
  ]

  def step():
    loss = torch_loss(params, *torch_batch(config, classes))
    for optimizer in optimizers:
      optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
      optimizer.step()

  return statistics.median(_seconds(step, num_steps + 3)[3:])


def torch_batch(
    config: config_lib.ScanSnapConfig, classes: data.SequenceClasses
) -> tuple[Any, Any, Any]:
  """Draws sequences one by one; returns X [B, T-1, M], queries and labels."""
  torch = importlib.import_module("torch")
  assert config.data.seq_len is not None
  probs = torch.from_numpy(classes.probs)
  drawn = [
      random.randrange(classes.num_classes) for _ in range(config.batch_size)
  ]
  tokens = torch.stack([
      torch.multinomial(probs[n], config.data.seq_len - 1, replacement=True)
      for n in drawn
  ])
  context = torch.nn.functional.one_hot(tokens, classes.num_tokens).float()
  query, label = (
      torch.from_numpy(ids[drawn]) for ids in (classes.query, classes.label)
  )
  return context, query, label


def torch_loss(params: dict[str, Any], context: Any, query: Any, label: Any):
  """Cross-entropy of Y^T f with f = LN(X^T b) and b = softmax(X z_m)."""
  torch = importlib.import_module("torch")
  attn_logits = torch.einsum("btm,bm->bt", context, params["Z"][query])
  attn_weights = torch.softmax(attn_logits, dim=1)
  attended = torch.einsum("btm,bt->bm", context, attn_weights)
  features = attended / attended.norm(dim=1, keepdim=True)
  return torch.nn.functional.cross_entropy(features @ params["Y"], label)


def measure_length(config: BenchConfig) -> dict[str, Any]:
  """Times one run of Syn-Small at several sequence lengths."""
  from scansnap_jax.experiment import devices

  devices.set_up()
  rows = [time_length(t, config.length_steps) for t in config.seq_lens]
  return {"lengths": rows}


def time_length(seq_len: int, num_steps: int) -> dict[str, Any]:
  """Median seconds of a step, compiled before, over five times `num_steps`."""
  import jax
  import numpy as np
  from scansnap_jax import ensemble
  from scansnap_jax import run as run_lib
  from scansnap_jax import train

  config = config_lib.ScanSnapConfig(
      data=config_lib.DataConfig(seq_len=seq_len), num_seeds=1
  )
  classes = data.make_classes(config.data, config.num_last[0])
  runs, shared = train.make_runs(config), train.share(classes)
  layout = ensemble.make_ensemble(len(runs.seed))
  static = dict(model_config=config.model, optimizer_config=config.optimizer)
  state = layout.map(run_lib.init, **static)(layout.scatter(runs), shared)
  take = layout.map(run_lib.train, donate=True, **static)
  draw_s, train_s = [], []
  for start in range(0, 6 * num_steps, num_steps):
    times = [time.monotonic()]
    steps = np.arange(start, start + num_steps)
    batches = train.draw_batches(config, classes, steps)
    times.append(time.monotonic())
    state, *_ = jax.block_until_ready(take(state, (shared, batches)))
    draw_s.append((times[1] - times[0]) / num_steps)
    train_s.append((time.monotonic() - times[1]) / num_steps)
  return {
      "seq_len": seq_len,
      "draw_step_s": statistics.median(draw_s[1:]),
      "train_step_s": statistics.median(train_s[1:]),
  }


def measure_memory(config: BenchConfig) -> dict[str, Any]:
  """Trains one run with many tokens and saves it once, at the end."""
  from scansnap_jax.experiment import devices

  devices.set_up()
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
      log_every=config.memory_steps,
  )
  total_s, watch = train_watched(large)
  training_s = watch.seconds["draw"] + watch.seconds["train"]
  return {
      "num_tokens": 20 * config.memory_num_last,
      "num_classes": 2 * config.memory_num_last,
      "num_steps": large.num_steps,
      "step_s": training_s / large.num_steps,
      "total_s": total_s,
      "seconds": watch.seconds,
      # Y, Z and their momenta, in float32.
      "state_gb": 4 * 4 * (20 * config.memory_num_last) ** 2 / 1e9,
      "peak_rss_gb_before_checkpoint": watch.peak_rss_gb["train"],
      "peak_rss_gb": peak_rss_gb(),
  }


_MEASUREMENTS = {
    "sweep": measure_sweep,
    "torch": measure_torch,
    "length": measure_length,
    "memory": measure_memory,
}


def _flatten(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
  """Yields the leaves of nested dicts and lists with their dotted names."""
  if not isinstance(tree, (dict, list)):
    yield prefix, tree
    return
  items = tree.items() if isinstance(tree, dict) else enumerate(tree)
  for name, value in items:
    yield from _flatten(value, f"{prefix}.{name}" if prefix else str(name))


def _print_table(title: str, rows: Iterable[Sequence[Any]]) -> None:
  print(f"\n{title}")
  for name, value in rows:
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    print(f"  {name:<32} {shown}", flush=True)


if __name__ == "__main__":
  app.run(main)
