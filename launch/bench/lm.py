"""Measures language models against PyTorch, and on a GPU against its peak.

  python -m launch.bench.lm --part=train --output=bench.json

  train      a training step of the encoder of Scan & Snap and JoMA on this
             machine's cores, against the same model in PyTorch: same values,
             same batch, dropout and Adam with clipping
  gpu_train  tokens per second and model FLOPs utilization of a Llama of 12
             layers on one GPU, bfloat16

Rows take turns, round by round, in one process, each with all cores; the median
over rounds counts, and ratios are medians of ratios within a round. `loss` is
that of the common batch at the common parameters, nothing dropped. Other
programs on the machine falsify the times.
"""

import dataclasses
import importlib.util
import json
import pathlib
from typing import Any, Literal

from absl import flags

from launch import app
from launch import flag_config
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir as workdir_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """What to measure, and its sizes; smaller ones are for tests.

  Attributes:
    part: What to measure.
    torch: Whether `train` measures PyTorch too.
    num_layers: Layers of `train`.
    vocab_size: V of `train`.
    embed_dim: D of `train`.
    batch_size: B of `train`.
    seq_len: T of `train`.
    num_rounds: Rounds, of which the median counts.
    num_steps: Steps of a turn.
    gpu_num_layers: Layers of `gpu_train`.
    gpu_embed_dim: D of `gpu_train`.
    gpu_batch_size: B of `gpu_train`.
    gpu_seq_len: T of `gpu_train`.
    gpu_use_remat: Whether `gpu_train` computes layers anew.
    seed: Random seed for values and batches.
  """

  part: Literal["train", "gpu_train"] = "train"
  torch: bool = True
  num_layers: int = 1
  vocab_size: int = 28_782
  embed_dim: int = 200
  batch_size: int = 20
  seq_len: int = 35
  num_rounds: int = 7
  num_steps: int = 5
  gpu_num_layers: int = 12
  gpu_embed_dim: int = 1024
  gpu_batch_size: int = 16
  gpu_seq_len: int = 2048
  gpu_use_remat: bool = False
  seed: int = 1


# Whoever imports this module for its functions gets no flags.
_FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_OUTPUT = flags.DEFINE_string(
    "output", None, "JSON file to write.", flag_values=_FLAGS
)
_CONFIG = flag_config.define(BenchConfig(), flag_values=_FLAGS)


def main(_: list[str]) -> None:
  """Measures, prints, writes."""
  output, config = _OUTPUT.value, _CONFIG()
  if output and not pathlib.Path(output).absolute().parent.is_dir():
    raise errors.UserError(f"--output={output} is in no folder that exists")
  from scansnap_jax.experiment import devices

  if config.part == "train":
    devices.set_up(num_cpu_devices=1)  # One run has all cores.
  results = measure(config)
  if output:
    workdir_lib.write_atomic(output, json.dumps(results, indent=2) + "\n")


def measure(config: BenchConfig) -> dict[str, Any]:
  """Makes and prints the measurements of a part.

  Raises:
    UserError: If PyTorch is to be measured and is not installed, or if there is
      no GPU to measure on.
  """
  # Imported here, so that --help and wrong flags answer at once.
  from launch.bench import lm_gpu
  from launch.bench import lm_train
  from launch.bench import scansnap

  wants_torch = config.part == "train" and config.torch
  if wants_torch and importlib.util.find_spec("torch") is None:
    raise errors.UserError(
        "PyTorch is not installed: pip install 'scansnap-jax[bench]', or give"
        " --notorch"
    )
  parts = {"train": lm_train.measure, "gpu_train": lm_gpu.measure}
  found = parts[config.part](config)
  machine = scansnap.machine_facts()
  for name, fact in machine.items():
    print(f"{name:<12}{fact}", flush=True)
  for line in [found[0].keys(), *(row.values() for row in found)]:
    print("".join(f"{_show(x):>20}" for x in line), flush=True)
  return {"machine": machine, config.part: found}


def _show(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
  app.run(main)
