"""Go templates for ollama: what they give is what the Jinja template gives, or there is none."""

from __future__ import annotations

import re

import pytest

from edgecl.modelfile import Chat, go_template, write_modelfile
from edgecl.places import find_model
from edgecl.template import ChatFormat
from edgecl_convert import GgufFile

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}{{ raise_exception('no system') }}{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
THINKING = (  # the last answer is shown with its thoughts, earlier ones are not
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTO_THE_QUESTION = (
    "{% for m in messages %}{% if m.role == 'system' %}{% set ns = m.content %}{% else %}<{{ m.role }}>"
    "{% if loop.index == 2 and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
NUMBERED = CHATML.replace("{{ m.role }}", "{{ m.role }} {{ loop.index }}")
LAST_ONLY = "{{ messages[-1].content }}{% if add_generation_prompt %}:{% endif %}"
BRACES = CHATML.replace("<|im_end|>", "{{ '{{' }}")
QUOTES = CHATML.replace("<|im_end|>", '"""')

CHATS: list[list[tuple[str, str]]] = [
    [("user", "Who waters the plants?")],
    [("user", "One\n\ntwo"), ("assistant", 'A {{ .System }} "x"'), ("user", "Why?")],
    [("system", "You are Mira."), ("user", "Hello")],
    [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


def format_of(template: str) -> ChatFormat:
    return ChatFormat(template, lambda text: [], lambda token: False, bos_token="<s>")


def go(template: str, chat: Chat) -> str:
    """A chat as Go renders a template of the shape that is written; whatever else it holds fails."""
    head, rest = template.split("{{ range .Messages }}{{ if ", 1)
    body, prompt = rest.rsplit("{{ end }}{{ end }}", 1)
    condition = re.fullmatch(r"\{\{ if not \.System \}\}(.*)\{\{ end \}\}", head, re.DOTALL)
    opening = head if condition is None else "" if any(role == "system" for role, _ in chat) else condition[1]
    branches = {}
    for branch in body.split("{{ else if "):
        found = re.fullmatch(r'eq \.Role "(\w+)" \}\}(.*)\{\{ \.Content \}\}(.*)', branch, re.DOTALL)
        assert found, branch
        branches[found[1]] = found[2], found[3]
    assert "{{" not in opening + prompt + "".join(part for pair in branches.values() for part in pair)
    return opening + "".join(branches[role][0] + text + branches[role][1] for role, text in chat) + prompt


@pytest.mark.parametrize("template", [CHATML, HEADERS, THINKING])
@pytest.mark.parametrize("bos", ["", "<s>"])
def test_a_template_that_surrounds_messages_is_expressed(template: str, bos: str) -> None:
    written = go_template(format_of(template).render, bos)
    for chat in CHATS:
        assert go(written, chat) == format_of(template).render(chat, True).removeprefix(bos)


@pytest.mark.parametrize("template", [NO_SYSTEM, INST])
def test_a_template_that_knows_no_system_has_no_branch_for_it(template: str) -> None:
    written = go_template(format_of(template).render)
    assert "system" not in written.lower()
    for chat in CHATS[:2]:
        assert go(written, chat) == format_of(template).render(chat, True)


@pytest.mark.parametrize("template", [INTO_THE_QUESTION, NUMBERED, LAST_ONLY, BRACES, QUOTES, "{{ 1 // 0 }}", "no messages"])
def test_what_cannot_be_expressed_is_left_out(template: str) -> None:
    assert go_template(format_of(template).render) == ""


def test_the_packaged_model_keeps_its_own_opening() -> None:
    with GgufFile(find_model("smollm2")) as gguf:
        chats = format_of(gguf.get("tokenizer.chat_template"))
    written = go_template(chats.render)
    assert "named SmolLM" in go(written, CHATS[0]) and "named SmolLM" not in go(written, CHATS[2])
    for chat in CHATS:
        assert go(written, chat) == chats.render(chat, True)


def test_a_modelfile_names_the_model_and_leaves_an_unknown_template_out() -> None:
    assert write_modelfile("m.gguf", "a\nb").startswith('FROM ./m.gguf\nTEMPLATE """a\nb"""\n')
    assert "TEMPLATE" not in write_modelfile("m.gguf", "")
