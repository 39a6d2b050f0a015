"""What predictors of sparsity learn from, written to disk as a model reads.

One compiled forward pass makes a shard; a row is a token. A folder holds

  manifest.json       what was read, fields, rows, finished shards, checksums
  00000.layer_in.npy  [R, L, D]  residual stream that enters each layer
  00000.mlp_in.npy    [R, L, D]  what each MLP reads, before its norm
  00000.units.npy     [R, L, U / 8] which blocks of neurons count, as bits
  00000.heads.npy     [R, L, N]  strengths of the heads, see `sparsity_labels`

A row of a layer takes 2 D b + U / 8 + N b bytes, b of them a number. Shards are
written whole or not at all; the same call again writes those that are missing
or damaged.

Letters: R rows, L layers, D width, U blocks of neurons, N heads, B texts, T
tokens.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import io
import json
import pathlib
from typing import Any
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree
import numpy as np

from joma.inference.sparsity import contextual_config
from joma.inference.sparsity import sparsity_labels
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import workdir
from scansnap_jax.experiment.processes import digest

MANIFEST = "manifest.json"
FIELDS = ("layer_in", "mlp_in", "units", "heads")


@functools.partial(jax.jit, static_argnames=("model", "config"))
def read(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    config: contextual_config.CaptureConfig,
) -> dict[str, Array]:
  """Reads texts once; returns the fields of B T rows, text by text."""
  _, seen = model.apply({"params": params}, tokens, mutable="intermediates")
  seen: Any = seen["intermediates"]
  shape, rows = model.config, tokens.size
  num_units = config.num_units(shape.hidden_dim)
  num_top = contextual_config.count(config.label_fraction, num_units)
  layer_in, found = seen["resid_embed"][0], {name: [] for name in FIELDS}
  for layer in range(shape.num_layers):
    here, kernels = seen[f"layers_{layer}"], params[f"layers_{layer}"]
    after = here["resid_attn"][0]
    strengths = sparsity_labels.unit_strengths(
        here["mlp"]["hidden_pre"][0],
        here["mlp"]["hidden"][0],
        kernels["mlp"]["down"]["kernel"],
        config.label,
        config.block_size,
    )
    units = sparsity_labels.positives(strengths, config.label, num_top)
    heads = sparsity_labels.head_strengths(
        here["attn"]["head_out"][0],
        kernels["attn"]["out"]["kernel"],
        config.label,
    )
    values = {
        "layer_in": layer_in.astype(config.dtype),
        "mlp_in": mlp_input(shape, layer_in, after).astype(config.dtype),
        "units": jnp.packbits(units, axis=-1),
        "heads": heads.astype(config.dtype),
    }
    for name, value in values.items():
      found[name].append(value.reshape(rows, -1))
    layer_in = here["resid_mlp"][0]
  return {name: jnp.stack(values, axis=1) for name, values in found.items()}


def mlp_input(
    config: configs.TransformerConfig, layer_in: Array, resid_attn: Array
) -> Array:
  """What a layer's MLP reads, before the norm where there is one before it."""
  return layer_in if config.use_parallel_residual else resid_attn


@dataclasses.dataclass(frozen=True)
class Shards:
  """A finished capture.

  Attributes:
    folder: Where it lies.
    manifest: Its manifest.
    num_units: U.
    rows_of: Rows of each shard.
  """

  folder: pathlib.Path
  manifest: Mapping[str, Any]
  num_units: int
  rows_of: tuple[int, ...]

  @property
  def num_rows(self) -> int:
    """R, of all shards."""
    return sum(self.rows_of)

  @property
  def num_texts(self) -> int:
    """Texts that were read."""
    return self.manifest["of"]["texts"][0]

  def rows(self, name: str, ids: Int[np.ndarray, "R"]) -> np.ndarray:
    """Reads rows of a field, in the order of `ids`; `units` as booleans."""
    starts = np.cumsum((0, *self.rows_of))
    shards = np.searchsorted(starts, ids, side="right") - 1
    found = None
    for shard in np.unique(shards):
      path = self.folder / _file(int(shard), name)
      # Mapped: a batch reads its rows, not the shard.
      held = np.load(path, mmap_mode="r", allow_pickle=False)
      where = np.flatnonzero(shards == shard)
      part = held[ids[where] - starts[shard]]
      if found is None:
        found = np.empty((len(ids), *part.shape[1:]), part.dtype)
      found[where] = part
    assert found is not None, "no rows"
    if name == "units":
      return sparsity_labels.unpack(found, self.num_units)
    return found


