from absl.testing import absltest
import jax
import pytest

from joma.inference import chat
from joma.inference import conversation
from joma.inference import generate
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.text import chat_template
from joma.transformer.text import tokenizer
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

_CONFIG = configs.TransformerConfig(
    vocab_size=256,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    hidden_dim=16,
)
_MODEL = models.Transformer(_CONFIG, implementation="reference")
_PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor"
    " %}[assistant]"
)
# Answers of earlier turns are written in another way than they came.
_REWRITING = _PLAIN.replace("m.content", "m.content | upper")


class ChatTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    params = applied.params(_MODEL)
    self.params = jax.tree.map(lambda x: 3 * x, params)
    self.folder = self.create_tempdir()

  def _chat(self, template, eos_ids=()):
    self.folder.create_file("chat_template.jinja", content=template)
    begun = []

    def begin(num_tokens):
      caches = generate.empty_caches(_MODEL, 1, num_tokens)
      talk = conversation.Conversation(
          _MODEL, self.params, caches, eos_ids=eos_ids
      )
      begun.append(talk)
      return talk

    template = chat_template.read(self.folder.full_path)
    return chat.Chat(begin, template, tokenizer.Bytes(), eos_ids), begun

  def _alone(self, ids, num_new):
    (new,) = generate.generate(
        _MODEL, self.params, [ids], max_new_tokens=num_new
    )
    return new.tolist()

  def test_each_message_is_read_once_and_answered_as_the_whole_text(self):
    talk, begun = self._chat(_PLAIN)
    "".join(talk.ask("hi", 3))
    ids = [*b"[user]hi;[assistant]"]
    first = self._alone(ids, 3)
    self.assertEqual(begun[0].waiting, tuple(first[-1:]))
    "".join(talk.ask("and?", 2))
    self.assertLen(begun, 1)
    rest = b";[user]and?;[assistant]"
    self.assertEqual(talk.num_read, len(rest))
    second = self._alone([*ids, *first, *rest], 2)
    self.assertEqual(begun[0].waiting, tuple(second[-1:]))

  @pytest.mark.slow
  def test_a_template_that_rewrites_is_read_again(self):
    talk, begun = self._chat(_REWRITING.replace("upper", "reverse"))
    "".join(talk.ask("abc", 2))
    "".join(talk.ask("d", 2))
    self.assertLen(begun, 2)
    self.assertEqual(
        [m["role"] for m in talk.messages], ["user", "assistant"] * 2
    )

  def test_an_end_of_text_is_not_shown_and_not_said_twice(self):
    ids = b"[user]hi;[assistant]"
    first = self._alone([*ids], 1)[0]
    talk, begun = self._chat(_PLAIN, (first,))
    self.assertEqual("".join(talk.ask("hi", 5)), "")
    self.assertEqual(begun[0].num_taken_in, len(ids))
    "".join(talk.ask("go", 1))
    self.assertLen(begun, 1)
    # The template ends the empty answer, in the place of the end of text.
    rest = b";[user]go;[assistant]"
    self.assertEqual(begun[0].num_taken_in, len(ids + rest))

  def test_what_is_refused_leaves_the_chat_as_it_was(self):
    refusing = "{% if messages[-1].content == 'no' %}{{ 1 // 0 }}{% endif %}"
    talk, _ = self._chat(_PLAIN + refusing)
    other, begun = self._chat(_PLAIN)
    "".join(talk.ask("hi", 3))
    "".join(other.ask("hi", 3))
    # By the template, by the tokenizer, and by what decodes.
    for text, num_new in (("no", 3), ("a \udcff", 3), ("far" * 200, 0)):
      with self.assertRaises(errors.UserError):
        "".join(talk.ask(text, num_new))
    want = "".join(other.ask("and?", 4))
    self.assertEqual("".join(talk.ask("and?", 4)), want)
    self.assertEqual(talk.messages, other.messages)
    self.assertLen(begun, 1)

  @pytest.mark.slow
  def test_without_room_it_begins_again_with_more(self):
    talk, begun = self._chat(_PLAIN)
    "".join(talk.ask("a" * 300, 2))
    "".join(talk.ask("b" * 300, 2))
    self.assertLen(begun, 2)
    self.assertTrue(begun[1].has_room(1000))
