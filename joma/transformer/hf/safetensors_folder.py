"""Tensors of a folder of safetensors files, one file or shards with an index.

Files are memory-mapped and tensors are read one at a time. Pickle files are
refused: opening one runs whatever code it holds. Only the `safetensors` package
is needed, neither torch nor a network. Imports no jax.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from joma.transformer.hf import finite
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor that is still in its file.

  Attributes:
    name: In the file.
    path: The file.
    shape: In the file.
  """

  name: str
  path: Path
  shape: tuple[int, ...]
  _handle: Any

  def read(self, dtype: np.dtype | None = None) -> np.ndarray:
    """Copies the tensor out of the file.

    Args:
      dtype: To convert it to; None keeps what is stored.

    Raises:
      UserError: If it holds no floating-point numbers, or one of them is NaN or
        infinite, as stored or as `dtype`.
    """
    kind = self._handle.get_slice(self.name).get_dtype()
    if kind not in _DTYPES:
      raise UserError(
          f"Tensor {self.name} of {self.path} holds {kind}; supported:"
          f" {', '.join(_DTYPES)}. Quantized weights must be dequantized first."
      )
    stored = self._handle.get_tensor(self.name)
    self._check_finite(stored, stored)
    if dtype is None or dtype == stored.dtype:
      return stored
    with np.errstate(over="ignore"):  # It is told by the tensor's name.
      found = stored.astype(dtype)
    if finite.is_narrower(dtype, stored.dtype):
      self._check_finite(found, stored)
    return found

  def _check_finite(self, found: np.ndarray, stored: np.ndarray) -> None:
    """Raises UserError at a NaN or an infinity, and says where it is."""
    flat = finite.first_other(found)
    if flat is None:
      return
    place = [int(i) for i in np.unravel_index(flat, found.shape)]
    value = float(stored.reshape(-1)[flat])
    beyond = f", which {found.dtype} cannot hold" if found is not stored else ""
    raise UserError(
        f"Tensor {self.name} of {self.path} holds {value:g} at {place}{beyond}:"
        " no model computes with it. Copy or download it again, or repair it."
    )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
  """Returns every tensor of a folder by its name.

  Args:
    folder: With model.safetensors, or model.safetensors.index.json and the
      files that it names.

  Raises:
    UserError: If there is no such file, if one is damaged, or if index and
      files disagree; the message names file and tensor.
  """
  if (folder / SINGLE).exists():
    return _tensors_of(folder / SINGLE)
  if not (folder / INDEX).exists():
    raise _no_weights(folder)
  weight_map = _weight_map(folder / INDEX)
  found: dict[str, StoredTensor] = {}
  for file in sorted(set(weight_map.values())):
    if not (folder / file).is_file():
      raise UserError(f"{folder / INDEX} names {file}, which is not there.")
    found.update(_tensors_of(folder / file))
  for name, file in weight_map.items():
    if name not in found or found[name].path.name != file:
      raise UserError(
          f"{folder / INDEX} says that tensor {name} is in {file}; it is not."
      )
  return found


def write(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype_of: Mapping[str, np.dtype],
    tensors: Iterator[tuple[str, np.ndarray]],
    max_shard_bytes: int,
) -> None:
  """Writes tensors, and removes what an earlier model left in the folder.

  The same tensors always give the same bytes. Files appear under their names
  only when all of them are complete.

  Args:
    folder: Exists.
    shapes: Of every tensor, in the order in which `tensors` yields them.
    dtype_of: Of every tensor.
    tensors: Name and contiguous array; taken one shard at a time.
    max_shard_bytes: A file holds more only if one tensor does.
  """
  shards = _shards(shapes, dtype_of, max_shard_bytes)
  files = [SINGLE]
  if len(shards) > 1:
    files = [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        for i in range(len(shards))
    ]
  for file, names in zip(files, shards, strict=True):
    held = dict(next(tensors) for _ in names)
    _save(folder / f"{file}.partial", held)
    # Before the next shard is taken: only one is in memory.
    del held
  shards_before = folder.glob("model-*-of-*.safetensors")
  for stale in (folder / SINGLE, folder / INDEX, *shards_before):
    stale.unlink(missing_ok=True)
  for file in files:
    os.replace(folder / f"{file}.partial", folder / file)
  if len(shards) > 1:
    total = sum(_num_bytes(name, shapes, dtype_of) for name in shapes)
    weight_map = {
        name: file
        for file, names in zip(files, shards, strict=True)
        for name in names
    }
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX, index)


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes one file, which whoever may read the folder can read."""
  save_file = _safetensors("safetensors.numpy").save_file
  path.touch()
  mode = path.stat().st_mode
  # transformers reads files of this format alone.
  save_file(tensors, path, metadata={"format": "pt"})
  # The package makes files that nobody else can read.
  path.chmod(mode)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
  """Writes a dictionary, keys in order."""
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def refuse_pickle(path: Path) -> None:
  """Raises UserError if a path is named like a pickle file."""
  if path.suffix in _PICKLES:
    raise UserError(
        f"{path} is a pickle file, and opening one runs whatever code it holds:"
        " only safetensors files are read. Convert it where you trust it, with"
        " transformers: model.save_pretrained(folder)."
    )


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
  safetensors = _safetensors("safetensors")
  json_file.check_regular(path)
  try:
    with path.open("rb"):  # The package's own error does not say why.
      pass
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}.") from error
  try:
    handle = safetensors.safe_open(path, framework="numpy")
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise UserError(
        f"{path} ({path.stat().st_size} bytes) is no complete safetensors file:"
        f" {error}. Copy or download it again."
    ) from error
  return {
      name: StoredTensor(
          name, path, tuple(handle.get_slice(name).get_shape()), handle
      )
      for name in handle.keys()
  }


def _weight_map(path: Path) -> dict[str, str]:
  weight_map = json_file.read_object(path).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(
        f"{path} has no weight_map, which names each tensor's file."
    )
  for name, file in weight_map.items():
    if not isinstance(file, str) or Path(file).name != file:
      raise UserError(
          f"{path} says that tensor {name} is in {file!r}: no file of its own"
          " folder."
      )
    refuse_pickle(path.parent / file)
  return weight_map


def _no_weights(folder: Path) -> UserError:
  for path in sorted(folder.iterdir()):
    refuse_pickle(path)
  names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
  return UserError(
      f"{folder} has neither {SINGLE} nor {INDEX}; it has {names}."
  )


def _shards(
    shapes: Mapping[str, tuple[int, ...]],
    dtype_of: Mapping[str, np.dtype],
    max_shard_bytes: int,
) -> list[list[str]]:
  """Names of the tensors of each file."""
  shards: list[list[str]] = [[]]
  room = max_shard_bytes
  for name in shapes:
    size = _num_bytes(name, shapes, dtype_of)
    if size > room and shards[-1]:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(name)
    room -= size
  return shards


def _num_bytes(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtype_of: Mapping[str, np.dtype],
) -> int:
  return int(np.prod(shapes[name], dtype=np.int64)) * dtype_of[name].itemsize


def _safetensors(module: str) -> Any:
  import importlib  # Only whoever has a folder needs the package.

  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise UserError(
        "Model folders need the package safetensors: pip install"
        " 'scansnap-jax[hf]'."
    ) from error
