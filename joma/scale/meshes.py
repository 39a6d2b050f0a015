"""The meshes that a slice can be laid out as, best estimate first."""

import dataclasses

from joma.scale import estimate
from joma.scale import plan_config
from joma.transformer.config import TransformerConfig
from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import mesh_config


@dataclasses.dataclass(frozen=True)
class Ranking:
  """What search found.

  Attributes:
    best: Meshes that should fit, the fastest first, then those that should not.
    num_refused: Meshes that do not divide model or batch.
  """

  best: tuple[estimate.Estimate, ...]
  num_refused: int


def check(
    config: plan_config.PlanConfig,
    model: TransformerConfig,
    sizes: tuple[int, ...],
) -> None:
  """Raises UserError, with the sizes that would do, if a mesh does not divide.

  Training splits sequences over data and fsdp and their positions over seq;
  heads, hidden units and vocabulary go over tensor.
  """
  data, fsdp, tensor, seq = sizes
  if config.task == "decode" and seq > 1:
    raise errors.UserError(
        f"seq={seq} splits the positions of texts that are read; a step of"
        " decoding has one: give seq=1."
    )
  if config.seq_len % seq:
    fitting = [
        n
        for n in mesh_config.divisors(config.seq_len)
        if config.num_devices % n == 0
    ]
    raise errors.UserError(
        f"seq_len={config.seq_len} does not divide over seq={seq};"
        f" {mesh_config.listed(fitting)} would do."
    )
  if config.task == "train" and config.batch % (data * fsdp):
    fitting = [
        n
        for n in mesh_config.divisors(config.batch)
        if config.num_devices % n == 0
    ]
    raise errors.UserError(
        f"batch={config.batch} sequences do not divide over data x fsdp ="
        f" {data * fsdp} devices; {mesh_config.listed(fitting)} would do."
    )
  for name in ("num_heads", "num_kv_heads", "hidden_dim", "vocab_size"):
    size = getattr(model, name)
    if size % tensor:
      fitting = [
          n for n in mesh_config.divisors(size) if config.num_devices % n == 0
      ]
      raise errors.UserError(
          f"{name}={size} does not divide over tensor={tensor};"
          f" {mesh_config.listed(fitting)} would do."
      )


def rank(config: plan_config.PlanConfig, model: TransformerConfig) -> Ranking:
  """Estimates every mesh that divides.

  Raises:
    UserError: None does.
  """
  found, refused = [], 0
  number = config.num_devices
  for tensor in mesh_config.divisors(number):
    for seq in mesh_config.divisors(number // tensor):
      for fsdp in mesh_config.divisors(number // (tensor * seq)):
        sizes = (number // (tensor * seq * fsdp), fsdp, tensor, seq)
        try:
          check(config, model, sizes)
        except errors.UserError:
          refused += 1
          continue
        found.append(estimate.of_mesh(config, model, sizes))
  if not found:
    check(config, model, (1, number, 1, 1))
  # Of those that take as long, the one that the others hide best behind.
  by_time = sorted(
      found, key=lambda one: (not one.fits, one.seconds, one.serial_seconds)
  )
  return Ranking(tuple(by_time), refused)
