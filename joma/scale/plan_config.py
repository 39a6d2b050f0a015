"""What a plan is asked: model, chips, step and mesh; imports no jax."""

import dataclasses
import math
from typing import Literal

from joma.inference.cost import cost_table_config
from joma.systems.cache_policies import names as policy_names
from joma.transformer.config import Remat
from joma.transformer.config import TransformerConfig
from kernels_pallas.hardware import peaks
from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError
from scansnap_jax.experiment.processes import mesh_config

SHAPES = cost_table_config.PRESETS
AXES = mesh_config.AXES
_POD_SIDE = 16  # Of v5e and v6e, whose tori have two sides.
_AT_ONE_SWITCH = 8  # GPUs of one machine, as NVIDIA's HGX boards have them.


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
  """One step of one model on a slice of TPUs, or on the GPUs of one machine.

  Attributes:
    topology: A chip and the chips along each side of its torus, as v5p:4x4x4,
      v5e:16x16, v4:2x2x1, v6e:2x4 or v7x:2x2x1; or GPUs of one machine, as
      h100:8 or h200:4, which jax 0.11 or later with its CUDA plugin compiles
      for.
    num_slices: Slices of that topology, which exchange through the data-centre
      network; devices are numbered slice by slice, so that of a mesh data is
      the axis that lies across slices where it is large enough.
    shape: Name of a model, or a Hugging Face folder with its config.json, or
      the name of one there, as org/name@revision.
    task: train compiles a step of the trainer, decode one token more for each
      sequence of a KV cache.
    batch: Sequences, over all devices.
    seq_len: Tokens of each sequence; in decode, those in the cache.
    mesh: Sizes of the axes data, fsdp, tensor and seq, as 1,16,1,4, of which
      seq may be left out; or search, which ranks all meshes by an estimate and
      compiles the best few.
    num_compiled: Meshes that search compiles.
    remat: What the backward pass computes anew: none, full (whole layers), dots
      (of layers all but products with weights) or offload (as dots, and the
      products wait in the host's memory); train alone.
    loss_piece: Positions of a text whose logits are made at a time, once more
      in the backward pass; none is all at once. train alone.
    scan_layers: Whether layers are one that runs in a loop, which is compiled
      once; a model whose layers differ is compiled layer by layer. train alone.
    policy: What the KV cache keeps, by the names that evaluate_cache knows;
      decode alone.
    capacity: Slots of the KV cache, where its policy lets tokens go; decode
      alone.
  """

  topology: str = "v5p:4x4x4"
  num_slices: int = 1
  shape: str = "llama3_8b"
  task: Literal["train", "decode"] = "train"
  batch: int = 64
  seq_len: int = 8192
  mesh: str = "search"
  num_compiled: int = 2
  remat: Remat = "full"
  loss_piece: int | None = None
  scan_layers: bool = True
  policy: str = "full"
  capacity: int | None = None

  def __post_init__(self):
    for name in ("batch", "seq_len", "num_compiled", "num_slices"):
      require.at_least(name, getattr(self, name), 1)
    if self.loss_piece is not None:
      require.at_least("loss_piece", self.loss_piece, 1)
      if self.task != "train":
        raise UserError("loss_piece is that of task=train.")
    sides = self.sides
    if self.mesh != "search" and math.prod(self.sizes) != self.num_devices:
      raise UserError(
          f"mesh={self.mesh} is of {math.prod(self.sizes)} devices, and"
          f" topology={self.topology} has {self.num_devices}."
          if self.num_slices == 1
          else (
              f"mesh={self.mesh} is of {math.prod(self.sizes)} devices, and"
              f" num_slices={self.num_slices} of {self.topology} have"
              f" {self.num_devices}."
          )
      )
    has_network = [
        chip for chip, peak in peaks.PEAKS.items() if peak.dcn_bytes_per_sec
    ]
    if self.num_slices > 1 and self.chip not in has_network:
      raise UserError(
          f"num_slices={self.num_slices}: how fast the network between slices"
          f" of {self.chip} is, no page says; it is known of"
          f" {', '.join(has_network)}."
      )
    if any(side < 1 for side in sides):
      raise UserError(f"topology={self.topology}: a side must be 1 or more.")
    if len(sides) == 2 and max(sides) > _POD_SIDE:
      raise UserError(
          f"topology={self.topology}: a pod of {self.chip} has {_POD_SIDE} x"
          f" {_POD_SIDE} chips; more are several slices (num_slices)."
      )
    policy_names.check(self.policy)
    evicts = self.policy.partition(":")[0] != policy_names.REFERENCE
    if self.task == "train" and (evicts or self.capacity is not None):
      raise UserError("policy and capacity are those of task=decode.")
    if evicts != (self.capacity is not None):
      raise UserError(
          f"policy={self.policy} needs capacity."
          if evicts
          else f"capacity={self.capacity} has no effect with policy=full."
      )

  @property
  def chip(self) -> str:
    """Name of the chip."""
    name = self.topology.partition(":")[0]
    known = [
        chip for chip, peak in peaks.PEAKS.items() if peak.ici_bytes_per_sec
    ]
    if name not in known:
      raise UserError(
          f"topology={self.topology}: {name} is none of {', '.join(known)}."
      )
    return name

  @property
  def sides(self) -> tuple[int, ...]:
    """Chips along each side of the torus; of GPUs, how many there are."""
    text, dims = (
        self.topology.partition(":")[2],
        peaks.PEAKS[self.chip].ici_dims,
    )
    if not dims:
      if not text.isdecimal() or not 1 <= int(text) <= _AT_ONE_SWITCH:
        raise UserError(
            f"topology={self.topology}: a machine has 1 to {_AT_ONE_SWITCH}"
            f" GPUs, as in {self.chip}:{_AT_ONE_SWITCH}; more machines are not"
            " planned."
        )
      return (int(text),)
    parts = text.split("x")
    if len(parts) != dims or not all(part.isdecimal() for part in parts):
      example = "x".join(["4"] * dims)
      raise UserError(
          f"topology={self.topology}: a {self.chip} torus has {dims} sides, as"
          f" in {self.chip}:{example}."
      )
    return tuple(map(int, parts))

  @property
  def num_devices(self) -> int:
    """Devices of all slices, as JAX counts them."""
    of_slice = math.prod(self.sides) * peaks.PEAKS[self.chip].num_devices
    return of_slice * self.num_slices

  @property
  def sizes(self) -> tuple[int, ...]:
    """Sizes of the axes, where a mesh is given."""
    return mesh_config.sizes_of(self.mesh)

  def model(self) -> TransformerConfig:
    """The shape, by its name or from its folder; see `model_of`."""
    return model_of(self.shape)


def model_of(shape: str) -> TransformerConfig:
  """A shape, by its name or from its folder.

  Raises:
    UserError: There is neither.
  """
  if shape in SHAPES:
    return SHAPES[shape]()
  # Imported here: named shapes do without jax.
  from joma.transformer.hf import pretrained

  try:
    return pretrained.read_config(shape)
  except UserError as error:
    raise UserError(
        f"shape={shape} is none of {', '.join(SHAPES)}, and no folder"
        f" either: {error}"
    ) from error
