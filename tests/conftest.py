"""Strictness for every test: no silent broadcast, flags parsed, no GPU."""

from absl import flags
import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_platforms", "cpu")
flags.FLAGS.mark_as_parsed()
