from absl.testing import absltest
from absl.testing import parameterized

from joma.scale import collectives
from joma.scale import program as program_lib

_MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def _program(*lines):
  body = "\n".join(f"  {line}" for line in lines)
  return program_lib.parse(
      f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"
  )


def _find(*lines):
  return collectives.find(_program("%x = f32[8]{0} parameter(0)", *lines), 8)


class CollectivesTest(parameterized.TestCase):

  @parameterized.parameters(
      ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, x", ("tensor",)),
      ("replica_groups=[4,2]<=[8], x", ("tensor",)),
      # Rows of 4 x 2 turned: 0 2 4 6 and 1 3 5 7.
      ("replica_groups=[2,4]<=[4,2]T(1,0), x", ("data", "fsdp")),
      ("replica_groups=[4,2]<=[2,2,2]T(0,2,1), x", ("fsdp",)),
      ("replica_groups=mesh['a'=4,'b'=2] {'a'}, x", ("data", "fsdp")),
      ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", ("data",)),
      (
          "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, x",
          ("tensor",),
      ),
      ("replica_groups={}, x", ("data", "fsdp", "tensor")),
  )
  def test_groups_say_which_axes_are_crossed(self, attributes, axes):
    groups = collectives.groups_of(attributes, 8)
    self.assertEqual(sorted(sum(groups, ())), [*range(8)])
    one = collectives.Collective("all-gather", 1, groups, 1, "x")
    self.assertEqual(one.axes(_MESH), axes)

  @parameterized.parameters(
      # 64 bytes of a device and that of the other slice: a half each, twice.
      ("ALL_REDUCE", "all-reduce", 64, 64),
      ("REDUCE_SCATTER", "reduce-scatter", 64, 32),
      ("ALL_GATHER", "all-gather", 128, 64),
  )
  def test_what_is_handed_to_the_network(self, text, kind, num_bytes, sent):
    (one,) = _find(
        "%s = (f32[16]{0}, u32[], token[]) send(%x, %x), channel_id=3,"
        " is_host_transfer=true,"
        ' frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",'
        f'_xla_megascale_transfer_type="{text}"}}',
        "%t = (f32[16]{0}, u32[], token[]) send(%x, %x), channel_id=4",
    )
    self.assertEqual(one.groups, ((0, 4), (1, 5), (2, 6), (3, 7)))
    self.assertEqual(one.axes(_MESH), ("data",))
    self.assertEqual((one.kind, one.num_bytes), (kind, num_bytes))
    self.assertEqual(one.sent_bytes, sent)

  def test_unknown_groups_are_refused(self):
    with self.assertRaisesRegex(ValueError, "unknown groups"):
      collectives.groups_of("replica_groups=V3[2]", 8)

  @parameterized.parameters(
      # 64 bytes of results in groups of 4: 3 / 4 of them are sent.
      ("f32[16]{0} all-gather(%x), ", "all-gather", 64, 48),
      ("f32[16]{0} all-reduce(%x), ", "all-reduce", 64, 96),
      # A result of 64 bytes is a quarter of what is summed.
      ("f32[16]{0} reduce-scatter(%x), ", "reduce-scatter", 256, 192),
      ("f32[16]{0} all-to-all(%x), ", "all-to-all", 64, 48),
      ("(f32[16]{0}, f32[8]{0}) all-reduce(%x, %x), ", "all-reduce", 96, 144),
      ("(f32[4]{0}, f32[16]{0}) all-gather-start(%x), ", "all-gather", 64, 48),
  )
  def test_bytes_by_kind(self, text, kind, num_bytes, sent):
    (one,) = _find(f"ROOT %c = {text} channel_id=1, replica_groups=[2,4]<=[8]")
    self.assertEqual((one.kind, one.num_bytes), (kind, num_bytes))
    self.assertEqual(one.sent_bytes, sent)

  def test_a_permute_sends_what_it_moves(self):
    (one,) = _find(
        "ROOT %c = (f32[8]{0}, f32[8]{0}, u32[], u32[])"
        " collective-permute-start(%x), channel_id=1,"
        " source_target_pairs={{0,2},{2,0},{1,3},{3,1}}"
    )
    self.assertEqual((one.kind, one.sent_bytes), ("permute", 32))
    self.assertEqual(one.axes(_MESH), ("fsdp",))

  def test_one_channel_is_one_exchange_and_one_device_is_none(self):
    found = _find(
        "%a = f32[16]{0} all-gather(%x), channel_id=3,"
        " replica_groups=[2,4]<=[8]",
        "%b = f32[16]{0} all-gather(%x), channel_id=3,"
        " replica_groups=[2,4]<=[8]",
        "ROOT %c = f32[8]{0} all-gather(%x), channel_id=4,"
        " replica_groups=[8,1]<=[8]",
    )
    self.assertEqual([one.name for one in found], ["a"])

  def test_permutes_of_one_channel_are_each_an_exchange(self):
    found = _find(
        "%a = f32[16]{0} collective-permute(%x), channel_id=1,"
        " source_target_pairs={{0,1},{1,0}}",
        "%b = f32[16]{0} collective-permute(%a), channel_id=1,"
        " source_target_pairs={{0,1},{1,0}}",
        "ROOT %c = f32[16]{0} all-gather(%b), channel_id=1,"
        " replica_groups=[2,4]<=[8]",
    )
    self.assertEqual([one.name for one in found], ["a", "b", "c"])

  def test_a_fused_sum_of_which_a_part_stays_is_a_reduce_scatter(self):
    text = """%all-reduce-scatter.1 (p: f32[16]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  %sum = f32[16]{0} all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[8]
  ROOT %part = f32[4]{0} dynamic-slice(%sum)
}
ENTRY %main (x: f32[16]) -> f32[4] {
  %x = f32[16]{0} parameter(0)
  ROOT %f = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (one,) = collectives.find(program_lib.parse(text), 8)
    self.assertEqual((one.kind, one.sent_bytes), ("reduce-scatter", 48))


if __name__ == "__main__":
  absltest.main()
