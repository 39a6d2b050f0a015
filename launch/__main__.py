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

_FOLDER = pathlib.Path(__file__).parent
_HELP = ("help", "-h", "-help", "--help", "--helpfull")


def scripts() -> dict[str, pathlib.Path]:
  """Returns the scripts by name: modules, and packages with a `__main__`."""
  modules = {path.stem: path for path in _FOLDER.glob("[a-z]*.py")}
  packages = {path.parent.name: path for path in _FOLDER.glob("*/__main__.py")}
  return dict(sorted((modules | packages).items()))


def summary_of(script: pathlib.Path) -> str:
  """Returns the first line of a script's docstring, without importing it."""
  told = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
  return (told or "").partition("\n")[0]


def main() -> None:
  """Runs the script that the first argument names, and exits as it does."""
  interrupts.install()
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
  for name, path in scripts().items():
    print(f"  {name:<20} {summary_of(path)}")
  print("\nscansnap SCRIPT --help lists the flags of one.")


def _refuse(name: str) -> None:
  close = difflib.get_close_matches(name, scripts(), n=1)
  hint = f"did you mean {close[0]}?" if close else "scansnap lists them"
  raise errors.UserError(f"{name!r} is no script; {hint}")


if __name__ == "__main__":
  main()
