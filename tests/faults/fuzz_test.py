"""Random flags over every script: work, or one line.

  python -m pytest tests/faults/fuzz_test.py -m slow -s

draws 500 sets of flags over the smallest work of all scripts, 6 s of all cores
each. Scripts say themselves which flags they have.
"""

import os
import pathlib

from absl.testing import absltest
import pytest

from tests.faults import attacks
from tests.faults import flag_sets
from tests.faults import scripts

_SEED = 14
_TRIES = 500
_CPU_S = 6
# It writes into this repository, what a program for a TPU costs.
_NEVER = ("update_budgets",)


class DrawerTest(absltest.TestCase):

  def test_a_seed_is_a_series_of_flag_sets(self):
    found = [
        {"name": "n", "expects": "an int", "choices": [], "is_bool": False},
        {"name": "is_x", "expects": "", "choices": [], "is_bool": True},
        {"name": "kind", "expects": "", "choices": ["a"], "is_bool": False},
        {
            **{"name": "many", "choices": [], "is_bool": False},
            "expects": "comma-separated, each one of: u, v, or none",
        },
    ]
    series = [flag_sets.Drawer(7) for _ in range(2)]
    first, second = ([d.draw(found) for _ in range(200)] for d in series)
    self.assertEqual(first, second)
    drawn = {flag for flags in first for flag in flags}
    self.assertContainsSubset(
        {"--n=7", "--n=-1", "--is_x", "--nois_x", "--kind=a", "--many=u,v"},
        drawn,
    )
    self.assertTrue(all(1 <= len(flags) <= 3 for flags in first))


class FindTest(absltest.TestCase):

  def test_scripts_are_found_and_new_ones_too(self):
    found = {script.module: script for script in scripts.find()}
    self.assertTrue(found["launch.train_lm"].has_workdir)
    self.assertFalse(found["launch.generate"].has_workdir)
    self.assertIn("launch.bench_kernels", found)
    self.assertNoCommonElements(
        found, ["launch.command.app", "launch.command.run"]
    )
    root = pathlib.Path(self.create_tempdir().full_path)
    (root / "launch").mkdir()
    (root / "launch" / "new.py").write_text(
        'MODEL = define("model")\nif __name__ == "__main__":\n  pass\n'
    )
    new = scripts.Script("launch.new", ("--model=model",), False)
    self.assertEqual(scripts.find(root), [new])

  def test_every_script_has_its_smallest_work(self):
    self.assertEmpty([s.module for s in scripts.find() if not s.argv])


class FuzzTest(absltest.TestCase):

  @pytest.mark.slow
  @pytest.mark.timeout(3600)
  def test_500_flag_sets(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    world = scripts.make_world(folder)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    tally, drawer = attacks.Tally(), flag_sets.Drawer(_SEED)
    with attacks.Zygote() as zygote:
      scripts.add_run(world, zygote)
      tried = scripts.find()
      flags_of = {
          s.module: [
              flag
              for flag in scripts.flags_of(s, world, zygote)
              if flag["name"] not in _NEVER
          ]
          for s in tried
      }
      for number in range(_TRIES):
        script = tried[number % len(tried)]
        drawn = drawer.draw(flags_of[script.module])
        argv = [*world.argv(script, f"runs/{number}"), *drawn]
        ended = zygote.attack(
            *(script.module, *argv),
            cwd=world.folder,
            cpu_s=_CPU_S,
            hooks=["undrawn"],
        )
        tally.add(script.module, flag_sets.shorten(drawn), ended)
    wrong = attacks.report(tally, "Random flags")
    self.assertEmpty(wrong, wrong)


if __name__ == "__main__":
  absltest.main()
