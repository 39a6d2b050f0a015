"""The implementations of an op, and which of them a platform has."""

from collections.abc import Callable
import types
import typing
from typing import Any, Literal, TypeAlias

import jax

from kernels_pallas import interpret

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]

# What an implementation may be told, its own frozen dataclass `Config`; None
# lets it choose.
Config: TypeAlias = Any

# The modules of an op that has a folder a platform.
ENTRIES = {
    "reference": "reference",
    "xla": "xla",
    "pallas_tpu": "tpu.entry",
    "pallas_gpu": "gpu.entry",
}

_PLATFORM_OF = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}


def choose(
    implementation: Implementation | None, best: dict[str, Implementation]
) -> Implementation:
  """Resolves None, and refuses what this platform cannot run.

  Args:
    implementation: What the user asked for. A named one is never replaced.
    best: The op's choice per platform ("tpu", "gpu"); "xla" elsewhere.

  Raises:
    ValueError: If the name is unknown, or its platform is not the one that the
      program is made for (unless kernels are interpreted).
  """
  platform = current_platform()
  if implementation is None:
    return best.get(platform, "xla")
  known = typing.get_args(Implementation)
  if implementation not in known:
    raise ValueError(
        f"implementation={implementation!r} is unknown; it must be one of"
        f" {', '.join(known)}, or None for the best of the platform"
    )
  # A named implementation is never replaced by another: what was measured would
  # not be what was asked for.
  needed = _PLATFORM_OF.get(implementation, platform)
  if needed != platform and not interpret.mode():
    raise ValueError(
        f"implementation={implementation!r} needs a {needed.upper()}, but this"
        f" program is made for {platform}; use 'xla', 'reference' or None"
    )
  return implementation


def choose_for(
    implementation: Implementation | None,
    module_of: Callable[[Implementation], types.ModuleType],
    *workload: object,
) -> Implementation:
  """As `choose`, where kernels may say that they lack something.

  Args:
    implementation: What the user asked for.
    module_of: The op's module by name; that of kernels may have `why_not`.
    *workload: Arguments of `why_not`, which returns None where it can.
  """
  chosen = choose(implementation, {"tpu": "pallas_tpu", "gpu": "pallas_gpu"})
  if implementation is None and chosen.startswith("pallas"):
    # Hopper's tensor cores have no float32, a TPU's lanes no block of 64 keys.
    why_not = getattr(module_of(chosen), "why_not", None)
    return "xla" if why_not is not None and why_not(*workload) else chosen
  return chosen


def current_platform() -> str:
  """The platform programs are traced for: "cpu", "tpu" or "gpu".

  That of the context mesh (`jax.set_mesh`), which may be of a chip that is not
  there, else of jax's default backend.
  """
  mesh = jax.sharding.get_abstract_mesh()
  # A mesh of described devices, by which programs are compiled for chips that
  # are not there.
  device = getattr(mesh, "abstract_device", None)
  kind = getattr(device, "device_kind", "") or ""
  if kind.startswith("TPU"):
    return "tpu"
  if "NVIDIA" in kind:
    return "gpu"
  platform = jax.default_backend()
  return "gpu" if platform in ("cuda", "rocm") else platform
