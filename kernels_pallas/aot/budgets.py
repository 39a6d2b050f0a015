"""What each kernel may cost: figures that must not rise unseen.

Schedules change with the compiler, so budgets.json keeps them by its version:
{"libtpu 0.0.48": {case: {chip: {figure: value}}}}, where case names a kernel
and its configuration, and releases of corrections, 0.0.48.1, count as one with
what they correct. `python -m launch.bench.kernels --update_budgets` writes
them. Figures are bundles, spills, temp_bytes, or any other of
which less is better.
"""

from collections.abc import Mapping
import importlib.metadata
import json
import pathlib

PATH: pathlib.Path = pathlib.Path(__file__).parent / "budgets.json"
# These are exact: any rise is one too many.
_EXACT = ("temp_bytes",)
_PACKAGES = {"tpu": "libtpu", "cuda": "jax-cuda13-pjrt"}

# Figures by kernel configuration and chip.
Budgets = dict[str, dict[str, dict[str, int]]]


def compiler(platform: str) -> str:
  """Name and version, to three numbers, of what compiles here.

  Args:
    platform: "tpu" or "cuda".

  Raises:
    importlib.metadata.PackageNotFoundError: If nothing does.
  """
  package = _PACKAGES[platform]
  numbers = importlib.metadata.version(package).split(".")
  return f"{package} {'.'.join(numbers[:3])}"


def load(version: str, path: pathlib.Path = PATH) -> tuple[Budgets, str]:
  """Reads the budgets that a compiler made.

  Args:
    version: The compiler, as `compiler` names it.
    path: The file.

  Returns:
    The budgets and ""; or none and a sentence that says whose there are.
  """
  stored = json.loads(path.read_text())
  if version in stored:
    return stored[version], ""
  known = ", ".join(sorted(stored)) or "no compiler"
  return {}, f"no budgets of {version}, only of {known}: nothing compared"


def check(
    measured: Mapping[str, int],
    budget: Mapping[str, int],
    tolerance: float = 0.05,
) -> list[str]:
  """Says which figures rose: bytes at all, others by more than `tolerance`.

  A figure without a budget is not judged; a budget without a figure is missed.
  """
  complaints = []
  for name, allowed in budget.items():
    value = measured.get(name)
    limit = allowed if name in _EXACT else allowed * (1 + tolerance)
    if value is None:
      complaints.append(f"{name} has a budget of {allowed}: not measured")
    elif value > limit:
      complaints.append(f"{name} rose from {allowed} to {value}")
  return complaints


def update(measured: Budgets, version: str, path: pathlib.Path = PATH) -> None:
  """Writes the figures of these cases as a compiler's; the rest stays."""
  stored = json.loads(path.read_text()) if path.exists() else {}
  cases = stored.setdefault(version, {})
  for case, by_chip in measured.items():
    cases[case] = cases.get(case, {}) | by_chip
  path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
