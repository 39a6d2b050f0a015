"""The parts of `inspect_lm`: find models, read texts, measure."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import glob
import itertools
import os
import pathlib
import re
from typing import Any

from absl import logging
import jax
from jaxtyping import Int
import numpy as np

from joma.systems.probes import names as probe_names
from joma.systems.probes import update_rank
from joma.transformer import config as configs
from joma.transformer import inspection
from joma.transformer import inspection_config
from joma.transformer import layer_hooks
from joma.transformer import probes
from joma.transformer.hf import hub
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import npz_file
from scansnap_jax.experiment import progress

InspectionConfig = inspection_config.InspectionConfig

_TEXT_WINDOW = 512


def find_models(values: list[str]) -> list[pathlib.Path]:
  """Returns the folders that --model names, patterns in the order of numbers.

  Args:
    values: Each a folder, a pattern, or several with commas between.

  Raises:
    UserError: A pattern fits nothing.
  """
  folders = []
  for value in itertools.chain.from_iterable(
      map(json_file.split_paths, values)
  ):
    found, path = [value], json_file.local_path(value)
    if glob.has_magic(value) and not path.exists():
      found = sorted(glob.glob(_pattern(path)), key=_numbers_by_value)
      if not found:
        raise errors.UserError(f"model={value} fits no folder.")
    folders += [json_file.local_path(name) for name in found]
  return folders


def _pattern(path: pathlib.Path) -> str:
  """A pattern for glob; folders that are there are meant as they are."""
  there = [p for p in path.parents if p.exists()]
  if not there:
    return str(path)
  return os.path.join(glob.escape(str(there[0])), path.relative_to(there[0]))


def _numbers_by_value(name: str) -> list[tuple[int, int, str]]:
  parts = re.split(r"(\d+)", name)
  return [(1, int(p), "") if p.isdecimal() else (0, 0, p) for p in parts]


def read_all(
    folders: list[pathlib.Path], config: InspectionConfig
) -> list[Int[np.ndarray, "B T"]]:
  """Reads what each model is to be measured on, and checks that it can be.

  Raises:
    UserError: A file or folder is missing or none of its kind, a text is empty,
      a token is none of a model's, logits are wanted of several models, or
      what changes between models of one.
  """
  if probe_names.OF_UPDATES in config.probes and len(folders) < 2:
    raise errors.UserError(
        f"{probe_names.OF_UPDATES} compares models with the first one: give"
        " --model several, or leave it out of probes."
    )
  if config.logits_out is not None and len(folders) > 1:
    raise errors.UserError(
        f"logits_out holds the logits of one model, got {len(folders)}."
    )
  found = []
  for folder in folders:
    model = _laid_over(folder, pretrained.read_config(folder), config)
    if config.ids is not None:
      ids = read_ids(config.ids)
    else:
      ids = _read_text(str(config.text), folder, folders[0])
    try:
      inspection.check_ids(ids, model)
    except errors.UserError as error:
      raise errors.UserError(f"{folder}: {error}") from error
    found.append(ids)
  return found


def read_ids(path: str) -> Int[np.ndarray, "B T"]:
  """Reads the array ids of a file .npz.

  Raises:
    UserError: There is no such file or array, or it is no [B, T] of ints.
  """
  try:
    found = npz_file.read(json_file.local_path(path))
  except errors.UserError as error:
    raise errors.UserError(f"ids={error}") from error
  if "ids" not in found:
    raise errors.UserError(
        f"ids={path} has no array ids; it has {', '.join(found) or 'none'}."
    )
  ids = found["ids"]
  if ids.ndim != 2 or ids.dtype.kind not in "iu":
    raise errors.UserError(
        f"ids={path}: ids must be whole numbers [B, T], got {ids.dtype}"
        f" {list(ids.shape)}."
    )
  return ids


def _read_text(
    path: str, folder: pathlib.Path, first: pathlib.Path
) -> Int[np.ndarray, "B T"]:
  try:
    text = json_file.read_text(json_file.local_path(path))
  except errors.UserError as error:
    raise errors.UserError(f"text={error}") from error
  if not text.strip():
    raise errors.UserError(f"text={path} is empty.")
  has_own = tokenizer.is_in(hub.folder(folder))
  return tokenizer.from_folder(folder if has_own else first).encode(text)[None]


def measure_each(
    folders: Sequence[pathlib.Path],
    texts: Sequence[Int[np.ndarray, "B T"]],
    config: InspectionConfig,
) -> list[dict[str, Any]]:
  """Measures models one after the other; one that fails costs no other.

  Args:
    folders: Of the models.
    texts: What each reads.
    config: Settings.

  Returns:
    What `measure` gives of each; of one that fails `name`, `folder` and
    `failed`, the reason.

  Raises:
    UserError: All of them fail.
  """
  found, first = [], None
  for folder, ids in zip(folders, texts, strict=True):
    try:
      found.append(measure(folder, ids, config, folders[0]))
    except (errors.UserError, MemoryError) as error:
      first = first or error
      name = folder.resolve().name
      logging.warning("%s failed: %s", folder, error)
      found.append({"name": name, "folder": str(folder), "failed": str(error)})
  if first is not None and all("failed" in model for model in found):
    raise first
  return found


def measure(
    folder: pathlib.Path,
    ids: Int[np.ndarray, "B T"],
    config: InspectionConfig,
    first: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Measures one model, and writes its logits if they are wanted.

  Args:
    folder: Of the model.
    ids: What it reads.
    config: Settings.
    first: Folder of the model that updates are counted from; None is this one.

  Returns:
    `name`, `folder`, `window`, and what `inspection.measure` gives.

  Raises:
    UserError: The folder cannot be read, or what is measured of the model is
      NaN or infinite.
  """
  model, params = pretrained.load(folder)
  model = _laid_over(folder, model, config)
  ids, window = fit(ids, model, config)
  num_windows = len(inspection.cut(ids.shape, window))
  shape = (*ids.shape, model.vocab_size)
  with (
      _logits_file(config.logits_out, shape) as write_logits,
      progress.bar(
          folder.name, total=num_windows, unit="tokens", per_step=window
      ) as on_progress,
  ):
    found = inspection.measure(
        model,
        params,
        ids,
        window,
        names=tuple(
            name for name in config.probes if name != probe_names.OF_UPDATES
        ),
        write_logits=write_logits,
        on_progress=on_progress,
    )
  _check_finite(folder, model, found)
  if probe_names.OF_UPDATES in config.probes:
    found["probes"] |= _updates(folder, params, first or folder)
  return {
      "name": folder.resolve().name,
      "folder": str(folder),
      "window": window,
      **found,
  }


