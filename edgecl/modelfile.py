"""The Modelfile of a model for ollama, whose chat templates are Go's while a GGUF file's are Jinja's.

A template is not read but asked: a few chats are rendered, what stands around each message is cut out, and the Go template that
puts the same around them is kept only if it gives longer chats back letter for letter.

*Does not cover*: templates that cut white space off a message, and tools; those parts of a chat come out otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .errors import DataError

Chat = Sequence[tuple[str, str]]
Render = Callable[[Chat, bool], str]  # (messages, add_generation_prompt)

_SYSTEM, _ASKED, _ANSWERED, _AGAIN = (
    ("system", "edgecl-s"),
    ("user", "edgecl-1"),
    ("assistant", "edgecl-2"),
    ("user", "edgecl-3"),
)
_PROBES = ("Two words", 'Of two lines,\nwith "quotes", <b>, {{ .Content }} and a \'', "3", "Four", "Is five enough?")


class _Inexpressible(ValueError):
    pass


@dataclass
class Turns:
    """A chat template in its plainest form: what stands around each message.

    Attributes:
        opening: what a chat without a system message begins with.
        around: text before and after a message, by role; no system where the template refuses one.
        prompt: after which the assistant begins to answer.
    """

    opening: str
    prompt: str
    around: dict[str, tuple[str, str]] = field(default_factory=dict)

    def text(self, chat: Chat) -> str:
        """Return a chat up to where the assistant begins to answer."""
        opening = "" if chat[0][0] == "system" else self.opening
        return opening + "".join(self.around[role][0] + text + self.around[role][1] for role, text in chat) + self.prompt


def write_modelfile(model: str, template: str) -> str:
    """Return the text of a Modelfile.

    Args:
        model: file name of the GGUF beside it.
        template: a Go template; empty where none is known, ollama then goes by the file's own.
    """
    lines = [f"FROM ./{model}"] + ([f'TEMPLATE """{template}"""'] if template else [])
    return "\n".join([*lines, "# greedy, as it was measured", "PARAMETER temperature 0", ""])


def go_template(render: Render, bos: str = "") -> str:
    """Return a chat template as ollama's Go template; empty where it cannot be expressed.

    Args:
        render: the template.
        bos: what the vocabulary puts before every chat itself, so that the template must not.
    """
    try:
        turns = _turns(render)
        _check(turns, render)
    except (_Inexpressible, DataError):
        return ""
    opening = turns.opening.removeprefix(bos)
    if "system" in turns.around:
        before, after = turns.around["system"]
        turns.around["system"] = (before.removeprefix(bos), after)
        opening = f"{{{{ if not .System }}}}{opening}{{{{ end }}}}" if opening else ""
    branches = [
        f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ ' for role, (before, after) in turns.around.items()
    ]
    return f"{opening}{{{{ range .Messages }}}}{{{{ {'else '.join(branches)}end }}}}{{{{ end }}}}{turns.prompt}"


def _turns(render: Render) -> Turns:
    """Cut what stands around messages out of rendered chats.

    Raises:
        DataError: the template refuses a chat of user and assistant.
        _Inexpressible: what it puts around a message depends on more than its role.
    """
    _, after_user = _cut(render, [_ASKED], False)
    prompt = _without_start(_cut(render, [_ASKED], True)[1], after_user)
    after_answer = _cut(render, [_ASKED, _ANSWERED], False)[2]
    start, between, after, _ = _cut(render, [_ASKED, _ANSWERED, _AGAIN], True)
    before_user = _without_start(after, after_answer)
    turns = Turns(_without_end(start, before_user), prompt)
    try:
        before, after, _ = _cut(render, [_SYSTEM, _ASKED], True)
        turns.around["system"] = (before, _without_end(after, before_user))
    except DataError:
        pass  # it knows no system message
    turns.around["user"] = (before_user, after_user)
    turns.around["assistant"] = (_without_start(between, after_user), after_answer)
    return turns


def _cut(render: Render, chat: Chat, add_generation_prompt: bool) -> list[str]:
    """Return what stands before, between and after the messages of a chat."""
    rest, pieces = render(chat, add_generation_prompt), []
    for _, content in chat:
        piece, found, rest = rest.partition(content)
        if not found:
            raise _Inexpressible
        pieces.append(piece)
    return [*pieces, rest]


def _check(turns: Turns, render: Render) -> None:
    """Compare with the template on longer chats, and look for what Go and a Modelfile would read otherwise."""
    for n in (1, 3, 5):
        chat = list(zip(("user", "assistant", "user", "assistant", "user")[:n], _PROBES, strict=False))
        chats = [chat, [("system", "Be brief.\nBe kind."), *chat]] if "system" in turns.around else [chat]
        if any(turns.text(one) != render(one, True) for one in chats):
            raise _Inexpressible
    literal = [turns.opening, turns.prompt, *(part for pair in turns.around.values() for part in pair)]
    if any("{{" in text or '"""' in text for text in literal) or turns.prompt.endswith('"'):
        raise _Inexpressible


def _without_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise _Inexpressible
    return text[len(start) :]


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise _Inexpressible
    return text[: len(text) - len(end)]
