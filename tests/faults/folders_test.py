"""Hostile model folders: read rightly, or refused in one line.

  python -m pytest tests/faults/folders_test.py -m slow -s

makes 308 folders and gives each to a script that reads models.
"""

import pathlib
import shutil

from absl.testing import absltest
import numpy as np
import pytest

from tests.faults import attacks
from tests.faults.hostile import folders

_SEED = 300
_EACH = 28
_CPU_S = 60
_MEMORY = 2 * 2**30
_SCRIPTS = (
    ("launch.generate", "--prompt=to be", "--max_new_tokens=2"),
    ("launch.generate", "--prompt=to be", "--max_new_tokens=2"),
    ("launch.inspect_lm", "--text=text.txt", "--window=8"),
    (
        *("launch.evaluate_cache", "--tasks=perplexity", "--length=8"),
        *("--corpus=text.txt", "--batch_size=1", "--num_seeds=2"),
        *("--policies=h2o", "--budgets=0.5", "--workdir=run"),
    ),
    ("launch.generate", "--prompt=to be", "--max_new_tokens=2"),
    ("launch.cost_table", "--lengths=8", "--batch_sizes=1"),
)


class SpoilerTest(absltest.TestCase):

  @pytest.mark.slow
  def test_every_kind_makes_another_folder(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    folders.make("llama", root / "good")
    good = _contents(root / "good")
    for kind in folders.KINDS:
      seen = []
      for seed in range(9):
        folder = root / "bad"
        shutil.copytree(root / "good", folder)
        random = np.random.default_rng(seed)
        self.assertNotEmpty(folders.Spoiler(folder, random).spoil(kind))
        seen.append(_contents(folder))
        _remove(folder)
      self.assertTrue(any(contents != good for contents in seen), kind)


class FoldersTest(absltest.TestCase):

  @pytest.mark.slow
  @pytest.mark.timeout(3600)
  def test_308_folders(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    (root / "text.txt").write_text("to be or not to be that is\n" * 20)
    for family in folders.FAMILIES:
      folders.make(family, root / family)
    tally = attacks.Tally()
    with attacks.Zygote() as zygote:
      for place, kind in enumerate(folders.KINDS):
        for number in range(_EACH):
          random = np.random.default_rng([_SEED, place, number])
          _attack(root, kind, number, random, zygote, tally)
    wrong = attacks.report(tally, "Hostile folders")
    self.assertEmpty(wrong, wrong)
    self.assertLess(tally.memory, _MEMORY)


def _attack(root, kind, number, random, zygote, tally):
  family = folders.FAMILIES[number % len(folders.FAMILIES)]
  folder = root / "hostile"
  shutil.copytree(root / family, folder)
  what = folders.Spoiler(folder, random).spoil(kind)
  module, *argv = _SCRIPTS[int(random.integers(len(_SCRIPTS)))]
  ended = zygote.attack(
      module,
      *argv,
      "--model=hostile",
      cwd=root,
      cpu_s=_CPU_S,
      hooks=["undrawn"],
  )
  name = f"{module}, {family}: {what}"
  tally.add(kind, name, ended, _outcome(ended))
  for path in (folder, root / "run"):
    _remove(path)


def _remove(path):
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _contents(folder):
  files = folder.rglob("*") if folder.is_dir() else ()
  return {p.name: p.read_bytes() if p.is_file() else None for p in files}


def _outcome(ended):
  """Work without end is a hang here, however the time is measured."""
  is_cut = ended.outcome == attacks.CUT
  return attacks.HANG if is_cut else ended.outcome


if __name__ == "__main__":
  absltest.main()
