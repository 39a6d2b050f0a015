from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from joma.scale import interconnect
from kernels_pallas.aot import topology


class InterconnectTest(parameterized.TestCase):

  @parameterized.parameters(
      # One side of a cube of 4 is a ring, of a slice with a side of 2 a line.
      ("v5p", (4, 4, 4), range(4), 2),
      ("v5p", (4, 4, 2), range(4), 1),
      ("v5p", (4, 4, 4), range(16), 4),
      ("v5p", (4, 4, 4), range(64), 6),
      ("v5p", (4, 4, 4), range(0, 64, 16), 2),
      # Half of a ring is a line.
      ("v5p", (4, 4, 4), range(2), 1),
      ("v5e", (4, 4), range(4), 1),
      ("v5e", (16, 16), range(16), 2),
      ("v5e", (16, 16), range(256), 4),
      ("v6e", (2, 4), range(8), 2),
      # Two devices a chip: along the first side every other one moves on.
      ("v7x", (4, 4, 4), range(8), 2),
      ("v7x", (4, 4, 4), range(2), 1),
  )
  def test_links_of_a_group(self, chip, sides, group, links):
    torus = interconnect.Torus(chip, sides)
    self.assertEqual(torus.num_links(group), links)

  def test_seconds_by_hand(self):
    # v5e: 200 GB/s one way over 4 links.
    torus = interconnect.Torus("v5e", (16, 16))
    np.testing.assert_allclose(torus.seconds(10**9, range(256)), (1 / 200, 0))
    np.testing.assert_allclose(torus.seconds(10**9, range(2)), (1 / 50, 0))

  @parameterized.parameters(2, 3, 8)
  def test_gpus_send_to_any_others_with_all_they_have(self, number):
    switch = interconnect.Torus("h100", (8,))
    # NVLink: 900 GB/s both ways.
    np.testing.assert_allclose(
        switch.seconds(10**9, range(number)), (1 / 450, 0)
    )

  def test_seconds_between_slices_by_hand(self):
    # Two slices of 2 x 4: 50 GB/s a link, 25 Gbit/s through the network.
    torus = interconnect.Torus("v5e", (2, 4), 2)
    # A device and that of the same place in the other slice send it all.
    ici, dcn = torus.seconds(10**9, (3, 11))
    self.assertEqual((ici, dcn), (0, 8 / 25))
    # A ring of 16 sends 15/16 of the whole. Within a slice of 8, over two
    # links, it is 7/8 of it; the eighth that is then left, by halves, between.
    ici, dcn = torus.seconds(15e9, range(16))
    np.testing.assert_allclose(ici, 14 / (2 * 50))
    np.testing.assert_allclose(dcn, 16 / 8 / 2 / (25 / 8))
    # Within the second slice it is as within the first.
    self.assertEqual(
        torus.seconds(1.0, range(8, 12)), torus.seconds(1.0, range(4))
    )

  @absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
  @parameterized.parameters(
      ("v5e", (1, 1)),
      ("v5e", (2, 4)),
      ("v5p", (2, 2, 1)),
      ("v4", (2, 2, 4)),
      ("v7x", (2, 2, 1)),
  )
  def test_devices_stand_where_libtpu_says(self, chip, sides):
    name = f"{chip}:{'x'.join(map(str, sides))}"
    _, devices = topology.named_devices(name)
    ours = interconnect.Torus(chip, sides).coordinates
    theirs = np.array([d.coords[: len(sides)] for d in devices])
    np.testing.assert_array_equal(ours, theirs)

  @absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
  def test_devices_of_several_slices_come_slice_by_slice(self):
    _, devices = topology.named_devices("v5e:2x4", 3)
    self.assertEqual(
        [d.slice_index for d in devices], [0] * 8 + [1] * 8 + [2] * 8
    )
    ours = interconnect.Torus("v5e", (2, 4)).coordinates
    theirs = np.array([d.coords[:2] for d in devices])
    np.testing.assert_array_equal(np.tile(ours, (3, 1)), theirs)

  def test_an_unknown_topology_is_refused(self):
    with self.assertRaisesRegex(ValueError, "no chip 'v3'"):
      topology.named_devices("v3:2x2")
    with self.assertRaisesRegex(ValueError, "topologies are of v4"):
      topology.named_devices("h100:2x2")


if __name__ == "__main__":
  absltest.main()
