"""Workdirs of the three training loops, half done and done, to be damaged.

A run is stopped twice by the product's own stop, at steps 2 and 4 of 6, and
copied; then it is finished and copied again. What is `right` afterwards is the
end of that undisturbed run: every leaf's checksum of the last checkpoint, which
covers parameters, optimizer, keys and recorded history, and the summary.
"""

import json
import pathlib
import shutil
from typing import Any, NamedTuple

from joma.transformer.text import tokenizer as tokenizers
from tests.faults import attacks
from tests.faults import scripts

STEPS = ("--num_steps=6", "--log_every=2", "--checkpoint_every=2")
_TABLE1_STEPS = tuple(s.replace("--", "--table1.") for s in STEPS)
_LM = (
    *(*scripts.TRAIN_LM, *STEPS, "--eval_every=2", "--map_steps=0,4"),
    *("--corpus=inputs/text.txt", "--model.vocab_size=300"),
)
_RUNS = {
    "scansnap": (
        "launch.scansnap",
        *(*scripts.SCANSNAP, *STEPS, "--num_cpu_devices=1"),
        "--data.classes_file=inputs/classes.npz",
    ),
    "joma": (
        "launch.joma",
        *(*scripts.TABLE1, *_TABLE1_STEPS, "--num_cpu_devices=1"),
    ),
    "train_lm": (
        *("launch.train_lm", *_LM, "--tokenizer=bpe", "--bpe_vocab_size=270"),
    ),
    "train_lm, tokenizer of a folder": (
        *("launch.train_lm", *_LM, "--tokenizer=inputs/tokenizer"),
    ),
}
NAMES = tuple(_RUNS)
# Summaries say these of the machine, not of the run.
_TIMES = ("tokens_per_sec", "seconds", "wall_s", "facts")


class End(NamedTuple):
  """What a run came to.

  Attributes:
    leaves: Names and checksums of the last checkpoint, by its folder.
    summary: What summary.json says, times aside.
  """

  leaves: dict[str, Any]
  summary: Any


class Loop(NamedTuple):
  """A training run with its inputs, at two moments.

  Attributes:
    name: Of `NAMES`.
    stopped: Folder with `inputs` and, saved at steps 2 and 4, `run`.
    finished: The same with the whole run.
    end: What is right.
  """

  name: str
  stopped: pathlib.Path
  finished: pathlib.Path
  end: End

  def command(self) -> list[str]:
    """Module and flags; it goes on with `run` of the folder it runs in."""
    return [*_RUNS[self.name], "--workdir=run"]


def make(name: str, root: pathlib.Path, zygote: attacks.Zygote) -> Loop:
  """Runs a loop to its end, and keeps what it was like on the way."""
  loop = Loop(name, root / "stopped", root / "finished", End({}, None))
  _make_inputs(loop.stopped / "inputs")
  for _ in range(2):
    _go_on(loop, loop.stopped, zygote, ["undrawn", "stops"], 143)
  shutil.copytree(loop.stopped, loop.finished, symlinks=True)
  _go_on(loop, loop.finished, zygote, ["undrawn"], 0)
  return loop._replace(end=end_of(loop.finished / "run"))


def _go_on(loop, cwd, zygote, hooks, status) -> None:
  module, *argv = loop.command()
  ended = zygote.attack(module, *argv, cwd=cwd, hooks=hooks)
  if ended.status != status:
    raise RuntimeError(f"{loop.name}: {ended}")


def _make_inputs(folder: pathlib.Path) -> None:
  folder.mkdir(parents=True)
  (folder / "text.txt").write_text(scripts.TEXT)
  scripts.save_classes(folder / "classes.npz")
  (folder / "tokenizer").mkdir()
  learned = tokenizers.learn_bpe([scripts.TEXT], 280)
  tokenizers.save(learned, folder / "tokenizer")


def end_of(workdir: pathlib.Path, last: int = 6) -> End | None:
  """Reads what a run of `last` steps came to; None without a whole end."""
  try:
    leaves = {
        str(path.relative_to(workdir)): json.loads(path.read_text())["body"][
            "leaves"
        ]
        for path in sorted(
            workdir.glob(f"checkpoints/**/{last}/digest/metadata")
        )
    }
    summary = json.loads((workdir / "summary.json").read_text())
  except (OSError, ValueError, KeyError):
    return None
  return End(leaves, _timeless(summary)) if leaves else None


def _timeless(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _timeless(v) for k, v in value.items() if k not in _TIMES}
  return [*map(_timeless, value)] if isinstance(value, list) else value
