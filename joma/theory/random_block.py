"""Small random blocks with stationary g, on which laws are held to account.

Letters as in `joma.theory`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from joma.theory import dynamics
from joma.theory import flow


class Problem(NamedTuple):
  """A random block.

  Attributes:
    params: Initial values.
    batch: Samples; the u_q have length 1 but are not orthogonal.
    pull: g of each sample and node [B, F], constant in time.
  """

  params: dynamics.Params
  batch: dynamics.Batch
  pull: Float[Array, "B F"]

  def loss(self, hidden: Float[Array, "B F"], upper: tuple[()]) -> Array:
    """Computes -E[sum_k g_k h_k]."""
    del upper
    return -jnp.mean(jnp.sum(self.pull * hidden, axis=1))


def make_problem(
    seed: int,
    *,
    num_tokens: int,
    num_hidden: int,
    num_samples: int,
    num_queries: int,
) -> Problem:
  """Draws samples, embeddings, gradients and initial values, in float64.

  Args:
    seed: Random seed.
    num_tokens: Number of tokens M.
    num_hidden: Number of hidden nodes F.
    num_samples: Number of samples B, which take the queries in turn.
    num_queries: Number of queries Q.
  """
  generator = np.random.default_rng(seed)
  normal = lambda *shape: generator.normal(size=shape)
  tokens, samples = num_tokens, num_samples
  width = tokens + num_queries
  # Orthonormal, with the queries' vectors in the rest of the space: the laws
  # need U_C^T U_C = I and U_C^T u_q = 0.
  basis = np.linalg.qr(normal(width, width))[0]
  # Queries that are not orthogonal, so that a law that takes them to be fails.
  mixing = normal(num_queries, num_queries)
  mixing /= np.linalg.norm(mixing, axis=0)
  batch = dynamics.Batch(
      jnp.asarray(generator.dirichlet(np.ones(tokens), samples)),
      jnp.arange(samples) % num_queries,
      jnp.asarray(basis[:, :tokens]),
      jnp.asarray(basis[:, tokens:] @ mixing),
  )
  params = dynamics.Params(
      jnp.asarray(0.3 * normal(width, num_hidden)),
      jnp.asarray(0.3 * normal(num_queries, tokens)),
  )
  pull = jnp.asarray(2 * normal(samples, num_hidden))
  return Problem(params, batch, pull)


def train(
    problem: Problem,
    block: dynamics.Block,
    *,
    step_size: float | Array,
    time: float,
    rate_ratio: float | Array = 1.0,
) -> flow.Trajectory:
  """Descends for `time`; eta_z is `rate_ratio` times the step. Two records."""
  return flow.descend(
      problem.params,
      *(problem.batch, block, problem.loss),
      eta_w=step_size,
      eta_z=rate_ratio * step_size,
      num_records=1,
      steps_per_record=jnp.round(time / step_size).astype(int),
  )
