"""The arrows between packages, and what importing them must not do."""

import ast
import collections
import functools
import pathlib
import re
import subprocess
import sys
import tomllib

from absl.testing import absltest
from absl.testing import parameterized

_ROOT = pathlib.Path(__file__).parent.parent
_PACKAGES = ("scansnap_jax", "joma", "kernels_pallas", "launch", "tests")
# Which of our packages each one may import, itself aside.
_ARROWS = {
    "scansnap_jax": set(),
    "joma": {"scansnap_jax"},
    "joma/transformer": {"scansnap_jax", "kernels_pallas"},
    "joma/systems": {"scansnap_jax", "kernels_pallas"},
    "joma/studies/systems": {"scansnap_jax", "kernels_pallas"},
    "joma/inference": {"scansnap_jax", "kernels_pallas"},
    "joma/scale": {"scansnap_jax", "kernels_pallas"},
    "kernels_pallas": set(),
    "launch": {"scansnap_jax", "joma", "kernels_pallas"},
    "tests": {"scansnap_jax", "joma", "kernels_pallas", "launch"},
}
# Third-party packages with one home: (where they may be imported).
_HOMES = {
    "orbax": (
        "scansnap_jax/experiment/checkpoint.py",
        "scansnap_jax/experiment/saved/",
        "tests/",
    ),
    "matplotlib": (
        "scansnap_jax/experiment/figures.py",
        "scansnap_jax/experiment/figure_data.py",
        "scansnap_jax/experiment/venues/",
        "scansnap_jax/figures/",
        "joma/studies/",
        *(
            f"joma/{room}.py"
            for room in (
                "inference/bridge/drawing",
                "inference/evaluation/drawing",
                "inference/evaluation/protocols/drawing",
                "inference/sparsity/study/method_report",
                "inference/sparsity/study/report",
                "transformer/checkpoints/drawing",
                "transformer/rope/extension_report",
                "transformer/training/drawing",
            )
        ),
        "tests/",
    ),
    "absl.flags": ("launch/", "tests/"),
    "lm_eval": ("joma/inference/harness/lm_eval_model.py", "tests/"),
    "torch": ("launch/bench/", "tests/"),
}
_KERNEL_IMPORTS = {"jax", "jaxtyping", "numpy", *sys.stdlib_module_names}


def _files():
  return sorted(
      path for package in _PACKAGES for path in (_ROOT / package).rglob("*.py")
  )


