"""Devices: how many, which, and on how many hosts.

Nothing here runs at import; a script calls it before the first computation.
"""

from collections.abc import Iterator, Mapping
import contextlib
import glob
import os
import re
import sys
import tempfile
from typing import Any

import jax
from jax._src import clusters
from jax.experimental import multihost_utils
import numpy as np

from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import rendezvous
from scansnap_jax.experiment.processes import xla_flags

# TPU, NVIDIA (also under WSL), AMD, others: what their drivers put under /dev.
_ACCELERATORS = (
    "accel*",
    "vfio/[0-9]*",
    "nvidia[0-9]*",
    "dxg",
    "kfd",
    "dri/renderD*",
)
# Settings that the program relies on, whatever the environment says: of the
# same seed come the same numbers.
_FIXED = {
    "jax_enable_x64": False,
    "jax_threefry_partitionable": True,
    "jax_default_prng_impl": "threefry2x32",
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_softmax_custom_jvp": False,
    "jax_numpy_dtype_promotion": "standard",
}
# Settings that a user may want, with what they are by default.
_CHOSEN = {
    "jax_default_matmul_precision": None,
    "jax_disable_jit": False,
    "jax_disable_most_optimizations": False,
}
# What a user asks jax to refuse, of which every program here has need.
_GUARDS = (
    "jax_transfer_guard",
    "jax_transfer_guard_host_to_device",
    "jax_transfer_guard_device_to_device",
    "jax_transfer_guard_device_to_host",
)
_SLACK = 60
_NUMBER_FLAGS = re.compile("fast_math|precision|fast_min_max|denormal")


def set_up(
    *,
    multihost: bool = False,
    num_cpu_devices: int = 0,
    facts: Mapping[str, Any] | None = None,
    timeout: int = 300,
) -> rendezvous.Peers | None:
  """Connects the hosts, fixes what decides the bits, and splits the CPU.

  To be called before any device is used.

  Args:
    multihost: Join the other processes of the same command. TPU VMs, SLURM and
      Open MPI are recognized; elsewhere set JAX_COORDINATOR_ADDRESS,
      JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    num_cpu_devices: Devices to split a CPU into; 0 takes one per core. No
      effect on accelerators.
    facts: What must be equal on all hosts, by names that a user knows.
    timeout: Seconds to wait for the other processes, and without a sign of
      life of one until it is lost.

  Returns:
    The processes of a run on several hosts, otherwise None.

  Raises:
    UserError: There is no such platform, or no cluster, XLA_FLAGS has a flag
      that is none, transfers are not allowed, or the processes are not alike.
  """
  xla_flags.check()
  _check_guards()
  # Runs are repeated and resumed bit for bit, whatever the environment says.
  for name, value in _FIXED.items():
    jax.config.update(name, value)
  if _is_cpu_only():
    # Or an installed libtpu looks for its TPU, in seconds and several lines.
    jax.config.update("jax_platforms", "cpu")
  cores = num_cores()
  jax.config.update("jax_num_cpu_devices", num_cpu_devices or cores)
  peers = _join(facts or {}, timeout) if multihost else None
  try:
    with (
        rendezvous.heard_out(peers),
        _telling_only_if_well(),
    ):
      jax.devices()
  except (RuntimeError, AssertionError) as error:
    # Of a platform whose plugin sees no device jax asserts that there is one.
    config: Any = jax.config
    reason = str(error).splitlines() or ["no device of it was found"]
    raise errors.UserError(
        f"JAX_PLATFORMS={config.jax_platforms} cannot be used here: {reason[0]}"
    ) from error
  if peers is not None:
    peers.compare({"the kind and number of local devices": _describe_local()})
  return peers


def _check_guards() -> None:
  """Raises UserError where jax was asked to refuse what is done everywhere."""
  for name in _GUARDS:
    value = str(getattr(jax.config, name, None))
    if value.startswith("disallow"):
      raise errors.UserError(
          f"{name.upper()}={value} cannot be used here: arrays go to devices"
          " and come back without being asked to. Leave it out, or give log."
      )


def number_settings() -> dict[str, str]:
  """What else of the environment decides the last bits, where it was set.

  By the name of the variable: of XLA_FLAGS those that are about numbers.
  """
  values = jax.config.values
  found = {
      name.upper(): str(values[name])
      for name, default in _CHOSEN.items()
      if values[name] != default
  }
  given = os.environ.get("XLA_FLAGS", "").split()
  chosen = [flag for flag in given if _NUMBER_FLAGS.search(flag)]
  return found | ({"XLA_FLAGS": " ".join(sorted(chosen))} if chosen else {})


@contextlib.contextmanager
def _telling_only_if_well() -> Iterator[None]:
  """Drops what a driver writes to standard error before the block raises.

  That of a TPU that is not there writes a page. A CPU has none, and what XLA
  says before it ends the process is to be seen.
  """
  config: Any = jax.config
  if config.jax_platforms == "cpu":
    yield
    return
  try:
    said = tempfile.TemporaryFile()
    kept = os.dup(2)
  except OSError:  # It was closed, or no disk can be written.
    yield
    return
  with said:
    os.dup2(said.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(kept, 2)
      os.close(kept)
    said.seek(0)
    with contextlib.suppress(OSError):  # A remark that nobody can read.
      os.write(2, said.read())


def _join(facts: Mapping[str, Any], timeout: int) -> rendezvous.Peers | None:
  """Meets the other processes, compares facts, and lets jax join them."""
  peers, given = None, _process_from_environment()
  where = given or _detect_cluster(timeout)
  if where and where["num_processes"] > 1:
    peers = rendezvous.meet(
        where["coordinator_address"],
        where["num_processes"],
        where["process_id"],
        timeout=timeout,
    )
    with rendezvous.heard_out(peers):
      peers.compare(facts)
  try:
    with rendezvous.heard_out(peers):
      # What it detects says more. Its own word for a host that is lost is a
      # dump: ours is to come first.
      jax.distributed.initialize(
          **given, heartbeat_timeout_seconds=2 * timeout + _SLACK
      )
  except ValueError as error:
    raise errors.UserError(
        f"--multihost finds no cluster ({error}). Set JAX_COORDINATOR_ADDRESS,"
        " JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave it out."
    ) from error
  return peers


def _detect_cluster(timeout: int) -> dict[str, Any]:
  """The coordinates that jax finds on TPU VMs, SLURM or Open MPI, or nothing.

  jax has no public name for what `initialize` asks first.
  """
  detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
  address, num_processes, process_id, *_ = detect(
      None, None, None, None, None, timeout
  )
  if None in (address, num_processes, process_id):
    return {}
  return {
      "coordinator_address": address,
      "num_processes": num_processes,
      "process_id": process_id,
  }


def _describe_local() -> str:
  return f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"


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
