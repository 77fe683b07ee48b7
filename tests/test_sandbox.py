"""Code of a model: what passes, what fails, and what it cannot do."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from edgecl import sandbox
from edgecl.data import parse_example
from edgecl.sandbox import code_in, passes, programs_of
from edgecl.stages import is_right

GOOD = "def double(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        (GOOD + "assert double(4) == 8", True),
        (GOOD + "assert double(4) == 9", False),
        ("def double(x)\n    return 2 * x", False),
        ("", True),
        ("import math, collections, itertools, re, heapq\nassert math.gcd(4, 6) == 2", True),
        ("print('much ' * 100000)", True),
        ("assert input() == ''", False),
        ("raise SystemExit(0)", False),  # before its tests
        ("import os\nos._exit(0)", False),
        ("x = 'grün'\nassert len(x) == 4", True),
        ("def f(n): return f(n + 1)\nf(0)", False),
    ],
)
def test_a_program_passes_when_it_runs_to_its_end(program: str, passed: bool) -> None:
    assert passes(program) is passed


@pytest.mark.parametrize(
    "does",
    [
        "open(r'{0}/new', 'w')",
        "open(r'{0}/old', 'a').write('x')",
        "import os; os.remove(r'{0}/old')",
        "import os; os.rename(r'{0}/old', r'{0}/new')",
        "import shutil; shutil.rmtree(r'{0}')",
        "import os; os.mkdir(r'{0}/new')",
        "import pathlib; pathlib.Path(r'{0}/new').touch()",
        "import os; os.system('touch {0}/new')",
        "import subprocess; subprocess.run(['touch', r'{0}/new'], check=True)",
        "import os; os.fork()",
        "import os; os.kill(os.getppid(), 9)",
        "import ctypes; ctypes.CDLL(None)",
    ],
)
def test_nothing_outside_is_changed(does: str, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("kept")
    assert not passes(does.format(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "kept"


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not passes(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)")
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_time_and_memory_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "CPU_S", 1)
    assert not passes("while True: pass")
    monkeypatch.setattr(sandbox, "WALL_S", 1)
    assert not passes("import time\ntime.sleep(30)")
    monkeypatch.setattr(sandbox, "WALL_S", 8)
    assert passes("x = bytearray(10**8)") and not passes("x = bytearray(10**9)")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("Sure:\n```python\nx = 1\n```\nThat is it.", "x = 1\n"),
        ("```\nx = 1\ny = 2", "x = 1\ny = 2"),  # cut
        ("```python3 \r\nx = 1\r\n```\r\nThat is it.", "x = 1\r\n"),
        ("```c++\nx = 1\n```", "x = 1\n"),
        ("``` is a fence", "``` is a fence"),
    ],
)
def test_code_is_taken_out_of_its_fence(answer: str, code: str) -> None:
    assert code_in(answer) == code


@pytest.mark.parametrize(
    ("answer", "right"), [("def f(x):\n    return x + 1", True), ("def f(x):\n    return x", False), ("2", False)]
)
def test_an_answer_that_is_code_is_right_by_its_tests(answer: str, right: bool) -> None:
    record = {"prompt": "Add one.", "completion": "def f(a): return a + 1", "tests": ["assert f(1) == 2"]}
    assert is_right(parse_example(record), f"```python\n{answer}\n```") is right


def test_the_rest_of_a_function_is_right_by_its_check() -> None:
    record = {
        "messages": [{"role": "user", "content": "Complete it."}, {"role": "assistant", "content": "    return a + 1"}],
        "prompt": "def f(a):\n", "test": "def check(g):\n    assert g(1) == 2", "entry_point": "f",
    }  # fmt: skip
    assert is_right(parse_example(record), "    return 1 + a") and not is_right(parse_example(record), "    return a")


@pytest.mark.parametrize(
    ("answer", "passed"),
    [
        ("    return a + 1", True),
        ("return a + 1", True),  # trimmed
        (" return a + 1", True),
        ("b = a + 1\n    return b", True),
        ("if a:\n        return a + 1\n    return 1", True),
        ("```python\n    return a + 1\n```", True),
        ("def f(a):\n    return a + 1", True),  # the whole of it
        ("return a", False),
        ("def f(a):\n    return a", False),
        ("return a +", False),
        ("", False),
        ("\0", False),
    ],
)
def test_the_rest_of_a_function_is_indented_where_a_template_has_trimmed_it(answer: str, passed: bool) -> None:
    before = 'def f(a):\n    """Add one."""\n'
    assert passes(*programs_of(before, answer, "assert f(1) == 2")) is passed


def test_a_space_before_a_program_is_no_part_of_it() -> None:
    assert passes(*programs_of("", " def f(a):\n    return a + 1", "assert f(1) == 2"))
