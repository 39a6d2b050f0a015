"""Devices: how many, which, and on how many hosts.

Nothing here runs at import; a script calls it before the first computation.
"""

from collections.abc import Iterator
import contextlib
import glob
import os
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from scansnap_jax.experiment import errors

# TPU, NVIDIA (also under WSL), AMD, others: what their drivers put under /dev.
_ACCELERATORS = (
    "accel*",
    "vfio/[0-9]*",
    "nvidia[0-9]*",
    "dxg",
    "kfd",
    "dri/renderD*",
)


def set_up(*, multihost: bool = False, num_cpu_devices: int = 0) -> None:
  """Connects the hosts and splits the CPU, before any device is used.

  Args:
    multihost: Join the other processes of the same command. TPU VMs, SLURM and
      Open MPI are recognized; elsewhere set JAX_COORDINATOR_ADDRESS,
      JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    num_cpu_devices: Devices to split a CPU into; 0 takes one per core. No
      effect on accelerators.
  """
  if _is_cpu_only():
    # Or an installed libtpu looks for its TPU, in seconds and several lines.
    jax.config.update("jax_platforms", "cpu")
  cores = num_cores()
  jax.config.update("jax_num_cpu_devices", num_cpu_devices or cores)
  if multihost:
    try:
      jax.distributed.initialize(**_process_from_environment())
    except ValueError as error:
      raise errors.UserError(
          f"--multihost finds no cluster ({error}). Set"
          " JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or"
          " leave it out."
      ) from error


def _is_cpu_only() -> bool:
  """Whether nobody chose a platform and no accelerator is there."""
  config: Any = jax.config
  if config.jax_platforms or sys.platform != "linux":
    return False
  return not any(glob.glob(f"/dev/{name}") for name in _ACCELERATORS)


def num_cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):  # Linux.
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _process_from_environment() -> dict[str, Any]:
  """Reads the coordinates that a cluster without support of its own sets."""
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if address is None:
    return {}
  try:
    return {
        "coordinator_address": address,
        "num_processes": int(os.environ["JAX_NUM_PROCESSES"]),
        "process_id": int(os.environ["JAX_PROCESS_ID"]),
    }
  except (KeyError, ValueError) as error:
    raise errors.UserError(
        f"JAX_COORDINATOR_ADDRESS={address} needs JAX_NUM_PROCESSES and"
        f" JAX_PROCESS_ID beside it, as whole numbers: {error}"
    ) from error


def describe() -> str:
  """Names the devices in a word or two, such as `8 x TPU v5 lite`."""
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
  """Lets other processes go on only if the block went well on the main one.

  Raises:
    UserError: On the others, if it raised on the main process.
  """
  # Broadcast in `finally`, as the others wait for an answer even where the main
  # process raises.
  went_well = False
  try:
    yield
    went_well = True
  finally:
    if jax.process_count() > 1:
      sent = multihost_utils.broadcast_one_to_all(np.array(went_well))
      if went_well and not sent:
        raise errors.UserError("stopped, as the main process did.")


def is_main_process() -> bool:
  """True on the one process that writes logs and figures."""
  return jax.process_index() == 0