def write(
    model: models.Transformer,
    params: PyTree,
    texts: Int[np.ndarray, "B T"],
    folder: pathlib.Path,
    config: contextual_config.CaptureConfig,
    on_progress: Callable[[int], None] = lambda num_tokens: None,
) -> Shards:
  """Reads texts and writes what is missing of their shards.

  Args:
    model: What reads.
    params: Its parameters.
    texts: Token ids; each text is read from position 0.
    folder: Where to; made if need be.
    config: What is kept.
    on_progress: Told how many tokens are on disk since.

  Returns:
    The capture.

  Raises:
    UserError: The folder holds the capture of something else, blocks do not
      divide the neurons, or a number is too large for float16.
  """
  configs.require_dense(model.config, "A capture of what neurons do")
  if not texts.size:
    raise errors.UserError(f"There is no text to capture: {texts.shape}.")
  manifest = _plan(model, params, texts, config)
  workdir.make_folder(folder)
  checksums = _finished(folder, manifest)
  starts = range(0, len(texts), config.batch_size)
  for shard, start in enumerate(starts):
    tokens = texts[start : start + config.batch_size]
    if str(shard) not in checksums:
      fields = read(model, params, jnp.asarray(tokens), config)
      checksums[str(shard)] = {
          name: _save(folder / _file(shard, name), np.asarray(values))
          for name, values in fields.items()
      }
      # After the files: a shard counts when all of them are whole.
      finished = sorted(map(int, checksums))
      _write_manifest(
          folder, {**manifest, "finished": finished, "crc32": checksums}
      )
    on_progress(tokens.size)
  return load(folder)


def load(folder: pathlib.Path) -> Shards:
  """Opens a finished capture.

  Raises:
    UserError: It is none, or not finished.
  """
  path = folder / MANIFEST
  if not path.is_file():
    raise errors.UserError(f"{folder} holds no capture: no {MANIFEST}.")
  manifest = _read_manifest(path)
  num_shards = len(manifest["rows_of"])
  if len(manifest["finished"]) < num_shards:
    raise errors.UserError(
        f"{folder}: {len(manifest['finished'])} of {num_shards} shards are"
        " written. The same command again writes the others."
    )
  return Shards(
      folder, manifest, manifest["num_units"], tuple(manifest["rows_of"])
  )


def _plan(
    model: models.Transformer,
    params: PyTree,
    texts: Int[np.ndarray, "B T"],
    config: contextual_config.CaptureConfig,
) -> dict[str, Any]:
  """The manifest before anything is written."""
  seq_len = texts.shape[1]
  one = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
  fields = jax.eval_shape(
      functools.partial(read, model, config=config), params, one
  )
  described = {
      name: {"dtype": str(field.dtype), "shape": list(field.shape[1:])}
      for name, field in fields.items()
  }
  row_bytes = sum(
      field.dtype.itemsize * int(np.prod(field.shape[1:]))
      for field in fields.values()
  )
  sizes = [
      len(texts[start : start + config.batch_size]) * seq_len
      for start in range(0, len(texts), config.batch_size)
  ]
  return {
      "of": {
          "capture": dataclasses.asdict(config),
          "model": _crc32(model.config),
          "params": _crc32(digest.digest(params)),
          "texts": [*texts.shape, _crc32(texts.tobytes())],
      },
      "fields": described,
      "num_units": config.num_units(model.config.hidden_dim),
      "rows_of": sizes,
      "bytes_per_row": row_bytes,
      "bytes": row_bytes * sum(sizes),
  }


def _finished(
    folder: pathlib.Path, manifest: Mapping[str, Any]
) -> dict[str, dict[str, int]]:
  """The crc32 of the files of each shard that is there, whole, by field."""
  path = folder / MANIFEST
  if not path.is_file():
    return {}
  there = _read_manifest(path)
  if there["of"] != json.loads(json.dumps(manifest["of"])):
    difference = workdir.describe_difference(there["of"], manifest["of"])
    raise errors.UserError(
        f"{folder} holds another capture: {'; '.join(difference)}."
    )
  return {
      shard: checksums
      for shard, checksums in there["crc32"].items()
      if all(
          _is_whole(folder / _file(int(shard), name), checksums.get(name))
          for name in FIELDS
      )
  }


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
  manifest = json_file.read_object(path)
  kinds = {"of": dict, "rows_of": list, "finished": list, "crc32": dict}
  for name, kind in kinds.items():
    if not isinstance(manifest.get(name), kind):
      raise errors.UserError(
          f"{path} is no manifest of a capture: {name} is missing or of"
          f" another type. Remove {path.parent}; the same command captures"
          " again."
      )
  return manifest


def _is_whole(path: pathlib.Path, crc: object) -> bool:
  """Whether a file is as it was written: a predictor learns what it finds."""
  try:
    return zlib.crc32(path.read_bytes()) == crc
  except OSError:
    return False


def _write_manifest(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
  workdir.write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _save(path: pathlib.Path, values: np.ndarray) -> int:
  """Writes an array; returns the crc32 of the file."""
  if values.dtype == np.float16 and not np.isfinite(values).all():
    raise errors.UserError(
        f"{path.name}: a number is too large for float16: keep float32."
    )
  buffer = io.BytesIO()
  np.save(buffer, values, allow_pickle=False)
  workdir.write_atomic(path, buffer.getvalue())
  return zlib.crc32(buffer.getvalue())


def _file(shard: int, name: str) -> str:
  return f"{shard:05d}.{name}.npy"


def _crc32(value: object) -> int:
  data = value if isinstance(value, bytes) else str(value).encode()
  return zlib.crc32(data)
