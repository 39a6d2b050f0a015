import contextlib
import os
import pathlib
import stat
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
import pytest

from scansnap_jax.experiment.processes import compilation_cache

_ROOT = pathlib.Path(__file__).parents[4]
_COMPILE = """
import sys
from scansnap_jax.experiment.processes import compilation_cache
print(compilation_cache.use(*sys.argv[1:] or [None]))
import jax
events = []
jax.monitoring.register_event_listener(lambda e, **_: events.append(e))
jax.jit(lambda x: jax.numpy.sort(x) + 1)(jax.numpy.arange(7.0))
print(sum("cache_hits" in event for event in events))
"""


class UseTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    home = {"XDG_CACHE_HOME": str(self.folder), "HOME": "/nowhere"}
    self.enter_context(mock.patch.dict(os.environ, home))
    for name in ("JAX_COMPILATION_CACHE_DIR", compilation_cache._SECONDS):
      os.environ.pop(name, None)

  def _start(self, *args):
    """What is said, and how many programs were read, in a new process."""
    env = os.environ | {compilation_cache._SECONDS: "0"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, *args],
        env=env,
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    self.assertEqual(done.stderr, "")
    said, hits = done.stdout.splitlines()
    return said, int(hits)

  @pytest.mark.slow
  def test_a_second_process_reads_what_the_first_compiled(self):
    self.assertEqual(self._start(), ("None", 0))
    said, hits = self._start()
    self.assertEqual(said, "None")
    self.assertGreater(hits, 0)
    (kept,) = (self.folder / "scansnap_jax" / "compiled").iterdir()
    self.assertNotEmpty(list(kept.iterdir()))
    for path in kept.iterdir():  # A start was killed while it wrote.
      path.write_bytes(path.read_bytes()[:40])
    self.assertEqual(self._start(), ("None", 0))

  def test_a_folder_of_the_user_and_none(self):
    asked = str(self.folder / "own")
    self.assertIsNone(compilation_cache.use(asked))
    self.assertEqual(os.environ["JAX_COMPILATION_CACHE_DIR"], asked)
    # What the environment says stands, unless a flag says otherwise.
    self.assertIsNone(compilation_cache.use(None))
    self.assertEqual(os.environ["JAX_COMPILATION_CACHE_DIR"], asked)
    with mock.patch.dict(os.environ):
      self.assertIsNone(compilation_cache.use("off"))
      self.assertNotIn("JAX_COMPILATION_CACHE_DIR", os.environ)
      self.assertEqual(os.environ["JAX_ENABLE_COMPILATION_CACHE"], "false")

  def test_a_folder_that_cannot_be_written_costs_a_sentence(self):
    (self.folder / "file").write_text("")
    told = compilation_cache.use(str(self.folder / "file"))
    self.assertEqual(
        told, f"what is compiled is not kept: {self.folder}/file: File exists"
    )
    with contextlib.chdir(self.folder):
      told = compilation_cache.use(f"~nobody_here/{'x' * 300}")
    self.assertEndsWith(told, "File name too long")
    self.folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with mock.patch.object(os, "access", return_value=False):  # As root, too.
      told = compilation_cache.use(str(self.folder))
    self.folder.chmod(stat.S_IRWXU)
    self.assertEndsWith(told, f"{self.folder}: Permission denied")
    self.assertNotIn("JAX_COMPILATION_CACHE_DIR", os.environ)


class DefaultTest(absltest.TestCase):

  def test_is_below_the_cache_of_the_user_by_processor_and_version(self):
    of = lambda **environ: str(compilation_cache.default(environ))
    self.assertStartsWith(of(XDG_CACHE_HOME="/c"), "/c/scansnap_jax/compiled/")
    home = os.path.expanduser("~/.cache/scansnap_jax/compiled/")
    self.assertStartsWith(of(), home)
    self.assertStartsWith(of(XDG_CACHE_HOME="relative"), home)
    before = of()
    with mock.patch.object(
        compilation_cache, "_instructions", return_value="flags: none"
    ):
      self.assertNotEqual(of(), before)


if __name__ == "__main__":
  absltest.main()
