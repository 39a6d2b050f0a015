"""A finished run of `train_lm`, to the folder of a model.

The run's folder is read alone: its settings, the tokenizer that it learned, and
the parameters of a checkpoint, all of them checked.
"""

from collections.abc import Mapping
import hashlib
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.hf import config_json
from joma.transformer.hf import own_form
from joma.transformer.hf import pretrained
from joma.transformer.layers import scanning
from joma.transformer.text import tokenizer as tokenizer_lib
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import workdir as workdir_lib
from scansnap_jax.experiment.saved import leaves

_PARAMS = "['state'].params"


class Finished(NamedTuple):
  """What there is to know of a finished run.

  Attributes:
    config: The model's.
    tokenizer: That of its text.
    checkpoints: Folder of its steps.
    steps: Those that were kept, the last one of the run at the end.
  """

  config: configs.TransformerConfig
  tokenizer: tokenizer_lib.Tokenizer
  checkpoints: pathlib.Path
  steps: list[int]


class Exported(NamedTuple):
  """What was written.

  Attributes:
    step: Of the parameters.
    model_type: Of config.json; `joma` is the project's own form.
  """

  step: int
  model_type: str


def export(
    workdir: pathlib.Path, out: pathlib.Path, step: int | None = None
) -> Exported:
  """Writes a step of a finished run as the folder of a model, whole or not.

  Args:
    workdir: The run's.
    out: Becomes the folder, with those above it; it is absent, or an empty one.
    step: Whose checkpoint is taken; None is the last.

  Returns:
    What was written.

  Raises:
    UserError: `workdir` is no finished run of train_lm or damaged, has no such
      step, or `out` cannot be made.
  """
  run = read(workdir)
  step = run.steps[-1] if step is None else step
  if step not in run.steps:
    kept = ", ".join(map(str, run.steps))
    raise errors.UserError(
        f"{workdir} has no checkpoint of step={step}; it kept {kept}."
    )
  template = jax.eval_shape(lambda: _params(run.config))
  params = leaves.read(run.checkpoints, step, template, _PARAMS)
  workdir_lib.make_folder(out.parent)
  temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
  try:
    temporary.mkdir()
    family = _family(run.config)
    pretrained.save(temporary, run.config, params, family=family)
    tokenizer_lib.save(run.tokenizer, temporary, run.config.max_len)
    temporary.rename(out)  # Fails where somebody has filled it meanwhile.
  except OSError as error:
    raise errors.UserError(
        f"{out} cannot be written: {error.strerror}."
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return Exported(step, family)


def read(workdir: pathlib.Path) -> Finished:
  """Reads what a finished run left in its folder, but for its parameters.

  Raises:
    UserError: It is no run of train_lm, not finished, or damaged.
  """
  path = workdir / "config.json"
  settings = json_file.read_object(path).get("lm")
  if not isinstance(settings, dict) or "model" not in settings:
    raise errors.UserError(f"{path} is not that of a run of train_lm.")
  checkpoints = workdir / "checkpoints" / "lm"
  steps = leaves.steps(checkpoints)
  if not (workdir / "summary.json").exists():
    at = f"it is at step {steps[-1]}" if steps else "it has no checkpoint"
    raise errors.UserError(
        f"The run in {workdir} is not finished: {at}. The command that began"
        " it continues it."
    )
  summary = json_file.read_object(workdir / "summary.json")
  try:
    last, facts = int(summary["steps"][-1]), dict(summary["corpus_facts"])
    config = own_form.from_fields(dict(settings["model"]))
    tokenizer = _tokenizer(workdir, settings, facts)
  except (KeyError, IndexError, TypeError, ValueError) as error:
    if isinstance(error, errors.UserError):
      raise
    raise errors.UserError(
        f"config.json or summary.json of {workdir} is damaged: no {error}."
    ) from error
  if last not in steps:
    raise errors.UserError(
        f"{checkpoints} lacks step {last}, the last of the run: the command"
        " that began it writes it anew."
    )
  steps = steps[: steps.index(last) + 1]
  return Finished(config, tokenizer, checkpoints, steps)


def _params(config: configs.TransformerConfig) -> PyTree:
  one_by_one = scanning.unrolled(config)
  # Attention has no parameters: what computes it does not matter here.
  model = models.Transformer(one_by_one, implementation="reference")
  tokens = jnp.zeros((1, 2), jnp.int32)
  params: PyTree = model.init(jax.random.key(0), tokens)["params"]
  return scanning.stack(params) if config.scan_layers else params


def _family(config: configs.TransformerConfig) -> str:
  try:
    return config_json.family_of(scanning.unrolled(config))
  except errors.UserError:
    return own_form.MODEL_TYPE


def _tokenizer(
    workdir: pathlib.Path, settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> tokenizer_lib.Tokenizer:
  """Finds the tokenizer that the run recorded the sha256 of."""
  kind, digest = settings["tokenizer"], facts["tokenizer_sha256"]
  if kind == "bytes":
    found = [tokenizer_lib.Bytes()]
  elif kind in tokenizer_lib.KINDS:
    paths = sorted((workdir / "corpus").glob(f"{kind}-*.json"))
    texts = map(json_file.read_text, paths)
    found = [tokenizer_lib.from_json(text) for text in texts]
  else:
    found = [tokenizer_lib.from_folder(kind)]
  for tokenizer in found:
    content = tokenizer.to_json().encode()
    if hashlib.sha256(content).hexdigest() == digest:
      return tokenizer
  where = workdir / "corpus" if kind in tokenizer_lib.KINDS else kind
  raise errors.UserError(
      f"The tokenizer of the run in {workdir}, tokenizer={kind} of sha256"
      f" {str(digest)[:12]}, is not in {where} any more."
  )
