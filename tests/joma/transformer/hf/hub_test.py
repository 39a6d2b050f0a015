"""Models by name: the real client, each time in a process with its variables,
against a server on the loopback address.
"""

import contextlib
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from joma.transformer.hf import hub
from tests.joma.transformer.hf import hub_server

_PROGRAM = """
import sys
from joma.transformer.hf import hub
from scansnap_jax.experiment import errors
try:
  print("found", hub.folder(sys.argv[1], weights=sys.argv[2:] == ["weights"]))
except errors.UserError as error:
  print("error", error)
"""
_WEIGHTS = bytes(range(256)) * 400
_FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "model.safetensors": _WEIGHTS,
    "pytorch_model.bin": b"runs what it holds",
    "onnx/config.json": b"{}",
}


class HubTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.home = pathlib.Path(self.create_tempdir().full_path)
    self.hub = hub_server.Hub(dict(_FILES))

  def _ask(self, *arguments, url=None, **variables):
    """Returns found or error, and what of; what was printed besides is kept."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = {
        **kept,
        "HF_HOME": str(self.home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        **({"HF_ENDPOINT": url} if url else {}),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    self.said = done.stderr
    kind, _, what = done.stdout.strip().partition(" ")
    return kind, what

  def _files(self, folder):
    root = pathlib.Path(folder)
    found = [p for p in root.rglob("*") if p.is_file()]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in found}

  def test_a_model_by_its_name(self):
    with hub_server.serving(self.hub) as url:
      kind, folder = self._ask("org/name", "weights", url=url)
    self.assertEqual(kind, "found", folder)
    wanted = ("config.json", "tokenizer.json", "model.safetensors")
    self.assertEqual(self._files(folder), {n: _FILES[n] for n in wanted})
    self.assertIn(f"org/name is commit {hub_server.COMMIT}", self.said)

  @pytest.mark.slow
  def test_what_was_downloaded_needs_no_network(self):
    with hub_server.serving(self.hub) as url:
      _, folder = self._ask("org/name", "weights", url=url)
    # The server is gone; the variable says that nobody need be asked.
    again = self._ask("org/name", "weights", url=url, HF_HUB_OFFLINE="1")
    self.assertEqual(again, ("found", folder))

  @pytest.mark.slow
  def test_without_weights_they_stay_where_they_are(self):
    with hub_server.serving(self.hub) as url:
      _, folder = self._ask("org/name@v1", url=url)
      self.assertEqual(
          {*self._files(folder)}, {"config.json", "tokenizer.json"}
      )
      asked = [path for path, _ in self.hub.asked]
      self.assertIn("/api/models/org/name/revision/v1", asked)
      kind, why = self._ask(
          "org/name@v1", "weights", url=url, HF_HUB_OFFLINE="1"
      )
    self.assertEqual(kind, "error")
    self.assertIn("the model org/name is not whole in", why)

  @parameterized.named_parameters(
      ("model", "org/other", {}, "has no model org/other, or it is private"),
      ("revision", "org/name@v9", {}, "org/name has no revision v9 at http"),
      ("token", "org/name", {"token": "secret"}, "or set HF_TOKEN"),
      ("gate", "org/name", {"is_gated": True}, "is gated: ask for access on"),
  )
  @pytest.mark.slow
  def test_what_is_not_there_is_a_sentence(self, name, changes, words):
    for field, value in changes.items():
      setattr(self.hub, field, value)
    with hub_server.serving(self.hub) as url:
      kind, why = self._ask(name, url=url)
      self.assertEqual(kind, "error")
      self.assertIn(words, why)
      self.assertNotIn("\n", why)
      if "token" in changes:
        kind, why = self._ask(name, url=url, HF_TOKEN="wrong")
        self.assertIn("the token that is set may not read it", why)
        kind, why = self._ask(name, url=url, HF_TOKEN="secret")
        self.assertEqual(kind, "found")

  @pytest.mark.slow
  def test_no_network_names_the_command(self):
    with hub_server.serving(self.hub) as url:
      pass  # Nobody listens there any more.
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
      kind, why = self._ask("org/name@v1", url=url, **variables)
      self.assertEqual(kind, "error")
      self.assertIn("run `hf download org/name --revision v1`", why)
      said = "HF_HUB_OFFLINE is set" if variables else "does not answer"
      self.assertIn(said, why)

  @pytest.mark.slow
  def test_a_download_that_broke_off_goes_on(self):
    self.hub.cut_after = 30_000
    with hub_server.serving(self.hub) as url:
      kind, why = self._ask("org/name", "weights", url=url)
      self.assertEqual(kind, "error", why)
      self.assertRegex(why, "The download of org/name from http.* broke off")
      self.assertNotIn("\n", why)
      self.hub.cut_after, self.hub.asked = None, []
      kind, folder = self._ask("org/name", "weights", url=url)
    self.assertEqual(kind, "found", folder)
    # What was whole is not asked for again.
    files = {path.rpartition("/")[2] for path, _ in self.hub.asked}
    self.assertNotIn("config.json", files)
    self.assertEqual(self._files(folder)["model.safetensors"], _WEIGHTS)

  def test_a_folder_that_is_there_is_no_name(self):
    root = self.create_tempdir()
    root.mkdir("org/name")
    with contextlib.chdir(root.full_path):
      self.assertEqual(hub.folder("org/name"), pathlib.Path("org/name"))
    # Nor is any of these, which are there or not.
    for path in ("/none/such", "./a/b", "a/b/c", "~/x", "name", "../x", "a/b@"):
      self.assertEqual(hub.folder(path), pathlib.Path(os.path.expanduser(path)))


if __name__ == "__main__":
  absltest.main()
