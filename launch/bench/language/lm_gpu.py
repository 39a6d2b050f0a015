"""Training throughput of a Llama on one GPU, against the GPU's peak.

Model FLOPs utilization counts what the model needs (https://arxiv.org/abs/
2204.02311, appendix B), not what is computed anew: of each token 6 FLOPs a
parameter of a matrix product, and 6 T N H a layer of causal attention.

Letters: T positions, N heads, H head size.
"""

import dataclasses
import functools

import jax
import numpy as np

from joma.transformer import config as config_lib
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from kernels_pallas.hardware import peaks
from launch.bench import harness
from launch.bench.language import lm_sizes
from launch.bench.language import lm_train
from scansnap_jax.experiment import errors

_GPUS = ("H100", "H200", "A100")


def measure(config: lm_sizes.LmBenchConfig) -> list[harness.Row]:
  """Takes turns of steps; returns a table of one row.

  Raises:
    UserError: If there is no GPU whose peak is known.
  """
  device = jax.devices()[0]
  name = next((gpu for gpu in _GPUS if gpu in device.device_kind), None)
  if device.platform != "gpu" or name is None:
    raise errors.UserError(
        f"--part=gpu_train wants one of {', '.join(_GPUS)}, and this is"
        f" {device.device_kind}."
    )
  peak = peaks.PEAKS[name.lower()].flops_per_sec
  task = make_task(config)
  seconds = _seconds_per_step(task, config)
  num_tokens = task.config.batch_size * task.config.seq_len
  per_second = num_tokens / seconds
  flops = flops_per_token(task.config.model, config.gpu_seq_len)
  return [{
      "device": device.device_kind,
      "step_ms": 1e3 * seconds,
      "tokens_per_sec": per_second,
      "flops_per_token": flops,
      "mfu": per_second * flops / peak,
  }]


def make_task(config: lm_sizes.LmBenchConfig) -> lm_step.Task:
  """A Llama with heads of 128 and an MLP of 4 D, gated."""
  width = config.gpu_embed_dim
  num_heads = max(1, width // 128)
  model = config_lib.TransformerConfig(
      vocab_size=32_000,
      num_layers=config.gpu_num_layers,
      embed_dim=width,
      num_heads=num_heads,
      num_kv_heads=num_heads,
      head_dim=width // num_heads,
      hidden_dim=4 * width,
      max_len=config.gpu_seq_len,
  )
  lm = dataclasses.replace(
      lm_config.default(),
      model=model,
      batch_size=config.gpu_batch_size,
      seq_len=config.gpu_seq_len,
      dtype="bfloat16",
      remat="full" if config.gpu_use_remat else "none",
      seed=config.seed,
  )
  return lm_step.make_task(lm, 1000, 1000)


def flops_per_token(model: config_lib.TransformerConfig, seq_len: int) -> float:
  """FLOPs of a training step, a token; lookups take none."""
  width, heads = model.embed_dim, model.num_heads + model.num_kv_heads
  num_mlp = 3 if model.use_gated_mlp else 2
  layer = (
      2 * width * heads * model.head_dim + num_mlp * width * model.hidden_dim
  )
  num_params = model.num_layers * layer + width * model.vocab_size
  attention = model.num_layers * seq_len * model.num_heads * model.head_dim
  return 6.0 * (num_params + attention)


def _seconds_per_step(
    task: lm_step.Task, config: lm_sizes.LmBenchConfig
) -> float:
  state = jax.jit(functools.partial(lm_step.init, task=task))()
  text = lm_train.random_text(
      config, task.config.batch_size, task.config.seq_len, task.config.model
  )
  turn = lm_train.turn_of(task, state, text)
  turns = harness.take_turns(
      {"jax": turn}, config.num_rounds, num_steps=config.num_steps
  )
  return float(np.median(turns["jax"]))
