"""The chat template of an exported student: a plain question gets the instruction that the student was trained with."""

from __future__ import annotations

import json

_REWRITE = """\
{%- set instruction = INSTRUCTION -%}
{%- set asked = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set told = message -%}
{%- if message['role'] == 'user' and message['content'] is string -%}
{%- if instruction not in message['content'] -%}
{%- set told = dict(message, content=message['content'] ~ '\\n' ~ instruction) -%}
{%- endif -%}
{%- elif message['role'] == 'user' -%}
{%- if instruction not in message['content'] | map(attribute='text', default='') | join -%}
{%- set told = dict(message, content=message['content'] + [{'type': 'text', 'text': '\\n' ~ instruction}]) -%}
{%- endif -%}
{%- endif -%}
{%- set asked.messages = asked.messages + [told] -%}
{%- endfor -%}
{%- set messages = asked.messages +%}
"""


def with_instruction(template: str, instruction: str) -> str:
    """A chat template that adds an instruction to every user's turn that does not hold it, and else does the same.

    Training, evaluation and `avrt ask` send it with the question, and so see no difference.

    Args:
        template: Jinja, as transformers and vLLM take it.
        instruction: one line; empty adds nothing.
    """
    rewrite = _REWRITE.rstrip("\n").replace("INSTRUCTION", json.dumps(instruction))
    return template if not instruction or template.startswith(rewrite) else rewrite + template
