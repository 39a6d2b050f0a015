"""Strictness for every test: no silent broadcast, flags parsed, no GPU."""

import os

# Subprocesses of the tests compare bits and count devices: on CPU, like these.
os.environ["JAX_PLATFORMS"] = "cpu"

from absl import flags  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")
flags.FLAGS.mark_as_parsed()
