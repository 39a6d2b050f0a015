"""What a scaling curve is asked: step, chip and numbers of chips."""

import dataclasses
from typing import Literal

from joma.scale import plan_config
from kernels_pallas.hardware import peaks
from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingConfig:
  """One step on more and more chips of a kind, its batch fixed.

  Attributes:
    chip: Name of the chip, such as v5p.
    num_chips: Numbers of chips, each a power of two.
    compiled: Numbers among num_chips whose best mesh is compiled; the others
      are estimated, see `joma.scale.curve.scaling`.
    shape: Name of a model, or a Hugging Face folder with its config.json, or
      the name of one there, as org/name@revision.
    task: train is a step of the trainer, decode one token more for each
      sequence of a KV cache.
    batch: Sequences, over all devices.
    seq_len: Tokens of each sequence; in decode, those in the cache.
    policy: What the KV cache keeps; decode alone.
    capacity: Slots of the KV cache, where its policy lets tokens go; decode
      alone.
  """

  chip: str = "v5p"
  num_chips: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
  compiled: tuple[int, ...] = (8, 64, 512)
  shape: str = "llama3_8b"
  task: Literal["train", "decode"] = "train"
  batch: int = 64
  seq_len: int = 8192
  policy: str = "full"
  capacity: int | None = None

  def __post_init__(self):
    known = [chip for chip, peak in peaks.PEAKS.items() if peak.ici_dims]
    if self.chip not in known:
      raise UserError(f"chip={self.chip} is none of {', '.join(known)}.")
    if not self.num_chips:
      raise UserError("num_chips must name one number of chips or more.")
    for number in self.num_chips:
      require.at_least("num_chips", number, 1)
      if number & (number - 1):
        raise UserError(f"num_chips={number} must be a power of two.")
    missing = sorted(set(self.compiled) - set(self.num_chips))
    if missing:
      raise UserError(
          f"compiled={','.join(map(str, missing))} must be among num_chips."
      )
    for number in self.num_chips:
      self.plan(number)

  def plan(self, number: int) -> plan_config.PlanConfig:
    """The plan for so many chips, in a slice as near to a cube as there is."""
    return plan_config.PlanConfig(
        topology=topology(self.chip, number),
        shape=self.shape,
        task=self.task,
        batch=self.batch,
        seq_len=self.seq_len,
        policy=self.policy,
        capacity=self.capacity,
    )


def topology(chip: str, number: int) -> str:
  """A slice of a power of two of chips, its sides as alike as can be."""
  dims = peaks.PEAKS[chip].ici_dims
  power = number.bit_length() - 1
  sides = [2 ** ((power + side) // dims) for side in range(dims)]
  return f"{chip}:{'x'.join(map(str, sides))}"
