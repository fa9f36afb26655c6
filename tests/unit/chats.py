"""A small tokenizer and real-world chat templates for the tests of text."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from potexport.runtime.text import Text

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A pot holds a fixed number of slots, and a long book passes through it.",
    "Él comió un plátano; she said naïve things. 東京 🙂",
]


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


LLAMA2 = """{%- if messages[0]['role'] == 'system' -%}
    {%- set system = '<<SYS>>\\n' ~ messages[0]['content'] ~ '\\n<</SYS>>\\n\\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate\\nuser/assistant/user/...') }}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() }}
        {{- ' [/INST]' }}
    {%- else -%}
        {{ ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}
"""


LLAMA3 = """{% set ns = namespace(found=false) %}
{{- bos_token }}
{%- if tools is not none %}
    {{- 'Tools: ' }}{{- tools | tojson(indent=2) }}
{%- endif %}
{%- set today = strftime_now('%d %b %Y') %}
Today: {{ today }}
  {% if bos_token %}
  Known
  {% endif %}
{% for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- set ns.found = true %}
    {%- generation %}
        {{- '<|' ~ message.role ~ '|>' }}{{ message.content | trim | replace('<x>', '&') }}
    {%- endgeneration %}
{% endfor %}
{%- if ns.found and add_generation_prompt %}<|assistant|>{% endif %}
"""


CHAT = [
    {"role": "system", "content": " Be <brief> & kind. "},
    {"role": "user", "content": "  Where is 'Q'? <x>\n"},
    {"role": "assistant", "content": "Here. "},
    {"role": "user", "content": "Thanks"},
]


def trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


TOKENIZER = trained()


SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}


def with_template(template: str | None) -> Text:
    return Text(trained(), template=template, specials=SPECIALS)


TEXT = with_template(None)
