"""Measures language models against PyTorch, and on a GPU against its peak.

  python -m launch.bench.lm --part=train --output=bench.json

  train      a training step of the encoder of Scan & Snap and JoMA on this
             machine's cores, against the same model in PyTorch: same values,
             same batch, dropout and Adam with clipping
  llama      a training step of small Llamas on this machine's cores, against
             transformers' with SDPA; --notorch times ours alone
  gpu_train  tokens per second and model FLOPs utilization of a Llama of 12
             layers on one GPU, bfloat16

Rows take turns, see `launch.bench.harness`; each has all cores. `loss` is that
of the common batch at the common parameters, nothing dropped.
"""

from launch.bench import harness
from launch.bench.language import lm_sizes


def measure(config: lm_sizes.LmBenchConfig) -> harness.Row:
  """Makes and prints the measurements of a part.

  Raises:
    UserError: If PyTorch is to be measured and is not installed, or if there is
      no GPU to measure on.
  """
  # Imported here, so that --help and wrong flags answer at once.
  from launch.bench.language import lm_gpu
  from launch.bench.language import lm_llama
  from launch.bench.language import lm_train

  peers = {"train": ["torch"], "llama": ["torch", "transformers"]}
  if config.torch:
    harness.require(peers.get(config.part, []), "--notorch")
  parts = {
      "train": lm_train.measure,
      "llama": lm_llama.measure,
      "gpu_train": lm_gpu.measure,
  }
  rows = parts[config.part](config)
  machine = harness.machine_facts(names_devices=True)
  harness.tell("machine", machine)
  harness.tell(config.part, rows)
  return {"machine": machine, config.part: rows}


if __name__ == "__main__":
  harness.run(lm_sizes.LmBenchConfig(), measure)
