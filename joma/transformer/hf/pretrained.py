"""Folders of Hugging Face models, to a config and a parameter tree and back.

  config, params = pretrained.load("SmolLM2-135M")
  logits = model.Transformer(config).apply({"params": params}, tokens)
  pretrained.save("mine", config, params, like="SmolLM2-135M")

A folder is config.json and model.safetensors, or shards with their index, as
transformers writes it: GPT-2, OPT, GPT-NeoX and Pythia, Llama 1 to 3, Mistral,
Qwen 2 and 3, Gemma 1 to 3 (text); or the project's `own_form`. No torch, no
pickle; no network, but for a name that `hub` knows. What was saved, loaded and
saved again is the same to the byte.
"""

from collections.abc import Iterator, Mapping
import os
from pathlib import Path
import re
import shutil
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from joma.transformer.config import TransformerConfig
from joma.transformer.hf import config_json
from joma.transformer.hf import hub
from joma.transformer.hf import own_form
from joma.transformer.hf import own_tensors
from joma.transformer.hf import safetensors_folder
from joma.transformer.hf import tensors
from joma.transformer.hf.safetensors_folder import StoredTensor
from joma.transformer.layers import scanning
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment.errors import UserError

_DTYPES = ("float32", "bfloat16", "float16")
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load(
    folder: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike | None = "float32",
) -> tuple[TransformerConfig, dict[str, Any]]:
  """Reads a model.

  Arrays go to JAX's default device one tensor at a time, so that the host
  never holds more than the model and a few copies of its largest tensor; under
  `jax.default_device(jax.devices("cpu")[0])` they stay in its memory.

  Args:
    folder: With config.json and safetensors files; or `org/name[@revision]` of
      Hugging Face, where there is no such folder, see `hub`.
    dtype: Of the parameters: float32, bfloat16 or float16; None keeps what is
      stored.

  Returns:
    (config, params), the latter as `model.Transformer` names it.

  Raises:
    UserError: If the folder, a file or a tensor is missing, damaged, of another
      shape or not expected, if a number is NaN or infinite, as stored or as
      `dtype`, or if the model is not supported; the message names file and
      tensor.
  """
  folder, fields, config = _read_config(folder, weights=True)
  dtype = _checked_dtype(dtype)
  if fields["model_type"] == own_form.MODEL_TYPE:
    return config, own_tensors.load(folder, config, dtype)
  table = tensors.TABLES[fields["model_type"]]
  stored = _named(safetensors_folder.stored_tensors(folder), table)
  rows = list(table.rows_of(config))
  sizes = tensors.sizes_of(config)
  _check_tied(stored, rows, table, config)
  _check_names(stored, rows, table, folder)
  _check_shapes(stored, rows, sizes)
  flat = {}
  for row in rows:
    tensor = stored[row.name].read(dtype)
    leaves = tensors.from_file(tensor, row.pattern, sizes)
    for path, leaf in zip(row.leaves.split(), leaves, strict=True):
      flat[path] = jnp.asarray(leaf)
  return config, traverse_util.unflatten_dict(flat, sep="/")


