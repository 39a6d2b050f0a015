"""Low-rank predictors of which neurons and heads count, of all layers.

  score = f(x / rms(x) A) B + b      A [D, r], B [r, U], f none or GELU

Deja Vu (https://arxiv.org/abs/2310.17157) has no f and no b and reads x as it
is. A unit is predicted to count where its score is large. Both predictors of
every layer are one tree of stacked arrays, trained by one AdamW.

Letters: L layers, D width, r rank, U units, N heads, R rows.
"""

from collections.abc import Mapping
import io
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import numpy as np

from joma.inference.sparsity import contextual_config
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import npz_file
from scansnap_jax.experiment import workdir

KINDS = ("mlp", "heads")


def init(
    config: contextual_config.PredictorConfig,
    num_layers: int,
    embed_dim: int,
    num_units: int,
    num_heads: int,
) -> dict[str, dict[str, Array]]:
  """Predictors before they learn: `mlp` and `heads`, leaves [L, ...].

  Raises:
    UserError: If a rank is more than D.
  """
  keys = jax.random.split(jax.random.key(config.seed), 2)
  return {
      "mlp": _init(keys[0], num_layers, embed_dim, config.rank, num_units),
      "heads": _init(
          keys[1],
          num_layers,
          embed_dim,
          min(config.head_rank, embed_dim),
          num_heads,
      ),
  }


def _init(
    key: Array, num_layers: int, embed_dim: int, rank: int, num_units: int
) -> dict[str, Array]:
  if rank > embed_dim:
    raise errors.UserError(
        f"rank={rank} is more than the {embed_dim} numbers that it reads."
    )
  a, b = jax.random.split(key)
  normal = lambda key, n, m: jax.random.normal(key, (num_layers, n, m)) / n**0.5
  return {
      "project": normal(a, embed_dim, rank),
      "expand": normal(b, rank, num_units),
      "bias": jnp.zeros((num_layers, num_units)),
  }


def scores(
    predictor: Mapping[str, Array],
    x: Float[Array, "*b D"],
    nonlinearity: contextual_config.Nonlinearity = "none",
) -> Float[Array, "*b U"]:
  """Scores of one layer's units, float32.

  Args:
    predictor: `project` [D, r], `expand` [r, U] and `bias` [U].
    x: What is read, not normalized.
    nonlinearity: f.
  """
  # The stream grows over the layers; scores and thresholds should not.
  hidden = normalize(x) @ predictor["project"]
  if nonlinearity == "gelu":
    hidden = jax.nn.gelu(hidden)
  bias = predictor["bias"]
  return hidden @ predictor["expand"] + bias.reshape(
      (1,) * (x.ndim - 1) + (-1,)
  )


def normalize(x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
  """Divides x by its root mean square; float32."""
  x = x.astype(jnp.float32)
  mean_square = jnp.square(x).mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(mean_square + 1e-12)


def layer(tree: PyTree, index: int) -> PyTree:
  """One layer of stacked arrays."""
  return jax.tree.map(lambda leaf: leaf[index], tree)


def save(
    path: pathlib.Path, params: PyTree, metadata: Mapping[str, Any]
) -> None:
  """Writes predictors, and what is to be known of them, to a file .npz."""
  arrays: dict[str, Any] = {
      f"{kind}.{name}": np.asarray(value)
      for kind in KINDS
      for name, value in params[kind].items()
  }
  buffer = io.BytesIO()
  np.savez(buffer, metadata=np.array(json.dumps(metadata)), **arrays)
  workdir.make_folder(path.parent)
  workdir.write_atomic(path, buffer.getvalue())


def load(
    path: pathlib.Path,
) -> tuple[dict[str, dict[str, Array]], dict[str, Any]]:
  """Returns the predictors and metadata of a file.

  Raises:
    UserError: It is none of `save`'s.
  """
  try:
    held = npz_file.read(path)
    metadata = json.loads(str(held.pop("metadata")))
  except (ValueError, KeyError) as error:
    raise errors.UserError(f"{path} holds no predictors: {error}") from error
  params: dict[str, dict[str, Array]] = {kind: {} for kind in KINDS}
  for name, value in held.items():
    kind, _, part = name.partition(".")
    params[kind][part] = jnp.asarray(value)
  return params, metadata