@functools.cache
def _imports(path):
  """The dotted names that a file imports, anywhere in it."""
  found = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found += (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"relative import in {path}"
      found += (f"{node.module}.{alias.name}" for alias in node.names)
  return found


def _is_module(name):
  return (_ROOT / (name.replace(".", "/") + ".py")).exists()


def _owner(name):
  return max((a for a in _ARROWS if name.startswith(a)), key=len)


def violations(path, imports):
  """Lists the imports that a file of this relative path may not have."""
  owner = _owner(path)
  allowed = _ARROWS[owner] | {owner.split("/")[0]}
  found = []
  for name in imports:
    top = name.split(".")[0]
    if top in _PACKAGES and top not in allowed:
      found.append(f"{path}: {name} (may import {sorted(allowed)})")
    if owner == "kernels_pallas" and top not in _KERNEL_IMPORTS | {owner}:
      found.append(f"{path}: {name} (kernels import jax and numpy alone)")
    for package, homes in _HOMES.items():
      is_it = name == package or name.startswith(package + ".")
      if is_it and not path.startswith(homes):
        found.append(f"{path}: {name} (belongs in {homes})")
  return found


class DependencyTest(parameterized.TestCase):

  def test_every_import_follows_the_arrows(self):
    files = _files()
    self.assertGreater(len(files), 20)
    found = []
    for path in files:
      found += violations(path.relative_to(_ROOT).as_posix(), _imports(path))
    self.assertEmpty(found, "\n".join(found))

  @parameterized.parameters(
      ("scansnap_jax/x.py", "joma.block.model"),
      ("joma/x.py", "kernels_pallas.masks"),
      ("joma/x.py", "launch.command.app"),
      ("kernels_pallas/x.py", "scansnap_jax.model"),
      ("kernels_pallas/x.py", "flax.linen"),
      ("scansnap_jax/train.py", "orbax.checkpoint"),
      ("scansnap_jax/train.py", "matplotlib.pyplot"),
      ("scansnap_jax/train.py", "absl.flags"),
      ("joma/x.py", "torch"),
  )
  def test_a_forbidden_import_is_seen(self, path, name):
    self.assertNotEmpty(violations(path, [name]))

  def test_what_is_imported_is_declared_and_what_is_declared_is_imported(self):
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    names = project["tool"]["deptry"]["package_module_name_map"]
    named = lambda requirements: {
        names.get(name, name)
        for name in (re.split(r"[\[<>=; ]", text)[0] for text in requirements)
    }
    extras = dict(project["project"]["optional-dependencies"])
    for extra in ("docs", "lint", "test"):  # The product imports none of them.
      del extras[extra]
    needed = named(project["project"]["dependencies"])
    ours = [p for p in _files() if p.relative_to(_ROOT).parts[0] != "tests"]
    imported = {n.split(".")[0] for path in ours for n in _imports(path)}
    self.assertEmpty(needed - imported)
    declared = needed | named(sum(extras.values(), []))
    known = declared | {*_PACKAGES, "jaxlib", *sys.stdlib_module_names}
    # Of types alone, and with Python.
    self.assertEmpty(imported - known - {"typing_extensions"})

  def test_no_import_cycles(self):
    graph = {}
    for path in _files():
      module = ".".join(path.relative_to(_ROOT).with_suffix("").parts)
      graph[module] = {
          name if _is_module(name) else name.rpartition(".")[0]
          for name in _imports(path)
          if name.split(".")[0] in _PACKAGES
      }
    done, active = set(), []

    def visit(module):
      self.assertNotIn(module, active, f"cycle: {[*active, module]}")
      if module in done:
        return
      active.append(module)
      for other in graph.get(module, ()):
        visit(other)
      done.add(active.pop())

    for module in graph:
      visit(module)

  def test_no_folder_is_crowded(self):
    folders = collections.Counter(
        path.parent for path in _files() if path.name != "__init__.py"
    )
    crowded = {f"{p}": n for p, n in folders.items() if n > 14}
    self.assertEmpty(crowded, "make a room of files that belong together")

  def test_package_inits_hold_a_docstring_alone(self):
    for path in _files():
      if path.name == "__init__.py":
        body = ast.parse(path.read_text()).body
        if path.parent.parent == _ROOT and path.parent.name != "tests":
          # The version; and launch guards scripts' imports, too.
          self.assertIn("attribute as __getattr__", path.read_text())
          body = body[:1] if path.parent.name == "launch" else body[:-1]
        self.assertLen(body, 1, path)
        self.assertIsInstance(body[0], ast.Expr)

  def test_imports_define_no_flag_touch_no_device_and_set_no_config(self):
    modules = [
        ".".join(path.relative_to(_ROOT).with_suffix("").parts)
        for path in _files()
        if path.relative_to(_ROOT).parts[0] not in ("tests", "launch")
        and path.name != "__init__.py"
        # Imports an extra, which it is for.
        and path.name != "lm_eval_model.py"
    ]
    code = f"""
import importlib, jax
from absl import flags
import orbax.checkpoint, chex, optax, flax.linen  # Have flags of their own.
before = set(flags.FLAGS), dict(jax.config.values)
for module in {modules}:
  importlib.import_module(module)
assert set(flags.FLAGS) == before[0], set(flags.FLAGS) - before[0]
assert jax.config.values == before[1]
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_ROOT)


if __name__ == "__main__":
  absltest.main()
