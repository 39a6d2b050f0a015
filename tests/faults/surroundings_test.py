"""Every script in odd environments, and with odd streams.

  python -m pytest tests/faults/surroundings_test.py -m slow -s

runs the smallest work of all scripts that are found under 20 environments and
with 12 set-ups of stdin, stdout and stderr. Statuses are as documented: that of
the same script undisturbed; 2 with one line; 141 where the reader of stdout is
gone. A stdin or stderr that is odd changes none.
"""

import pathlib

from absl.testing import absltest
import pytest

from tests.faults import attacks
from tests.faults import scripts

# An environment is variables, None for one that is not set.
_ENVIRONMENTS = {
    "x64": {"JAX_ENABLE_X64": "1"},
    "old keys": {"JAX_THREEFRY_PARTITIONABLE": "0"},
    "other keys": {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
    "no such platform": {"JAX_PLATFORMS": "abacus"},
    "absent platform": {"JAX_PLATFORMS": "cuda"},
    "any platform": {"JAX_PLATFORMS": None},
    "several devices": {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=3"
    },
    "traps of NaN": {"JAX_DEBUG_NANS": "1"},
    "no compilation": {"JAX_DISABLE_JIT": "1"},
    "highest precision": {"JAX_DEFAULT_MATMUL_PRECISION": "highest"},
    "no room for programs": {"JAX_COMPILATION_CACHE_DIR": "/proc/none"},
    "plain C": {
        "LC_ALL": "C",
        "LANG": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    },
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "no home": {"HOME": "/nowhere", "USER": None, "XDG_CACHE_HOME": None},
    "nowhere for temporary files": {"TMPDIR": "/nowhere"},
    "a window system": {"MPLBACKEND": "TkAgg", "DISPLAY": ":99"},
    "drawing settings gone": {"MPLCONFIGDIR": "/proc/none"},
    "no docstrings": {"PYTHONOPTIMIZE": "2"},
    "narrow": {"COLUMNS": "1", "LINES": "x", "TERM": "dumb"},
    "no path": {"PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
}
# Figures are drawn in these, which concern them, and left empty elsewhere.
_DRAWN = ("plain C", "no home", "a window system", "drawing settings gone")
_HOOKS = dict.fromkeys((*_DRAWN, "nowhere for temporary files"), ())
_STREAMS = {
    "stdin closed": {"stdin": "closed"},
    "stdin a folder": {"stdin": "/"},
    "stdout closed": {"stdout": "closed"},
    "stdout full": {"stdout": "/dev/full"},
    "stdout unread": {"stdout": "head:0"},
    "stdout read for a byte": {"stdout": "head:1"},
    "stdout may not be written": {"stdout": "unwritable:only_read"},
    "stderr closed": {"stderr": "closed"},
    "stderr full": {"stderr": "/dev/full"},
    "stderr unread": {"stderr": "head:0"},
    "all closed": dict.fromkeys(("stdin", "stdout", "stderr"), "closed"),
    "a terminal": {"stdout": "terminal:seen", "stderr": "terminal:seen"},
}
_BROKEN_PIPE = 141
# Their smallest work is a refusal: they start processes of their own.
_REFUSED = ("bench.kernels", "bench_kernels", "bench.scansnap")


class StreamsTest(absltest.TestCase):

  @pytest.mark.slow
  def test_a_script_that_is_quick_with_some_streams(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    argv = ("--lengths=512", "--batch_sizes=1", "--chips=v5e")
    self.assertGreaterEqual(len(_ENVIRONMENTS), 20)
    self.assertGreaterEqual(len(_STREAMS), 12)
    with attacks.Zygote(is_warm=False) as zygote:
      for name, status in (("stdout full", 2), ("a terminal", 0)):
        options = {"streams": _STREAMS[name]}
        ended = zygote.attack("launch.cost_table", *argv, cwd=folder, **options)
        self.assertEqual(ended.status, status, ended.err)
        outcome = attacks.CLEAR if status else attacks.RIGHT
        self.assertEqual(_outcome(ended, options, status=0), outcome)
    self.assertIn("v5e", (folder / "seen").read_text())


class SurroundingsTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.create_tempdir().full_path)
    self.world = scripts.make_world(folder)
    self.tally = attacks.Tally()
    self.count = 0
    self.statuses = self._run_undisturbed()

  def _run_undisturbed(self):
    statuses = {}
    with attacks.Zygote() as zygote:
      scripts.add_run(self.world, zygote)
      for script in scripts.find():
        ended = self._run(zygote, script, hooks=["undrawn"])
        is_refused = script.module.endswith(_REFUSED)
        self.assertEqual(ended.status, 2 if is_refused else 0, ended.err)
        statuses[script.module] = ended.status
    return statuses

  def _run(self, zygote, script, **options):
    self.count += 1
    argv = self.world.argv(script, f"runs/{self.count}")
    return zygote.attack(script.module, *argv, cwd=self.world.folder, **options)

  def _run_all(self, zygote, kind, **options):
    for script in scripts.find():
      ended = self._run(zygote, script, **options)
      outcome = _outcome(ended, options, self.statuses[script.module])
      self.tally.add(kind, script.module, ended, outcome)

  def _report(self, title):
    wrong = attacks.report(self.tally, title)
    self.assertEmpty(wrong, wrong)

  @pytest.mark.slow
  @pytest.mark.timeout(7200)
  def test_all_scripts_under_20_environments(self):
    for name, env in _ENVIRONMENTS.items():
      with attacks.Zygote(env) as zygote:
        self._run_all(zygote, name, hooks=_HOOKS.get(name, ["undrawn"]))
    self._report("Environments")

  @pytest.mark.slow
  @pytest.mark.timeout(7200)
  def test_all_scripts_with_12_streams(self):
    with attacks.Zygote() as zygote:
      for name, streams in _STREAMS.items():
        self._run_all(zygote, name, streams=streams, hooks=["undrawn"])
    self._report("Streams")


def _outcome(ended, options, status):
  """What came of it, where the same undisturbed would end with `status`."""
  streams = options.get("streams", {})
  if not streams or ended.is_late or ended.status < 0:
    return ended.outcome
  takes_all = streams.get("stdout", "closed").startswith(("closed", "terminal"))
  if ended.status not in ({status} if takes_all else {status, 2, _BROKEN_PIPE}):
    return attacks.TRACEBACK
  if ended.status == _BROKEN_PIPE:
    return attacks.RIGHT
  if "stderr" in streams:  # Nobody heard more than the status.
    return attacks.CLEAR if ended.status else attacks.RIGHT
  return ended.outcome


if __name__ == "__main__":
  absltest.main()
