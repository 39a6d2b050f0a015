"""Outside of its own file and the list of names nobody knows a policy."""

import ast
import pathlib

from absl.testing import parameterized

from joma.systems import names as system_names
from joma.systems.cache_policies import names as policy_names

_ROOT = pathlib.Path(__file__).parent.parent
_LIST = "joma/systems/cache_policies/names.py"
# Words of ordinary English, and a unit: as strings they say other things
# elsewhere.
_ORDINARY = {"full", "window", "random", "nats"}
# Where names stand nevertheless, and why.
_MAY = {
    # The kernels' argument of that name.
    "joma/transformer/weighing/rule.py": {"sink_logits"},
    # The studies of those names.
    "launch/attention.py": {"act", "flux", "moh", "positional"},
}
# Where policies are asked which of its protocols they follow.
_CONTRACT, _PROTOCOLS = "joma/inference/cache/calls.py", "rules"
_NAMES = {
    *policy_names.POLICIES,
    *policy_names.WRAPPERS,
    *policy_names.MEASURED,
    *policy_names.FITTED,
    *system_names.SYSTEMS,
} - _ORDINARY
_CLASSES = {
    entry.partition(":")[2]
    for table in (
        policy_names.POLICIES,
        policy_names.WRAPPERS,
        policy_names.MEASURED,
        policy_names.FITTED,
    )
    for entry in table.values()
} - {
    "Random"
}  # A rule of contextual sparsity has that name too.


def named(source):
  """Names of systems among a program's strings, docstrings aside."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      word = node.value.partition(":")[0]
      found |= {word} & _NAMES
  return found


def asks_kinds(source, may=None):
  """Lines that ask what class a policy is, or which fields it has.

  Classes of the module `may` are protocols, which may be asked for.
  """
  found = []
  for node in ast.walk(ast.parse(source)):
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
      continue
    if node.func.id not in ("isinstance", "hasattr") or len(node.args) != 2:
      continue
    subject, kinds = map(ast.unparse, node.args)
    last = subject.rpartition(".")[2].rpartition("_")[2]
    classes = {name.id for name in ast.walk(node.args[1]) if _is_name(name)}
    classes |= {
        part.attr
        for part in ast.walk(node.args[1])
        if isinstance(part, ast.Attribute)
    }
    if may is not None and kinds.startswith(f"{may}."):
      continue
    if last.startswith("polic") or "polic" in subject or classes & _CLASSES:
      found.append(f"{node.lineno}: {node.func.id}({subject}, {kinds})")
  return found


def _is_name(node):
  return isinstance(node, ast.Name)


def _files():
  for package in ("joma", "launch"):
    for path in sorted((_ROOT / package).rglob("*.py")):
      relative = str(path.relative_to(_ROOT))
      # A study of a system names it.
      own = ("joma/systems/", "joma/studies/systems/")
      if relative != _LIST and not relative.startswith(own):
        yield relative, path.read_text()


class NamesTest(parameterized.TestCase):

  def test_nobody_names_a_policy(self):
    found = {path: named(source) for path, source in _files()}
    found = {path: words for path, words in found.items() if words}
    extra = {
        path: words - _MAY.get(path, set())
        for path, words in found.items()
        if words - _MAY.get(path, set())
    }
    self.assertEqual(extra, {})
    # What is allowed and no longer there is to be struck off.
    idle = {p: words - found.get(p, set()) for p, words in _MAY.items()}
    self.assertEqual({p: words for p, words in idle.items() if words}, {})

  def test_nobody_asks_a_policy_for_its_kind(self):
    found = {
        path: asked
        for path, source in _files()
        if (
            asked := asks_kinds(
                source, _PROTOCOLS if path == _CONTRACT else None
            )
        )
    }
    self.assertEqual(found, {})

  @parameterized.parameters(
      "hasattr(policy, 'seed')",
      "hasattr(policy_names.parse(name), 'seed')",
      "isinstance(self.base, (tova.TOVA, str))",
      "isinstance(cache.policy, quest.Quest)",
  )
  def test_such_questions_are_seen(self, source):
    self.assertLen(asks_kinds(source), 1)

  def test_protocols_are_asked_for_where_policies_are_called(self):
    question = "isinstance(policy, rules.Observes)"
    self.assertEmpty(asks_kinds(question, _PROTOCOLS))
    self.assertLen(asks_kinds(question), 1)
    self.assertLen(asks_kinds("isinstance(policy, h2o.H2O)", _PROTOCOLS), 1)

  def test_such_names_are_seen(self):
    self.assertEqual(named("x == 'h2o:score=ema'"), {"h2o"})
    self.assertEqual(named("x = 'full'"), set())


class TableTest(parameterized.TestCase):

  @parameterized.parameters(
      *policy_names.POLICIES, *policy_names.WRAPPERS, *policy_names.FITTED
  )
  def test_a_name_is_its_class_of_its_file(self, name):
    found = policy_names.load(name)
    self.assertIn(found.__name__, {*_CLASSES, "Random"})
    self.assertEqual(found.draws, "seed" in found.__dataclass_fields__)

  def test_a_policy_imports_no_other(self):
    # A wrapper of another policy by definition.
    composed = {"duo_attention.py": {"full"}}
    modules = {
        entry.partition(":")[0].rpartition(".")[2]
        for entry in policy_names.POLICIES.values()
    }
    folder = _ROOT / "joma/systems/cache_policies"
    for path in sorted(folder.glob("*/*.py")):
      found = {
          alias.name
          for node in ast.walk(ast.parse(path.read_text()))
          if isinstance(node, ast.ImportFrom)
          and "cache_policies" in (node.module or "")
          for alias in node.names
      }
      with self.subTest(path.name):
        self.assertEqual(found & modules, composed.get(path.name, set()))
