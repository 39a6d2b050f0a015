from absl.testing import absltest

from joma.systems.probes import maps
from joma.systems.probes import names
from scansnap_jax.experiment import errors


class NamesTest(absltest.TestCase):

  def test_the_nearest_known_is_named(self):
    message = "no probe 'diversty'; the nearest is 'diversity', of sinks, .*"
    with self.assertRaisesRegex(errors.UserError, message):
      names.check(("sinks", "diversty"))
    with self.assertRaisesRegex(errors.UserError, "has 'sinks' twice"):
      names.check(("sinks", "sinks"))
    names.check(tuple(names.PROBES))

  def test_every_probe_of_maps_is_listed(self):
    self.assertContainsSubset(maps.PROBES, names.PROBES)


if __name__ == "__main__":
  absltest.main()
