"""Strictness for every test: no silent broadcast, flags parsed, no GPU."""

import os

# Subprocesses of the tests compare bits and count devices: on CPU, like these.
os.environ["JAX_PLATFORMS"] = "cpu"
# Several processes compile for TPUs, on a machine that has none.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

from absl import flags  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")
flags.FLAGS.mark_as_parsed()
