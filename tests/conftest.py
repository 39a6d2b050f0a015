"""Strictness for every test: no silent broadcast, flags parsed.

Without an accelerator everything runs on the CPU. Where there is one, jax takes
it, and the laws of the kernels run compiled on it (`kernels_pallas/modes.py`).
Subprocesses that compare bits or count devices ask for the CPU themselves.
"""

import datetime
import gc
import glob
import hashlib
from importlib import metadata
import os
import platform
import re
import shutil
import tempfile
import time

# What the drivers of TPUs and of NVIDIA's GPUs put under /dev.
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*")
if not any(glob.glob(f"/dev/{name}") for name in _ACCELERATORS):
  # An installed libtpu would look for its TPU, in seconds.
  os.environ["JAX_PLATFORMS"] = "cpu"
# Several processes compile for TPUs, on a machine that has none.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
# Most of the time goes into compiling small programs: LLVM's optimizations,
# modules cut into 32 parts, and the emitters that set up all of MLIR for each
# fusion, no test is about.
_FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if metadata.version("jaxlib") < "0.11":  # 0.11 knows this flag no more.
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
elif platform.machine() == "x86_64":
  # A tenth less to compile than for the widest registers.
  _FLAGS.append("--xla_cpu_max_isa=AVX")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))
# Each instruction's place in Python's stack, a twentieth of all work.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Workers and subprocesses share what they compile; the first process, whose
# variables they inherit, clears it away.
_COMPILED = None
_START = time.monotonic()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _COMPILED = tempfile.mkdtemp(prefix="scansnap_jax_tests_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

from absl import flags  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
if os.environ.get("JAX_PLATFORMS"):
  jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
else:
  # Tolerances are those of float32, also of matrix units that round inputs.
  jax.config.update("jax_default_matmul_precision", "highest")
flags.FLAGS.mark_as_parsed()
# jax's caches hold millions of objects, through which a full collection walks.
gc.freeze()
gc.set_threshold(200_000, 20, 50)


def pytest_addoption(parser):
  """Adds what a daily run of some slow tests needs."""
  parser.addoption(
      "--slow_tenth",
      help="Of the slow tests run those of one tenth, 0 to 9; auto is today's.",
  )
  parser.addoption(
      "--slow_seconds",
      type=float,
      help="Slow tests that would start later than this are skipped.",
  )


def tenth_of(node_id):
  """Which tenth of the slow tests a test belongs to, on every machine."""
  return int(hashlib.sha256(node_id.encode()).hexdigest(), 16) % 10


def _is_variant_for_long_runs(item):
  """Whether a test is marked by_default and is none of the variants named."""
  marker = item.get_closest_marker("by_default")
  if marker is None:
    return False
  if isinstance(marker.args[0], str):
    return not item.name.endswith(marker.args)
  number = re.search(r"[0-9]+$", item.name)
  return number is not None and int(number[0]) not in marker.args


@pytest.hookimpl(tryfirst=True)  # Before -m is looked at.
def pytest_collection_modifyitems(config, items):
  """Marks variants as slow; leaves out the slow tests of other days."""
  for item in filter(_is_variant_for_long_runs, items):
    item.add_marker(pytest.mark.slow)
  chosen = config.getoption("--slow_tenth")
  if chosen is None:
    return
  today = datetime.date.today().toordinal() % 10
  tenth = today if chosen == "auto" else int(chosen)
  leaves = lambda item: (
      item.get_closest_marker("slow") is not None
      and tenth_of(item.nodeid) != tenth
  )
  config.hook.pytest_deselected(items=[i for i in items if leaves(i)])
  items[:] = [item for item in items if not leaves(item)]


def pytest_runtest_setup(item):
  """Skips a slow test when the time for them is over."""
  limit = item.config.getoption("--slow_seconds")
  is_slow = item.get_closest_marker("slow") is not None
  if limit is not None and is_slow and time.monotonic() - _START > limit:
    pytest.skip(f"{limit:.0f} s of slow tests are over.")


def pytest_unconfigure():
  """Leaves nothing behind."""
  if _COMPILED is not None:
    shutil.rmtree(_COMPILED, ignore_errors=True)