def save(
    folder: str | os.PathLike[str],
    config: TransformerConfig,
    params: Mapping[str, Any],
    *,
    family: str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
    like: str | os.PathLike[str] | None = None,
) -> None:
  """Writes a folder that `load` and transformers read.

  Args:
    folder: Made where it is not there; weights that it holds are replaced.
    config: The model's.
    params: Its parameters, of either layout of layers.
    family: Its model_type; None is that of `like`, or the first that can
      describe it, or the project's own for one with attention systems or
      Monarch matrices.
    dtype: Of the file: float32, bfloat16 or float16; None is the parameters'.
    max_shard_bytes: Weights beyond it go to further files, with an index.
    like: Folder whose tokenizer and generation_config.json are copied, and
      whose config.json gives the fields that do not describe the forward pass.

  Raises:
    UserError: If no family, or not this one, can describe the model, or if a
      parameter is missing, of another shape or not expected.
  """
  # Files have layers one by one.
  config, params = scanning.unrolled(config), scanning.unstack(params)
  like_fields: dict[str, Any] = {}
  if like is not None:
    like = _existing(like)
    like_fields = json_file.read_object(like / "config.json")
    is_own = config_json.is_own(config)
    theirs = None if is_own else like_fields.get("model_type")
    family = family or theirs
  fields = config_json.to_hf(config, family)
  dtype = _checked_dtype(dtype)
  kept = _kept_fields(like_fields, fields)
  folder = json_file.local_path(folder)
  if fields["model_type"] == own_form.MODEL_TYPE:
    folder.mkdir(parents=True, exist_ok=True)
    name = own_tensors.save(folder, config, params, dtype, max_shard_bytes)
  else:
    name = _save_family(folder, fields, config, params, dtype, max_shard_bytes)
  names = {"dtype": name, "torch_dtype": name}
  fields = {**kept, **fields, **names}
  safetensors_folder.write_json(folder / "config.json", fields)
  if like is not None and like.resolve() != folder.resolve():
    for name in _COMPANIONS:
      if (like / name).is_file():
        shutil.copyfile(like / name, folder / name)


def _save_family(
    folder: Path,
    fields: Mapping[str, Any],
    config: TransformerConfig,
    params: PyTree,
    dtype: np.dtype | None,
    max_shard_bytes: int,
) -> str:
  """Writes the tensors of a family's model; returns the first one's dtype."""
  rows = list(tensors.TABLES[fields["model_type"]].rows_of(config))
  sizes = tensors.sizes_of(config)
  flat: Any = traverse_util.flatten_dict(dict(params), sep="/")
  _check_params(flat, rows, sizes)
  dtype_of: Any = {
      row.name: dtype or _checked_dtype(flat[row.leaves.split()[0]].dtype)
      for row in rows
  }
  folder.mkdir(parents=True, exist_ok=True)
  safetensors_folder.write(
      folder,
      {row.name: tensors.file_shape(row.pattern, sizes) for row in rows},
      dtype_of,
      _file_tensors(flat, rows, sizes, dtype_of),
      max_shard_bytes,
  )
  return str(dtype_of[rows[0].name])


def read_config(folder: str | os.PathLike[str]) -> TransformerConfig:
  """Reads config.json alone.

  Raises:
    UserError: As `load`.
  """
  return _read_config(folder)[2]


def _read_config(
    folder: str | os.PathLike[str], *, weights: bool = False
) -> tuple[Path, dict[str, Any], TransformerConfig]:
  folder = _existing(folder, weights=weights)
  path = folder / "config.json"
  fields = json_file.read_object(path)
  try:
    return folder, fields, config_json.from_hf(fields)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error


def _existing(folder: str | os.PathLike[str], *, weights: bool = False) -> Path:
  """Returns the path of a folder with a config.json, downloaded or not."""
  file = json_file.local_path(folder)
  if file.is_file():
    safetensors_folder.refuse_pickle(file)
  folder = hub.existing(folder, weights=weights)
  if not (folder / "config.json").is_file():
    raise UserError(
        f"{folder} has no config.json; it has {hub.contents(folder)}."
    )
  return folder


def _checked_dtype(dtype: jax.typing.DTypeLike | None) -> np.dtype | None:
  if dtype is None:
    return None
  try:
    name = jnp.dtype(dtype).name
  except TypeError:
    name = str(dtype)
  if name not in _DTYPES:
    raise UserError(f"dtype={name} must be one of {', '.join(_DTYPES)}.")
  return jnp.dtype(name)


def _named(
    stored: dict[str, StoredTensor], table: tensors.Table
) -> dict[str, StoredTensor]:
  """Returns tensors by the names of the table, whatever generation wrote them.

  A folder of a body without its output layer leaves out the names' first part.
  """
  renamed = dict(table.renamed)
  has_prefix = any(name.startswith(table.prefix) for name in stored)
  named = {}
  for name, tensor in stored.items():
    if re.search(table.ignored, f".{name}"):
      continue
    if not has_prefix and name not in (table.tied, *renamed):
      name = table.prefix + name
    named[renamed.get(name, name)] = tensor
  return named


