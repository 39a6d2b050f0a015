"""`launch.generate` with a model that lies on a server, as its own process."""

import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
import pytest

from tests.joma.transformer.hf import hub_server
from tests.launch import generate_test

_ROOT = pathlib.Path(__file__).parents[3]


@pytest.mark.slow
class ByNameTest(absltest.TestCase):

  def _run(self, model, **variables):
    return subprocess.run(
        [
            *(sys.executable, "-m", "launch.generate", f"--model={model}"),
            *("--max_new_tokens=8", "--prompt=To be"),
        ],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", **variables},
        check=False,
    )

  def test_says_what_the_folder_says(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    generate_test.save_model(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    home = self.create_tempdir().full_path
    with hub_server.serving(hub_server.Hub(files)) as url:
      variables = {"HF_ENDPOINT": url, "HF_HOME": home}
      named = self._run("org/name@v1", **variables)
      missing = self._run("org/other", **variables)
    self.assertEqual(named.returncode, 0, named.stderr)
    self.assertEqual(named.stdout, self._run(folder).stdout)
    self.assertNotEqual(missing.returncode, 0)
    last = missing.stderr.strip().splitlines()[-1]
    self.assertStartsWith(last, "error: There is no folder org/other, and http")
    self.assertNotIn("Traceback", missing.stderr)


if __name__ == "__main__":
  absltest.main()
