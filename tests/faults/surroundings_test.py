"""Every script in odd environments, and with odd streams.

  python -m pytest tests/faults/surroundings_test.py -m slow -s

runs the smallest work of all scripts that are found under 20 environments and
with 12 set-ups of stdin, stdout and stderr, a test each; `-n 2 --dist=load` has
two of them at once. Statuses are as documented: that of the same script
undisturbed; 2 with one line; 141 where the reader of stdout is gone. A stdin or
stderr that is odd changes none.
"""

import contextlib
import os
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from tests.faults import attacks
from tests.faults import scripts

_AS_IT_IS = "as it is"
# An environment is variables, None for one that is not set.
_ENVIRONMENTS = {
    _AS_IT_IS: {},
    "x64": {"JAX_ENABLE_X64": "1"},
    "old keys": {"JAX_THREEFRY_PARTITIONABLE": "0"},
    "other keys": {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
    "no such platform": {"JAX_PLATFORMS": "abacus"},
    "absent platform": {"JAX_PLATFORMS": "cuda"},
    "any platform": {"JAX_PLATFORMS": None},
    "several devices": {
        "XLA_FLAGS": (
            os.environ.get("XLA_FLAGS", "")
            + " --xla_force_host_platform_device_count=3"
        )
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
    "no home": {
        "HOME": "/proc/none",
        **dict.fromkeys(("USER", "LOGNAME", "XDG_CACHE_HOME")),
        "JAX_COMPILATION_CACHE_DIR": None,
    },
    "nowhere for temporary files": {"TMPDIR": "/nowhere"},
    "a window system": {"MPLBACKEND": "TkAgg", "DISPLAY": ":99"},
    "drawing settings gone": {"MPLCONFIGDIR": "/proc/none"},
    "no docstrings": {"PYTHONOPTIMIZE": "2"},
    "narrow": {"COLUMNS": "1", "LINES": "x", "TERM": "dumb"},
    "no path": {"PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
}
# Figures are drawn in these, which concern them, and left empty elsewhere.
_DRAWN = (
    *("plain C", "no home", "a window system", "drawing settings gone"),
    "nowhere for temporary files",
)
_DRAWN_HOOKS, _OTHER_HOOKS = ("untimed",), ("undrawn", "untimed")
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
_REFUSED = ("bench.kernels", "bench_kernels", "bench.scansnap", "bench.starts")


class StreamsTest(absltest.TestCase):

  @pytest.mark.slow
  def test_a_script_that_is_quick_with_some_streams(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    argv = ("--lengths=512", "--batch_sizes=1", "--chips=v5e")
    self.assertGreater(len(_ENVIRONMENTS), 20)  # One is as it is.
    self.assertGreaterEqual(len(_STREAMS), 12)
    with attacks.Zygote(is_warm=False) as zygote:
      for name, status in (("stdout full", 2), ("a terminal", 0)):
        options = {"streams": _STREAMS[name]}
        ended = zygote.attack("launch.cost_table", *argv, cwd=folder, **options)
        self.assertEqual(ended.status, status, ended.err)
        outcome = attacks.CLEAR if status else attacks.RIGHT
        self.assertEqual(_outcome(ended, options, status=0), outcome)
    self.assertIn("v5e", (folder / "seen").read_text())


class SurroundingsTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.started = contextlib.ExitStack()
    folder = cls.started.enter_context(tempfile.TemporaryDirectory())
    cls.world = scripts.make_world(pathlib.Path(folder))
    cls.zygote = cls.started.enter_context(attacks.Zygote())
    scripts.add_run(cls.world, cls.zygote)
    cls.tally, cls.count = attacks.Tally(), 0

  @classmethod
  def tearDownClass(cls):
    attacks.report(cls.tally, "Surroundings")
    cls.started.close()
    super().tearDownClass()

  def _run_all(self, kind, zygote, **options):
    before = len(self.tally.failures)
    for script in scripts.find():
      type(self).count += 1
      argv = self.world.argv(script, f"runs/{self.count}")
      ended = zygote.attack(
          script.module, *argv, cwd=self.world.folder, **options
      )
      status = 2 if script.module.endswith(_REFUSED) else 0
      outcome = _outcome(ended, options, status)
      if kind == _AS_IT_IS and ended.status != status:
        outcome = attacks.SILENT
      self.tally.add(kind, script.module, ended, outcome)
    wrong = self.tally.failures[before:]
    self.assertEmpty(wrong, "\n".join(wrong))

  @parameterized.parameters(*_ENVIRONMENTS)
  @pytest.mark.slow
  @pytest.mark.timeout(3600)
  def test_all_scripts_in_an_environment(self, name):
    with attacks.Zygote(_ENVIRONMENTS[name]) as zygote:
      hooks = _DRAWN_HOOKS if name in _DRAWN else _OTHER_HOOKS
      self._run_all(name, zygote, hooks=hooks)

  @parameterized.parameters(*_STREAMS)
  @pytest.mark.slow
  @pytest.mark.timeout(3600)
  def test_all_scripts_with_streams(self, name):
    streams = _STREAMS[name]
    self._run_all(name, self.zygote, streams=streams, hooks=_OTHER_HOOKS)


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