def _updates(
    folder: pathlib.Path, params: Mapping[str, Any], first: pathlib.Path
) -> dict[str, Any]:
  """How many directions of each matrix differ from those of the first model.

  Raises:
    UserError: The models have unlike shapes.
  """
  _, start = pretrained.load(first)
  try:
    return update_rank.of_params(params, start)
  except (KeyError, ValueError) as error:
    raise errors.UserError(
        f"{folder} has other matrices than {first}, which update_rank compares"
        " it with: give models of one shape."
    ) from error


def _check_finite(
    folder: pathlib.Path,
    model: configs.TransformerConfig,
    found: Mapping[str, Any],
) -> None:
  """Raises UserError if a measure is NaN or infinite, and names it.

  Layers whose systems have no attention weights have none to measure.
  """
  has_none = ~probes.has_weights(model)
  of_weights = (*probes.Attention._fields, "sink_rate", "probes")
  for path, values in jax.tree_util.tree_leaves_with_path(dict(found)):
    is_good = np.isfinite(np.asarray(values, np.float64))
    if path[0].key in of_weights:
      is_good[has_none] = True
    if not is_good.all():
      place = np.argwhere(~is_good)[0].tolist()
      name = " ".join(str(key.key) for key in path).replace("_", " ")
      raise errors.UserError(
          f"{folder}: {name}{f' at {place}' if place else ''} is NaN or"
          " infinite: the model's weights or activations are too large for"
          " float32."
      )


def _laid_over(
    folder: pathlib.Path,
    model: configs.TransformerConfig,
    config: InspectionConfig,
) -> configs.TransformerConfig:
  try:
    return layer_hooks.over(model, config.attention)
  except errors.UserError as error:
    raise errors.UserError(f"{folder}: {error}") from error


def fit(
    ids: Int[np.ndarray, "B T"],
    model: configs.TransformerConfig,
    config: InspectionConfig,
) -> tuple[Int[np.ndarray, "B R"], int]:
  """Returns what is read of a text, and how many tokens at once; says both."""
  num_tokens, is_text = ids.shape[1], config.ids is None
  window = config.window or (_TEXT_WINDOW if is_text else num_tokens)
  if model.positions == "learned" or (is_text and config.window is None):
    window = min(window, model.max_len)
  if is_text and 0 < window * config.max_windows < num_tokens:
    ids = ids[:, : window * config.max_windows]
    logging.info(
        "%d of %d tokens are read (max_windows=%d)",
        ids.shape[1],
        num_tokens,
        config.max_windows,
    )
  if window < ids.shape[1]:
    logging.info(
        "%d tokens are cut into windows of %d, each read from position 0; the"
        " model was made for %d positions",
        ids.shape[1],
        window,
        model.max_len,
    )
  return ids, min(window, ids.shape[1])


@contextlib.contextmanager
def _logits_file(
    name: str | None, shape: tuple[int, int, int]
) -> Iterator[inspection.WriteLogits | None]:
  """Yields what writes logits to a file, which is there when all are."""
  if name is None:
    yield None
    return
  path = json_file.local_path(name)
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    logits = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
  except OSError as error:
    raise errors.UserError(
        f"logits_out={path} cannot be written: {error.strerror}"
    ) from error

  def write(row: int, start: int, values: np.ndarray) -> None:
    logits[row, start : start + len(values)] = values

  try:
    yield write
    logits.flush()
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
