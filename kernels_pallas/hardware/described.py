"""Chips by name for programs that are traced where there is none of them."""

import contextlib

import jax

# What a device of each chip calls itself, how many cores it has, and whose it
# is. Those of a v4 and a v5p work as one.
_DEVICES = {
    "v4": ("TPU v4", 2, "tpu"),
    "v5e": ("TPU v5 lite", 1, "tpu"),
    "v5p": ("TPU v5", 2, "tpu"),
    "v6e": ("TPU v6 lite", 1, "tpu"),
    "v7x": ("TPU7x", 1, "tpu"),
    "h100": ("NVIDIA H100 80GB HBM3", None, "gpu"),
}


def traced_for(chip: str) -> contextlib.AbstractContextManager[None]:
  """Ops that are traced inside choose, and plan, their kernels for a chip.

    with described.traced_for("v5e"):
      exported = jax.export.export(jax.jit(fn), platforms=["tpu"])(*args)

  Nothing needs to be installed for the chip.

  Args:
    chip: "v4", "v5e", "v5p", "v6e", "v7x" or "h100".

  Raises:
    ValueError: If there is no such chip.
  """
  if chip not in _DEVICES:
    raise ValueError(
        f"chip={chip!r} is unknown; it must be one of {', '.join(_DEVICES)}"
    )
  kind, num_cores, platform = _DEVICES[chip]
  mesh = jax.sharding.AbstractMesh(
      (1,),
      ("device",),
      (jax.sharding.AxisType.Auto,),
      abstract_device=jax.sharding.AbstractDevice(kind, num_cores, platform),
  )
  return jax.sharding.use_abstract_mesh(mesh)
