"""What is installed is what is declared: version and page."""

import importlib
from importlib import metadata
import pathlib
import re
import tomllib

from absl.testing import absltest
from absl.testing import parameterized

_ROOT = pathlib.Path(__file__).parents[1]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())
_PACKAGES = ("scansnap_jax", "joma", "kernels_pallas", "launch")


class PackagingTest(parameterized.TestCase):

  @parameterized.parameters(*_PACKAGES)
  def test_a_package_tells_its_version(self, name):
    package = importlib.import_module(name)
    version = _PROJECT["project"]["version"]
    self.assertEqual(package.__version__, version)
    self.assertIn(f"\nversion: {version}\n", _text("CITATION.cff"))
    self.assertFalse(hasattr(package, "no_such_name"))

  @parameterized.parameters("scansnap_jax.version", "kernels_pallas.version")
  def test_a_copy_that_is_not_installed_has_none(self, name):
    module = importlib.import_module(name)
    found = metadata.version
    try:
      metadata.version = lambda name: found("no-such-distribution")
      with self.assertRaisesRegex(AttributeError, "jax is not installed"):
        module.attribute("__version__")
    finally:
      metadata.version = found

  def test_a_registry_shows_no_link_that_leads_nowhere(self):
    text = _text(_PROJECT["project"]["readme"])
    links = re.findall(r"\]\(([^)]*)\)", text)
    self.assertNotEmpty(links)
    self.assertEmpty([x for x in links if not x.startswith("https://")])
    self.assertNotEmpty(_PROJECT["project"]["urls"])


def _text(name):
  return (_ROOT / name).read_text()


if __name__ == "__main__":
  absltest.main()
