"""Sizes of what `launch.bench.lm` measures; imports no jax."""

import dataclasses
import re
from typing import Literal

from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmBenchConfig:
  """What to measure, and its sizes; smaller ones are for tests.

  Attributes:
    part: What to measure.
    torch: Whether `train` and `llama` measure PyTorch too.
    llama_sizes: Rows of `llama`, as in 2x128x128x32x256: layers, width,
      positions, batch and vocabulary.
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

  part: Literal["train", "llama", "gpu_train"] = "train"
  torch: bool = True
  llama_sizes: tuple[str, ...] = (
      "4x256x256x16x256",
      "2x128x128x32x256",
      "4x128x128x16x8192",
      "6x384x512x4x256",
  )
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

  def __post_init__(self):
    for text in self.llama_sizes:
      if not re.fullmatch(r"[1-9]\d{0,6}(x[1-9]\d{0,6}){4}", text):
        raise errors.UserError(
            f"llama_sizes={text} must be layers, width, positions, batch and"
            " vocabulary, as in 2x128x128x32x256."
        )
