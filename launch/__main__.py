"""All scripts as one command: lists them, or starts one.

  scansnap
  scansnap train_lm --workdir=runs/lm
  scansnap train_lm --help

`scansnap NAME` is `python -m launch.NAME`, also in a folder that holds a
launch.py of its own.
"""

import ast
import difflib
import pathlib
import runpy
import sys

from launch.command import app
from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import interrupts
from scansnap_jax.experiment.processes import limits

_FOLDER = pathlib.Path(__file__).parent
_IS_RUN = "if __name__ == '__main__':"
_FORMER = "The former name"
_HELP = ("help", "-h", "-help", "--help", "--helpfull")


def scripts() -> dict[str, pathlib.Path]:
  """Returns the files that can be run, by what follows `python -m launch.`."""
  found = {}
  for path in sorted(_FOLDER.rglob("*.py")):
    parts = path.relative_to(_FOLDER).with_suffix("").parts
    name = ".".join(parts).removesuffix(".__main__")
    last = _tree_of(path).body[-1]
    if name != "__main__" and ast.unparse(last).startswith(_IS_RUN):
      found[name] = path
  return found


def summary_of(script: pathlib.Path) -> str:
  """Returns the first line of a script's docstring, without importing it."""
  return (ast.get_docstring(_tree_of(script)) or "").partition("\n")[0]


def _tree_of(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text(encoding="utf-8"))


def main() -> None:
  """Runs the script that the first argument names, and exits as it does."""
  interrupts.install()
  limits.settle()
  name = sys.argv[1] if sys.argv[1:] else _HELP[0]
  if name in scripts():
    del sys.argv[1]
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)
    return
  del sys.argv[1:]  # Neither has flags.
  show = _show if name in _HELP else lambda _: _refuse(name)
  app.run(show, keeps_compiled=False)


def _show(_: list[str]) -> None:
  print("scansnap SCRIPT --flag=value ..., where SCRIPT is one of:\n")
  summaries = {name: summary_of(path) for name, path in scripts().items()}
  for name, summary in summaries.items():
    if not summary.startswith(_FORMER):
      print(f"  {name:<20} {summary}")
  print("\nscansnap SCRIPT --help lists the flags of one.")


def _refuse(name: str) -> None:
  close = difflib.get_close_matches(name, scripts(), n=1)
  hint = f"did you mean {close[0]}?" if close else "scansnap lists them"
  raise errors.UserError(f"{name!r} is no script; {hint}")


if __name__ == "__main__":
  main()
