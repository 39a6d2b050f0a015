"""Training throughput of a Llama on one GPU, against the GPU's peak.

Model FLOPs utilization counts what the model needs (https://arxiv.org/abs/
2204.02311, appendix B), not what is computed anew: of each token 6 FLOPs a
parameter of a matrix product, and 6 T N H a layer of causal attention.

Letters: T positions, N heads, H head size.
"""

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import numpy as np

from joma.transformer import config as config_lib
from joma.transformer.text import batches as batches_lib
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from scansnap_jax.experiment import errors

# Dense bfloat16 FLOPs per second that NVIDIA's data sheets state.
_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def measure(config: Any) -> list[dict[str, Any]]:
  """Takes turns of steps; returns a table of one row.

  Raises:
    UserError: If there is no GPU whose peak is known.
  """
  device = jax.devices()[0]
  peak = next((v for k, v in _PEAKS.items() if k in device.device_kind), None)
  if device.platform != "gpu" or peak is None:
    raise errors.UserError(
        f"--part=gpu_train wants one of {', '.join(_PEAKS)}, and this is"
        f" {device.device_kind}."
    )
  task = make_task(config)
  seconds = _seconds_per_step(task, config)
  num_tokens = task.config.batch_size * task.config.seq_len
  per_second = num_tokens / seconds
  return [{
      "device": device.device_kind,
      "step_ms": 1e3 * seconds,
      "tokens_per_sec": per_second,
      "flops_per_token": flops_per_token(task.config.model, config.gpu_seq_len),
      "mfu": (
          per_second
          * flops_per_token(task.config.model, config.gpu_seq_len)
          / peak
      ),
  }]


def make_task(config: Any) -> lm_step.Task:
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
      use_remat=config.gpu_use_remat,
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


def _seconds_per_step(task: lm_step.Task, config: Any) -> float:
  state = jax.jit(functools.partial(lm_step.init, task=task))()
  shape = (config.num_steps, config.gpu_batch_size, config.gpu_seq_len)
  rng = np.random.default_rng(config.seed)
  draw = functools.partial(rng.integers, 0, task.config.model.vocab_size)
  text = batches_lib.Batch(
      draw(shape, np.int32), draw(shape, np.int32), np.ones(shape, np.float32)
  )
  train = jax.jit(functools.partial(lm_step.train, task=task), donate_argnums=0)
  compiled = train.lower(state, text).compile()
  times = []
  for _ in range(1 + config.num_rounds):  # The first warms up.
    started = time.monotonic()
    state, losses = compiled(state, text)
    jax.block_until_ready(losses)
    times.append((time.monotonic() - started) / config.num_steps)
  return statistics.median(times[1:])
