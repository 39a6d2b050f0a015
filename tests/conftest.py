"""Strictness for every test: no silent broadcast, flags parsed, no GPU."""

from importlib import metadata
import os
import shutil
import tempfile

# Subprocesses of the tests compare bits and count devices: on CPU, like these.
os.environ["JAX_PLATFORMS"] = "cpu"
# Several processes compile for TPUs, on a machine that has none.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
# Most of the time is LLVM's, whose optimizations no test is about.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Workers and subprocesses share what they compile; the first process, whose
# variables they inherit, clears it away. jax 0.11 cannot read programs for TPUs
# that are not there.
_COMPILED = None
if (
    "JAX_COMPILATION_CACHE_DIR" not in os.environ
    and metadata.version("jax") < "0.11"
):
  _COMPILED = tempfile.mkdtemp(prefix="scansnap_jax_tests_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

from absl import flags  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")
flags.FLAGS.mark_as_parsed()


def pytest_unconfigure():
  """Leaves nothing behind."""
  if _COMPILED is not None:
    shutil.rmtree(_COMPILED, ignore_errors=True)
