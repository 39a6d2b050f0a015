"""Workdirs that were damaged are resumed rightly, or refused by name.

  python -m pytest tests/faults/damage_test.py -m slow -s

does 256 damages and prints what came of each kind.
"""

import pathlib
import shutil

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from tests.faults import attacks
from tests.faults import damages
from tests.faults import workdirs

_SEED = 20
# Of each kind, by loop; every third is done to a run that was stopped, the
# others to finished ones, which train again where a step is lost.
_ROUNDS = dict(zip(workdirs.NAMES, (6, 3, 4, 3), strict=True))


class DamagerTest(parameterized.TestCase):
  """The damages themselves, of a folder that looks like a run's."""

  def _folder(self, name):
    folder = pathlib.Path(self.create_tempdir().full_path) / name
    for path, text in _LIKE_A_RUN.items():
      (folder / path).parent.mkdir(parents=True, exist_ok=True)
      (folder / path).write_text(text)
    return folder

  @parameterized.parameters(*damages.KINDS)
  def test_a_seed_is_a_damage(self, kind):
    undamaged = _tree(self._folder("same"))
    seen = set()
    for seed in range(3):
      trees, paths = [], []
      for name in ("a", "b"):
        folder = self._folder(f"{name}{seed}")
        touched = damages.Damager(folder, [seed]).draw(kind)
        paths.append([p.name for p in touched])
        trees.append(_tree(folder))
      self.assertEqual(trees[0], trees[1])
      self.assertEqual(paths[0], paths[1])
      seen.add(trees[0] == undamaged)
    self.assertIn(False, seen)


class DamageTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.zygote = self.enterContext(attacks.Zygote())
    self.tally = attacks.Tally()

  def _damage(self, loop, kind, number):
    """Damages a copy and lets the same command go on with it."""
    folder = self.folder / "damaged"
    source = loop.finished if number % 3 else loop.stopped
    shutil.copytree(source, folder, symlinks=True)
    seed = [_SEED, workdirs.NAMES.index(loop.name), number]
    seed += [[*damages.KINDS].index(kind)]
    touched = damages.Damager(folder, seed).draw(kind)
    module, *argv = loop.command()
    ended = self.zygote.attack(module, *argv, cwd=folder, hooks=["undrawn"])
    outcome = ended.outcome
    end = workdirs.end_of(folder / "run")
    if outcome == attacks.RIGHT and end != loop.end:
      outcome = attacks.SILENT
    if outcome == attacks.CLEAR and not attacks.says_one_of(
        ended.last_line, _names(touched, folder)
    ):
      outcome = attacks.SILENT
    name = f"{loop.name}: {[str(p) for p in touched]}, seed {seed}"
    self.tally.add(kind, name, ended, outcome)
    shutil.rmtree(folder)

  @pytest.mark.slow
  @pytest.mark.timeout(3600)
  def test_256_damages(self):
    for name, rounds in _ROUNDS.items():
      root = self.folder / name.replace(" ", "_")
      loop = workdirs.make(name, root, self.zygote)
      for kind in damages.KINDS:
        for number in range(rounds):
          self._damage(loop, kind, number)
    wrong = attacks.report(self.tally, "Damaged workdirs")
    self.assertEmpty(wrong, wrong)
    self.assertGreaterEqual(self.tally.tries, 250)


_LIKE_A_RUN = {
    "inputs/text.txt": "to be, that is the question",
    "run/config.json": '{"lm": {"lr": 1}}',
    "run/inputs.json": '{"text.txt": "abc"}',
    "run/metrics.jsonl": '{"step": 2}\n{"step": 4}\n',
    "run/.lock": "",
    "run/corpus/train-1.npy": "ids",
    "run/corpus/train-1.npy.crc32": "1",
    "run/checkpoints/lm/2/digest/metadata": '{"body": {"step": 2}}',
    "run/checkpoints/lm/2/arrays/d/0": "two",
    "run/checkpoints/lm/4/digest/metadata": '{"body": {"step": 4}}',
    "run/checkpoints/lm/4/arrays/d/0": "four",
}


def _tree(folder):
  """All that is there, by path: targets of links, contents of files."""
  found = {}
  for path in sorted(folder.rglob("*")):
    name = str(path.relative_to(folder))
    if path.is_symlink():
      found[name] = str(path.readlink())
    else:
      found[name] = path.read_bytes() if path.is_file() else path.is_fifo()
  return found


def _names(touched, folder):
  """What a refusal may say: the path's last part, or a folder of the run."""
  found = []
  for path in touched:
    found.append(path.name)
    if path.name == "config.json":  # Each of them is named behind it.
      found.append("holds a run with other settings: ")
    if path.is_relative_to(folder):
      inside = path.relative_to(folder).parts
      found += [str(pathlib.Path(*inside[:n])) for n in range(2, len(inside))]
      found += [str(path)]
  return found


if __name__ == "__main__":
  absltest.main()
