"""Examples: every dialect, every kind of bad line, judging, and a chat template turned into ids and a loss mask."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecl.data import Example, common_length, is_correct, normalize, parse_example, parse_lines
from edgecl.errors import DataError, EdgeclError
from edgecl.places import find_model
from edgecl.store import Store
from edgecl.template import ChatFormat
from edgecl_convert import GgufFile, read_vocabulary
from edgecl_convert.llama_model import LlamaModel
from tests.tiny_tokenizers import save, sentencepiece_bpe, write_vocab

QA = (("user", "q"), ("assistant", "a"))
SPECIAL = {"<|im_start|>": 256, "<|im_end|>": 257, "<s>": 258}
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


def encode(text: str) -> list[int]:
    """Bytes as ids, with three special tokens."""
    parts = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
    return [i for part in parts for i in ([SPECIAL[part]] if part in SPECIAL else part.encode())]


def decode(ids: list[int]) -> str:
    names = {number: name.encode() for name, number in SPECIAL.items()}
    return b"".join(names.get(i) or bytes([i]) for i in ids).decode()


def chat(template: str, **options: Any) -> ChatFormat:
    return ChatFormat(template, encode, lambda i: i == SPECIAL["<|im_end|>"], **options)


@pytest.fixture(scope="module")
def chatml() -> ChatFormat:
    with GgufFile(find_model("smollm2")) as gguf:
        return chat(gguf.get("tokenizer.chat_template"))


def turns(role: str, text: str, *pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{role: r, text: t} for r, t in pairs]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": turns("role", "content", *QA)}, QA),
        ({"messages": turns("role", "content", ("system", "s"), *QA, *QA)}, (("system", "s"), *QA, *QA)),
        ({"prompt": "q", "completion": "a"}, QA),
        ({"prompt": "q", "response": "a"}, QA),
        ({"instruction": "q", "output": "a"}, QA),
        ({"instruction": "q", "input": "", "output": "a"}, QA),
        ({"instruction": "q", "input": None, "output": "a"}, QA),
        ({"instruction": "Sort", "input": "3 1", "output": "1 3"}, (("user", "Sort\n\n3 1"), ("assistant", "1 3"))),
        ({"conversations": turns("from", "value", ("human", "q"), ("gpt", "a"))}, QA),
        ({"conversations": turns("from", "value", ("system", "s"), ("user", "q"), ("assistant", "a"))}, (("system", "s"), *QA)),
    ],
)
def test_every_dialect_becomes_the_same_messages(record: dict[str, Any], messages: tuple[tuple[str, str], ...]) -> None:
    assert parse_example(record) == Example(messages)


def test_task_source_and_final_are_read_and_an_argument_overrides_the_task() -> None:
    record = {"prompt": "q", "completion": "a", "task": "maths", "source": "me", "final": 4.5}
    assert parse_example(record, source="file") == Example(QA, "maths", "me", "4.5")
    assert parse_example(record, task="other").task == "other"
    plain = parse_example({"prompt": "q", "completion": "a", "source": 3, "final": None}, source="file")
    assert (plain.task, plain.source, plain.final) == ("default", "file", None)
    assert parse_example({"prompt": "q", "completion": "a", "source": "\udcff"}).source == "?"


def test_identity_is_of_the_messages_and_of_what_comes_before_the_answer() -> None:
    one, other = Example(QA, "t"), Example(QA, "u", "s", "1")
    assert one.hash == other.hash
    corrected = Example((QA[0], ("assistant", "b")))
    assert corrected.prompt_hash == one.prompt_hash and corrected.hash != one.hash
    assert Example((("user", "q2"), QA[1])).prompt_hash != one.prompt_hash
    assert one.answer == "a"


def line(**record: Any) -> bytes:
    return json.dumps(record).encode()


BAD = {
    "not JSON": (b'{"prompt": "q", "completion": ', "is not JSON"),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "a"}', "is not UTF-8"),
    "BOM inside the file": (b'\xef\xbb\xbf{"prompt": "q", "completion": "a"}', "is not JSON"),
    "too deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "too long a number": (b'{"prompt": ' + b"1" * 5000 + b', "completion": "a"}', "4300 digits"),
    "not an object": (b'["q", "a"]', "expected a JSON object, got list"),
    "null": (b"null", "expected a JSON object, got NoneType"),
    "no dialect": (line(question="q", answer="a"), "unknown keys 'answer', 'question'; allowed: messages"),
    "no key": (b"{}", r"unknown keys \(none\)"),
    "line break in a key": (line(**{"a\nb": 1}), r"unknown keys 'a\\nb'"),
    "no turns": (line(messages=[]), "messages must be a list with at least one turn"),
    "turns are text": (line(conversations="hello"), "conversations must be a list"),
    "turn is text": (line(messages=["a\nb"]), r"each turn needs role and content, got 'a\\nb'"),
    "turn without text": (line(messages=[{"role": "user"}]), "each turn needs role and content"),
    "unknown role": (line(messages=turns("role", "content", ("tool", "x"))), "one of system, user, assistant; got 'tool'"),
    "role of another dialect": (line(messages=turns("role", "content", ("human", "q"), ("gpt", "a"))), "role must be one of"),
    "role is a list": (line(messages=[{"role": ["user"], "content": "q"}]), r"role must be one of .*; got \['user'\]"),
    "last turn is the user's": (line(messages=turns("role", "content", *QA, QA[0])), "last message must be the assistant's"),
    "no user": (line(messages=turns("role", "content", ("system", "s"), QA[1])), "no user message"),
    "user says nothing": (line(prompt=" \n", completion="a"), "no user message with text"),
    "empty answer": (line(prompt="q", completion=" \t\n"), "answer is empty"),
    "answer is a number": (line(prompt="q", completion=7), "content of assistant must be a string, got int"),
    "prompt is null": (line(prompt=None, completion="a"), "content of user must be a string, got NoneType"),
    "instruction is null": (line(instruction=None, input="x", output="a"), "instruction must be a string, got NoneType"),
    "input is a list": (line(instruction="q", input=["x"], output="a"), "input must be a string, got list"),
    "half a character": (b'{"prompt": "\\ud83d", "completion": "a"}', "content of user has half a character"),
    "half a character in final": (b'{"prompt": "q", "completion": "a", "final": "\\ud83d"}', "final has half a character"),
    "half a character in task": (b'{"prompt": "q", "completion": "a", "task": "\\ud83d"}', "task must be 1 to 100"),
    "task is empty": (line(prompt="q", completion="a", task=""), "task must be 1 to 100 printable characters, got ''"),
    "task has a line break": (line(prompt="q", completion="a", task="a\nb"), "task must be"),
    "task is too long": (line(prompt="q", completion="a", task="x" * 101), "task must be"),
    "task is a number": (line(prompt="q", completion="a", task=1), "task must be"),
    "final is a list": (line(prompt="q", completion="a", final=[1]), "final must be a string, got list"),
    "final is a bool": (line(prompt="q", completion="a", final=True), "final must be a string, got bool"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_reported_by_number_in_one_line_and_the_good_ones_are_kept(kind: str) -> None:
    bytes_, reason = BAD[kind]
    good, bad = parse_lines([line(prompt="one", completion="a"), bytes_, b"  ", line(prompt="two", completion="a")], "t", "f")
    if "task" in kind:  # a task that the caller names replaces the line's own bad one
        assert len(good) == 3 and not bad
        good, bad = parse_lines([line(prompt="one", completion="a"), bytes_, line(prompt="two", completion="a")], source="f")
    assert [(e.messages[0][1], e.source) for e in good] == [("one", "f"), ("two", "f")]
    ((number, said),) = bad
    assert number == 2
    assert re.search(reason, said) and "\n" not in said
    said.encode("utf-8")  # it can be printed


def test_a_byte_order_mark_before_the_first_line_is_dropped() -> None:
    assert parse_lines([b"\xef\xbb\xbf" + line(prompt="q", completion="a"), b""]) == ([Example(QA)], [])


KEYS = ("messages", "role", "content", "prompt", "completion", "instruction", "input", "output", "task", "final", "x")
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.sampled_from(["user", "assistant", "gpt", "", "\ud83d", "a\nb"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(json_values)
def test_any_json_is_an_example_or_a_reported_line(value: Any) -> None:
    good, bad = parse_lines([json.dumps(value)])
    assert len(good) + len(bad) == 1
    assert all("\n" not in reason for _, reason in bad)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("store") / "replay.db") as opened:
        yield opened


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), TEXTS)
def test_any_text_round_trips_through_the_store(store: Store, pairs: list[tuple[str, str]], source: str) -> None:
    examples = [Example((("user", q), ("assistant", a)), source=source, final=a) for q, a in pairs]
    store.add(examples, 0.0)
    rows = store.rows("pending")
    store.settle([row.id for row in rows], [], 1, archive=False)  # an empty store for the next example
    assert {row.example.prompt_hash: row.example for row in rows} == {e.prompt_hash: e for e in examples}


# --- judging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "final", "answer", "correct"),
    [
        ("Mira, on Fridays.", None, "mira,  on\nFRIDAYS", True),
        ("Straße", None, "STRASSE!", True),
        ("a b", None, "ab", False),
        ("x", "7", "3 + 4 = 7", True),
        ("x", "7", "7, I mean 8", False),
        ("x", "1,250", "that makes 1250.0 in all.", True),
        ("x", "1234", "It is 1,234.", True),
        ("x", "-3", "minus: -3", True),
        ("x", "3", "-3", False),
        ("x", "0.5", "0.50", True),
        ("x", "#### 12", "so 12", True),
        ("x", "7", "seven", False),
        ("x", "none", "None.", True),
        ("x", "1e-05", "It is 0.00001", True),
        ("x", "1e-05", "-5", False),
        ("x", "-5", "that is −5", True),
        ("x", "5", "that is −5", False),
    ],
)
def test_an_answer_is_right_by_its_last_number_or_its_words(wanted: str, final: str | None, answer: str, correct: bool) -> None:
    assert is_correct(Example((QA[0], ("assistant", wanted)), final=final), answer) is correct


MESSAGES = turns("role", "content", *QA)
CHECK = "def check(c): assert c()"


@pytest.mark.parametrize(
    ("record", "program"),
    [
        ({"tests": ["assert f(1)", "assert f(2)"]}, ("", "\nassert f(1)\nassert f(2)")),
        ({"tests": ["assert f(1)"], "setup": "import math"}, ("", "import math\nassert f(1)")),
        ({"test": CHECK, "entry_point": "f", "prompt": "def f():\n"}, ("def f():\n", f"{CHECK}\ncheck(f)")),
        ({"test": "of patience"}, None),
    ],
)
def test_answers_that_are_code_bring_their_tests(record: dict[str, Any], program: Any, tmp_path: Path) -> None:
    example = parse_example({"messages": MESSAGES} | record)
    assert example.program == program
    with Store(tmp_path / "replay.db") as store:
        store.add([example], 0.0)
        assert store.rows("pending")[0].example == example


@pytest.mark.parametrize("record", [{"tests": []}, {"tests": "assert 1"}, {"tests": [1]}, {"test": 1, "entry_point": "f"}])
def test_tests_of_another_kind_are_refused(record: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="test"):
        parse_example({"messages": MESSAGES} | record)


@given(TEXTS)
def test_normalizing_twice_changes_nothing_and_a_text_is_its_own_answer(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)
    assert is_correct(Example((QA[0], ("assistant", text))), f"  {text} ")
    is_correct(Example(QA, final="7"), text)  # whatever a model says


# --- templates and tokens ---------------------------------------------------------------------------------------------


def supervised(format_: ChatFormat, *messages: tuple[str, str]) -> tuple[str, str]:
    encoded = format_.encode(Example(messages))
    assert len(encoded.ids) == len(encoded.supervised)
    return decode(encoded.ids), decode([i for i, yes in zip(encoded.ids, encoded.supervised, strict=True) if yes])


def test_the_end_of_turn_is_supervised_and_what_follows_it_is_not(chatml: ChatFormat) -> None:
    text, asked = supervised(chatml, ("system", "s"), *QA)
    assert text == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
    assert asked == "a<|im_end|>"
    assert chatml.turn(QA)[2] == encode("\n")


def test_every_assistant_turn_of_a_chat_is_supervised_and_nothing_else(chatml: ChatFormat) -> None:
    text, asked = supervised(chatml, QA[0], ("assistant", "grün"), ("user", "and?"), ("assistant", "blau"))
    assert asked == "grün<|im_end|>blau<|im_end|>"
    assert text.startswith("<|im_start|>system\nYou are") and text.endswith("grün<|im_end|>\n<|im_start|>user\n"
        "and?<|im_end|>\n<|im_start|>assistant\nblau<|im_end|>")  # fmt: skip


def test_what_is_scored_is_the_end_of_what_is_trained(chatml: ChatFormat) -> None:
    example = Example((*QA, ("user", "q2"), ("assistant", "a2")))
    prompt, wanted = chatml.row(example)
    assert prompt == chatml.prompt(example.messages[:-1])
    assert prompt + wanted == chatml.encode(example).ids


def test_the_template_around_a_question(chatml: ChatFormat) -> None:
    before, after = chatml.around_question
    assert decode(before).startswith("<|im_start|>system\n") and decode(before).endswith("<|im_start|>user\n")
    assert decode(after) == "<|im_end|>\n<|im_start|>assistant\n"
    assert before + encode("Whose?") + after == chatml.prompt([("user", "Whose?")])


@pytest.mark.parametrize(
    ("messages", "asked"),
    [
        (QA, "q<|im_end|>"),
        ((*QA, ("user", "and?"), ("assistant", "b")), "q<|im_end|>"),  # the first turn alone
        ((("system", "s"), *QA), ""),  # begins otherwise
    ],
)
def test_what_the_user_asks_first_is_marked(chatml: ChatFormat, messages: tuple[tuple[str, str], ...], asked: str) -> None:
    encoded = chatml.encode(Example(messages))
    assert decode(encoded.ids[slice(*encoded.asked)]) == asked


def test_an_answer_has_the_ids_that_it_has_in_a_chat_where_the_vocabulary_puts_a_space_in_front(tmp_path: Path) -> None:
    folder = save(tmp_path / "spm", sentencepiece_bpe())
    write_vocab(tmp_path / "spm.gguf", read_vocabulary(folder).fields)
    with LlamaModel(tmp_path / "spm.gguf", vocab_only=True) as model:
        end = model.encode("</s>")[-1]
        chats = ChatFormat(LLAMA2.replace("<|im_end|>", "</s>"), model.encode, lambda i: i == end)
        messages = (*QA, ("user", "and then?"), ("assistant", "the other"))
        encoded = chats.encode(Example(messages))
        assert encoded.ids == model.encode(chats.render(messages, False))[: len(encoded.ids)]
        learned = [i for i, yes in zip(encoded.ids, encoded.supervised, strict=True) if yes]
        assert learned.count(end) == 2, "both answers are learned"


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [([], 0), ([[1, 2]], 2), ([[1, 2, 3], [1, 2], [1, 2, 9]], 2), ([[1], [2, 1], [1, 1]], 0), ([[], [1]], 0)],
)
def test_common_length(rows: list[list[int]], wanted: int) -> None:
    assert common_length(rows) == wanted


@settings(deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS.filter(bool)), min_size=1, max_size=3))
def test_masks_hold_for_any_text(chatml: ChatFormat, pairs: list[tuple[str, str]]) -> None:
    messages = [turn for q, a in pairs for turn in (("user", q), ("assistant", a))]
    encoded = chatml.encode(Example(tuple(messages)))
    asked = [i for i, yes in zip(encoded.ids, encoded.supervised, strict=True) if yes]
    assert decode(asked) == "".join(a + "<|im_end|>" for _, a in pairs)
    assert encoded.supervised[-1]


@pytest.mark.parametrize("template", [LLAMA2, LLAMA2.removeprefix("{{ bos_token }}")])
def test_the_first_token_is_written_once(template: str) -> None:
    format_ = chat(template, bos=SPECIAL["<s>"], bos_token="<s>")
    assert decode(format_.prompt([QA[0]])) == "<s>[INST] q [/INST]"
    text, asked = supervised(format_, *QA, *QA)
    assert text == "<s>[INST] q [/INST] a<|im_end|>[INST] q [/INST] a<|im_end|>"
    assert asked == " a<|im_end|> a<|im_end|>"


def test_only_the_last_answer_stays_when_the_template_rewrites_earlier_turns() -> None:
    forgetful = chat(
        "{% for m in messages %}{{ m.role }}:{{ '-' if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    text, asked = supervised(forgetful, QA[0], ("assistant", "long"), ("user", "r"), ("assistant", "b"))
    assert text == "user:q<|im_end|>assistant:-<|im_end|>user:r<|im_end|>assistant:b<|im_end|>"
    assert asked == "b<|im_end|>"


def test_every_answer_of_a_chat_is_checked(chatml: ChatFormat) -> None:
    strict = chat("{% if messages[0].role != 'user' %}{{ raise_exception('a user begins') }}{% endif %}" + LLAMA2)
    for template in (strict, chatml):
        template.check(Example((*QA, *QA)))
        with pytest.raises(DataError, match="the base's chat template"):
            template.check(Example((QA[1], *QA)))  # before its first answer nobody said anything
    with pytest.raises(DataError, match="refuses this chat: a user begins"):
        strict.check(Example((("system", "s"), *QA)))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ 1 / 0 }}",
        "{{ 'x' | nothing }}",
        "{{ messages[9].content.upper() }}",
        "{{ ''.__class__.__mro__ }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% for m in messages %}",
        "{% if add_generation_prompt %}answer:{% endif %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_refuses_or_hides_the_answer_is_a_data_error(template: str) -> None:
    with pytest.raises(DataError, match=r"template|answer has no token") as caught:
        chat(template).encode(Example(QA))
    assert isinstance(caught.value, EdgeclError)
    assert "\n" not in str(caught.value)


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    reach = "{{ cycler.__init__.__globals__.os.mkdir('" + str(tmp_path / "made") + "') }}"
    with pytest.raises(DataError, match="refuses this chat"):
        chat(reach).prompt(QA[:1])
    assert not list(tmp_path.iterdir())
