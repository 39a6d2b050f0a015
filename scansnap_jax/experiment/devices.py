"""Devices: how many, which, and on how many hosts.

Nothing here runs at import; a script calls it before the first computation.
"""

import os
from typing import Any

import jax


def set_up(*, multihost: bool = False, num_cpu_devices: int = 0) -> None:
  """Connects the hosts and splits the CPU, before any device is used.

  Args:
    multihost: Join the other processes of the same command. TPU VMs, SLURM and
      Open MPI are recognized; elsewhere set JAX_COORDINATOR_ADDRESS,
      JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    num_cpu_devices: Devices to split a CPU into; 0 takes one per core. No
      effect on accelerators.
  """
  cores = len(os.sched_getaffinity(0))
  jax.config.update("jax_num_cpu_devices", num_cpu_devices or cores)
  if multihost:
    jax.distributed.initialize(**_process_from_environment())


def _process_from_environment() -> dict[str, Any]:
  """Reads the coordinates that a cluster without support of its own sets."""
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if address is None:
    return {}
  return {
      "coordinator_address": address,
      "num_processes": int(os.environ["JAX_NUM_PROCESSES"]),
      "process_id": int(os.environ["JAX_PROCESS_ID"]),
  }


def describe() -> str:
  """Names the devices in a word or two, such as `8 x TPU v5 lite`."""
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def is_main_process() -> bool:
  """True on the one process that writes logs and figures."""
  return jax.process_index() == 0
