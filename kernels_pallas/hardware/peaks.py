"""Memory, bandwidth and arithmetic of chips: the vendors' figures, once.

Of one whole chip, peaks that no program quite reaches. Plans of inference and
rooflines of kernels both start here. Where jax's `tpu_info` differs by more
than rounding, the vendor's page counts: jax gives v5p 2,460 GB/s, which is
twice a v4's 1,230; Google's page has 2,765. Imports no jax.
"""

import dataclasses

_GB = 10**9
_GIB = 2**30
_TPU = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
  """A chip's.

  Attributes:
    hbm_bytes: Of its main memory.
    bytes_per_sec: From and to that memory.
    flops_per_sec: Dense matrix products in bfloat16.
    num_devices: That JAX sees: two on a v7x, one for each TensorCore.
    ici_bytes_per_sec: Sent over all links to other chips of a slice, or by
      NVLink to GPUs at the same switch, one way; the pages give both ways, or 8
      bits a byte. 0 where no plan asks.
    ici_dims: Of the torus of chips, each with two links; 0 where a switch
      connects them.
    dcn_bytes_per_sec: Sent to other slices through the data-centre network, as
      a chip's part of its host's or pod's; 0 where no page says it.
    source: Where the figures are from.
  """

  hbm_bytes: int
  bytes_per_sec: int
  flops_per_sec: int
  num_devices: int = 1
  ici_bytes_per_sec: int = 0
  ici_dims: int = 0
  dcn_bytes_per_sec: int = 0
  source: str


def _peak(
    hbm_bytes: int,
    gb_per_sec: int,
    tflops: int,
    source: str,
    ici: tuple[int, int] = (0, 0),
    num_devices: int = 1,
    dcn_gbit: int = 0,
) -> Peak:
  return Peak(
      hbm_bytes=hbm_bytes,
      bytes_per_sec=gb_per_sec * _GB,
      flops_per_sec=tflops * 1000 * _GB,
      num_devices=num_devices,
      ici_bytes_per_sec=ici[0] * _GB,
      ici_dims=ici[1],
      dcn_bytes_per_sec=dcn_gbit * _GB // 8,
      source=source,
  )


PEAKS: dict[str, Peak] = {
    # GB or GiB as the pages have it.
    "v4": _peak(32 * _GIB, 1228, 275, _TPU + "v4", (300, 3)),
    # Of the data-centre network v5e and v6e have 6.4 and 25.6 Tbit/s a pod of
    # 256 chips, v5p 50 Gbit/s a chip (pages v5e, v6e, v5p).
    "v5e": _peak(16 * _GB, 819, 197, _TPU + "v5e", (200, 2), dcn_gbit=25),
    "v5p": _peak(95 * _GIB, 2765, 459, _TPU + "tpu7x", (600, 3), dcn_gbit=50),
    "v6e": _peak(32 * _GIB, 1638, 918, _TPU + "tpu7x", (400, 2), dcn_gbit=100),
    "v7x": _peak(192 * _GIB, 7380, 2307, _TPU + "tpu7x", (600, 3), 2),
    # SXM boards.
    "a100": _peak(80 * _GB, 2039, 312, _NVIDIA + "a100/"),
    "h100": _peak(80 * _GB, 3350, 989, _NVIDIA + "h100/", (450, 0)),
    "h200": _peak(141 * _GB, 4800, 989, _NVIDIA + "h200/", (450, 0)),
}