def _check_tied(
    stored: dict[str, StoredTensor],
    rows: list[tensors.Row],
    table: tensors.Table,
    config: TransformerConfig,
) -> None:
  """Drops an output layer that repeats the embedding; raises if it differs."""
  if not config.tie_embeddings or table.tied not in stored:
    return
  output, embedding = stored.pop(table.tied), stored.get(rows[0].name)
  if embedding is not None and (
      output.shape != embedding.shape
      or not np.array_equal(output.read(), embedding.read())
  ):
    raise UserError(
        f"config.json says tie_word_embeddings, but tensor {output.name} of"
        f" {output.path} differs from {embedding.name}: set"
        " tie_word_embeddings to false, or remove the tensor."
    )


def _check_names(
    stored: Mapping[str, StoredTensor],
    rows: list[tensors.Row],
    table: tensors.Table,
    folder: Path,
) -> None:
  wanted = {row.name for row in rows}
  if missing := [row.name for row in rows if row.name not in stored]:
    hint = ""
    if table.tied in missing:
      hint = " Is tie_word_embeddings missing in config.json?"
    raise UserError(
        f"{folder} lacks {_some(missing)}, which config.json asks for.{hint}"
    )
  if extra := [t for name, t in stored.items() if name not in wanted]:
    raise UserError(
        f"{extra[0].path} has {_some([tensor.name for tensor in extra])}, which"
        " the model that config.json describes has no use for."
    )


def _some(names: list[str]) -> str:
  shown = ", ".join(names[:4])
  more = f" and {len(names) - 4} more" if len(names) > 4 else ""
  return f"tensor{'s' if len(names) > 1 else ''} {shown}{more}"


def _check_shapes(
    stored: Mapping[str, StoredTensor],
    rows: list[tensors.Row],
    sizes: dict[str, int],
) -> None:
  for row in rows:
    tensor = stored[row.name]
    shape = tensors.file_shape(row.pattern, sizes)
    if tensor.shape != shape:
      raise UserError(
          f"Tensor {tensor.name} of {tensor.path} has shape"
          f" {list(tensor.shape)}; config.json asks for {list(shape)}."
      )


def _check_params(
    flat: Mapping[str, jax.Array | np.ndarray],
    rows: list[tensors.Row],
    sizes: dict[str, int],
) -> None:
  shapes = {
      path: tensors.leaf_shape(row.pattern, sizes)
      for row in rows
      for path in row.leaves.split()
  }
  for path, shape in shapes.items():
    if path not in flat:
      raise UserError(f"params lack {path}, which the config asks for.")
    if flat[path].shape != shape:
      raise UserError(
          f"params have {path} of shape {list(flat[path].shape)}; the config"
          f" asks for {list(shape)}."
      )
  if extra := sorted(flat.keys() - shapes.keys()):
    raise UserError(f"params have {extra[0]}, which the config has no use for.")


def _file_tensors(
    flat: Mapping[str, jax.Array | np.ndarray],
    rows: list[tensors.Row],
    sizes: dict[str, int],
    dtype_of: Mapping[str, np.dtype],
) -> Iterator[tuple[str, np.ndarray]]:
  for row in rows:
    leaves = [np.asarray(flat[path]) for path in row.leaves.split()]
    tensor = tensors.to_file(leaves, row.pattern, sizes)
    yield row.name, tensor.astype(dtype_of[row.name], copy=False)


def _kept_fields(
    like: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any]:
  """Fields of another config.json that say nothing about the forward pass."""
  kept = {name: like.get(name) for name in _TOKEN_IDS}
  if like.get("model_type") == fields["model_type"]:
    kept = {**kept, **like}
  if fields["model_type"] == own_form.MODEL_TYPE:
    return {name: value for name, value in kept.items() if value is not None}
  # Nothing that was taken over may change what the model computes.
  if config_json.from_hf({**kept, **fields}) != config_json.from_hf(fields):
    raise UserError("like: its config.json describes another model.")
  return kept
