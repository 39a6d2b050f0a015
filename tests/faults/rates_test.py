"""Every script that learns, with rates at which it diverges.

  python -m pytest tests/faults/rates_test.py -m slow -s

takes each rate of each script's smallest work, and each preset, to 1e38: one
line and status 2, no summary, no report. Studies of `joma.studies` other than
the one of the smallest work have `tests/joma/studies/diverged_test.py`.
"""

import pathlib
import re

from absl.testing import absltest
import pytest

from tests.faults import attacks
from tests.faults import scripts

_RATE = re.compile(r"(.*\.)?(lr|lr_z|lr_mlp|lr_end|\w*_lr|rate|\w*step_size)")
_WRITTEN = ("summary.json", "report.html")


def _attempts(script, found):
  """Flags that take one rate too far, each with each preset in turn."""
  rates = [flag["name"] for flag in found if _RATE.fullmatch(flag["name"])]
  chosen = " ".join(script.argv)
  studies = {name.partition(".")[0] for name in rates if "." in name}
  # Of scripts that run one study of many, the rates of that one.
  if len(studies) > 2:
    rates = [name for name in rates if f"--{name.partition('.')[0]}." in chosen]
  yield from ([f"--{name}=1e38"] for name in rates)
  for flag in found:
    if flag["name"] == "preset" and rates and len(studies) <= 2:
      for choice in flag["choices"]:
        yield [f"--preset={choice}", f"--{rates[0]}=1e38", *_other(found)]


def _other(found):
  """What presets of training by epochs need, to end after a step or two."""
  wanted = {"num_epochs": "none", "entropy_chunk": "none"}
  names = {flag["name"] for flag in found}
  return [
      f"--{name}={value}" for name, value in wanted.items() if name in names
  ]


class RatesTest(absltest.TestCase):

  @pytest.mark.slow
  @pytest.mark.timeout(3600)
  def test_nothing_is_claimed_of_what_diverged(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    world, tally = scripts.make_world(folder), attacks.Tally()
    with attacks.Zygote() as zygote:
      for script in scripts.find():
        found = scripts.flags_of(script, world, zygote)
        for number, flags in enumerate(_attempts(script, found)):
          workdir = f"runs/{script.module}{number}"
          argv = [*world.argv(script, workdir), *flags]
          ended = zygote.attack(
              script.module, *argv, cwd=folder, hooks=["undrawn"]
          )
          left = [n for n in _WRITTEN if (folder / workdir / n).exists()]
          is_silent = ended.outcome == attacks.RIGHT or left
          outcome = attacks.SILENT if is_silent else ended.outcome
          tally.add(script.module, " ".join(flags), ended, outcome)
          print(script.module, *flags, ended.last_line[:110], flush=True)
    wrong = attacks.report(tally, "Rates")
    self.assertEmpty(wrong, wrong)


if __name__ == "__main__":
  absltest.main()
