"""Parameters under the names of their tree, in safetensors files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from joma.transformer import model as models
from joma.transformer.config import TransformerConfig
from joma.transformer.hf import safetensors_folder
from scansnap_jax.experiment.errors import UserError


def load(
    folder: Path, config: TransformerConfig, dtype: np.dtype | None
) -> dict[str, Any]:
  """Reads the parameters of a model.

  Args:
    folder: With safetensors files.
    config: The model's.
    dtype: Of the parameters; None keeps what is stored.

  Raises:
    UserError: If a tensor is missing, of another shape or not expected, or
      holds NaN or infinity.
  """
  stored = safetensors_folder.stored_tensors(folder)
  shapes = _shapes(config)
  _check(stored, shapes, f"{folder} has")
  flat = {}
  for path in shapes:
    flat[path] = jnp.asarray(stored[path].read(dtype))
  return traverse_util.unflatten_dict(flat, sep="/")


def save(
    folder: Path,
    config: TransformerConfig,
    params: Mapping[str, Any],
    dtype: np.dtype | None,
    max_shard_bytes: int,
) -> str:
  """Writes the parameters of a model; returns the first one's dtype.

  Raises:
    UserError: If a parameter is missing, of another shape or not expected.
  """
  flat: Any = traverse_util.flatten_dict(dict(params), sep="/")
  shapes = _shapes(config)
  _check(flat, shapes, "params have")
  kinds = {path: jnp.dtype(dtype or flat[path].dtype) for path in shapes}

  def arrays() -> Iterator[tuple[str, np.ndarray]]:
    for path in shapes:
      array = np.asarray(flat[path]).astype(kinds[path], copy=False)
      yield path, np.ascontiguousarray(array)

  safetensors_folder.write(folder, shapes, kinds, arrays(), max_shard_bytes)
  return str(kinds[next(iter(shapes))])


def _shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
  """Shape of each parameter of a model, by its path."""
  model = models.Transformer(config, implementation="reference")
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  tree = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  flat: Any = traverse_util.flatten_dict(tree, sep="/")
  return {path: flat[path].shape for path in sorted(flat)}


def _check(
    found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], who: str
) -> None:
  for path, shape in shapes.items():
    if path not in found:
      raise UserError(f"{who} no {path}, which the config asks for.")
    if tuple(found[path].shape) != shape:
      raise UserError(
          f"{who} {path} of shape {list(found[path].shape)}; the config asks"
          f" for {list(shape)}."
      )
  if extra := sorted(found.keys() - shapes.keys()):
    raise UserError(f"{who} {extra[0]}, which the config has no use for.")
