import json

from absl.testing import parameterized

from joma.transformer.text import chat_template
from scansnap_jax.experiment import errors

_USER = [{"role": "user", "content": "hi <b>"}]
_CHATML = (
    "{% for m in messages %}\n"
    "{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "{{- '<|im_start|>assistant\n' }}"
    "{% endif %}"
)


class ChatTemplateTest(parameterized.TestCase):

  def _read(self, **files):
    folder = self.create_tempdir()
    for name, content in files.items():
      name = name.replace("__", ".")
      text = content if isinstance(content, str) else json.dumps(content)
      folder.create_file(name, content=text)
    return chat_template.read(folder.full_path)

  @parameterized.parameters(
      dict(chat_template__jinja=_CHATML),
      dict(tokenizer_config__json={"chat_template": _CHATML}),
      dict(chat_template__json={"chat_template": _CHATML}),
      dict(
          tokenizer_config__json={
              "chat_template": [
                  {"name": "tool_use", "template": "no"},
                  {"name": "default", "template": _CHATML},
              ]
          }
      ),
  )
  def test_messages_are_written_as_the_folder_says(self, **files):
    self.assertEqual(
        self._read(**files).render(_USER),
        "<|im_start|>user\nhi <b><|im_end|>\n<|im_start|>assistant\n",
    )

  def test_special_tokens_json_and_loop_controls_are_there(self):
    text = (
        "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{% break %}"
        "{% endfor %}{{ eos_token }}"
    )
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    template = self._read(
        chat_template__jinja=text, tokenizer_config__json=config
    )
    self.assertEqual(
        template.render([*_USER, *_USER]),
        '<s>{"role": "user", "content": "hi <b>"}</s>',
    )

  def test_a_folder_without_one_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "has no chat template: "):
      self._read(tokenizer_config__json={"chat_template": 3})
    with self.assertRaisesRegex(errors.UserError, "~nobody_here has no chat"):
      chat_template.read("~nobody_here")

  @parameterized.parameters(
      ("{{ raise_exception('only users') }}", "fails: only users"),
      ("{{ ''.__class__.__mro__ }}", "fails: access to attribute '__class__'"),
      ("{{ messages.append(1) }}", "fails: access to attribute 'append'"),
      ("{{ missing.content }}", "fails: 'missing' is undefined"),
      ("{{ 'a' * 999999999 }}", "fails: it asks for 'a' "),
      ("{{ 9 ** 9 ** 9 }}", "fails: it asks for 9 "),
      (
          (
              "{% for i in range(9999) %}{% for j in range(9999) %}"
              "{% endfor %}{% endfor %}"
          ),
          "fails: its loops take more than 1000000 turns",
      ),
      (
          "{% for i in range(99) %}{{ 'a' * 999999 }}{% endfor %}",
          "fails: it makes more than 10000000 characters",
      ),
  )
  def test_what_templates_may_not_do_is_one_sentence(self, text, message):
    template = self._read(chat_template__jinja=text)
    with self.assertRaisesRegex(errors.UserError, message):
      template.render(_USER)

  def test_what_is_no_template_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, "is no Jinja template"):
      self._read(chat_template__jinja="{% for %}")
