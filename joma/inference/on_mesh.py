"""Inference on a mesh of devices: `--mesh` of generate and evaluate_cache.

Parameters lie as in training (`transformer.sharding`), sequences go over data
and fsdp, key heads and their slots over tensor, and the positions of a prompt
over seq while it is read. Each key head keeps and evicts for itself, so that
caches need no exchange.
"""

from collections.abc import Iterator, Sequence
import contextlib
import sys
from typing import Any

import jax
from jaxtyping import PyTree

from joma.transformer import config as configs
from joma.transformer import sharding
from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import mesh_config

Sizes = tuple[int, ...] | None


def check(
    sizes: Sizes, config: configs.TransformerConfig, batch_size: int
) -> None:
  """Says what a mesh does to a model before anything long begins.

  Args:
    sizes: Of data, fsdp, tensor and seq; None is one device.
    config: The model's.
    batch_size: Sequences that are computed together.

  Raises:
    UserError: Sequences do not go over data and fsdp.
  """
  if sizes is None:
    return
  data, fsdp, tensor, _ = sizes
  if batch_size % (data * fsdp):
    fitting = mesh_config.listed(mesh_config.divisors(batch_size))
    raise errors.UserError(
        f"mesh={mesh_config.text_of(sizes)}: data x fsdp = {data * fsdp}"
        f" devices do not divide the {batch_size} sequences; {fitting}"
        " would do."
    )
  if config.num_kv_heads % tensor:
    fitting = mesh_config.listed(mesh_config.divisors(config.num_kv_heads))
    print(
        f"note: tensor={tensor} devices do not divide the"
        f" {config.num_kv_heads} key heads, so that each of them keeps the"
        f" whole cache; {fitting} would split it.",
        file=sys.stderr,
    )


@contextlib.contextmanager
def of_sizes(
    sizes: Sizes, devices: Sequence[Any] | None = None
) -> Iterator[None]:
  """Lets what follows be computed by a mesh of devices.

  Args:
    sizes: Of data, fsdp, tensor and seq; None changes nothing.
    devices: None is all.

  Raises:
    UserError: There are more or fewer devices.
  """
  if sizes is None:
    yield
    return
  with jax.set_mesh(sharding.mesh_of(sizes, devices)):
    yield


def place(
    params: PyTree, sizes: Sizes, devices: Sequence[Any] | None = None
) -> PyTree:
  """Lays parameters out, each device its parts; arguments as `of_sizes`."""
  if sizes is None:
    return params
  mesh = sharding.mesh_of(sizes, devices)
  return jax.device_put(params, sharding.shardings(params, mesh))
