"""Redaction: what is replaced, what survives, and that nothing of it touches the disk."""

import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edgecl import Example, Learner
from edgecl.cli import cli
from edgecl.data import parse_lines
from edgecl.errors import DataError
from edgecl.redact import redact, redact_text
from tests import tiny

KEY = "aV3xQ9tK7mZp2LrW8sYc4NdB6hJf"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA7\nqk/X\n-----END RSA PRIVATE KEY-----"

FOUND = [
    ("mail mira.o+list@mail.example.co.uk, please", "mail [e-mail], please"),
    ("<mira_o@example.org>;müller@käse.de", "<[e-mail]>;[e-mail]"),
    ("Write to mira@example.com.", "Write to [e-mail]."),
    ("login mira@example.com:hunter2", "login [e-mail]:hunter2"),
    ("call +49 30 1234567 or +49 (0)30/123-4567", "call [phone] or [phone]"),
    ("(+1-212-555-0199)", "([phone])"),
    ("+14155550123", "[phone]"),
    ("555-867-5309, (555) 867-5309 and 1-800-555-0199.", "[phone], [phone] and [phone]."),
    ("Tel. 0171 1234567, 030/1234567, 020 7946 0958", "Tel. [phone], [phone], [phone]"),
    ("06 12 34 56 78, 06.12.34.56.78, 0612345678 or (030) 12 34 56 78", "[phone], [phone], [phone] or [phone]"),
    ("07911123456; 0049 170 1234567, 00491701234567", "[phone]; [phone], [phone]"),
    ("card 4111 1111 1111 1111 exp 12/27", "card [card] exp 12/27"),
    ("5500-0000-0000-0004, 340000000000009, 3782 822463 10005", "[card], [card], [card]"),
    ("card=4111111111111111.", "card=[card]."),
    ("IBAN DE89 3704 0044 0532 0130 00 at the bank", "IBAN [IBAN] at the bank"),
    ("GB82WEST12345698765432,", "[IBAN],"),
    (f"key: {KEY}", "key: [key]"),
    (f"API_KEY='{KEY}'; x = 1", "API_KEY='[key]'; x = 1"),
    ("SECRET=8fJ2k+Lm/9QwErT5yUiOp3AsDfGh7ZxCvBnM4q1W==", "SECRET=[key]"),
    ("export KEY=sk-abc123def456ghi789jkl012", "export KEY=[key]"),
    ("sk-proj-Zk3_9dJ-2mQpL8vXw7", "[key]"),
    ("aws AKIAIOSFODNN7EXAMPLE.", "aws [key]."),
    ("ghp_16C7e42F292c6912E7710c838347Ae178B4a", "[key]"),
    ("SG.ngeVfQFYQlKU0ufo8x5d1A.TwL2iGABf9DHoTf-09kqeF8tAmbihYzrnopKc", "[key]"),
    ("sk_live_4eC39HqLyjWDarjtT1zdp7dc", "[key]"),
    ("Authorization: Bearer abcdef1234567890abcdef", "Authorization: Bearer [key]"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN", "[key]"),
    (f"here:\n{PEM}\nkeep it", "here:\n[key]\nkeep it"),
    (PEM[:60], "[key]"),  # cut off
    ("我的卡号是4111111111111111。电话+8613812345678谢谢", "我的卡号是[card]。电话[phone]谢谢"),
    ("010-1234-5678로 전화, 密钥sk-abc123def456ghi789jkl012也是", "[phone]로 전화, 密钥[key]也是"),
    ("我的邮箱是anna@example.com谢谢, メールはanna@example.co.jpです", "我的邮箱是[e-mail]谢谢, メールは[e-mail]です"),
    ("почта анна@пример.рф, อีเมลanna@example.comค่ะ", "почта [e-mail], อีเมล[e-mail]ค่ะ"),
    ("anna@nguyễn.vn, nguyễn@example.vn, ნინო@example.ge", "[e-mail], [e-mail], [e-mail]"),
    ("_anna@example.com_ or Tel.+49 30 1234567", "_[e-mail]_ or Tel.[phone]"),
]

KEPT = [
    "On 2024-11-25, at 10:30:00; 25.11.2024 or 11/25/2024, 01-02-2024, 01 02 2024",
    "2024-11-25T10:30:00Z 2024-11-25T10:30:00.123456+02:00 20241125T103000Z 1700000000 1700000000000 1700000000000000",
    "version 1.2.3, v2.13.0+cpu, 10.0.19041.1288, 3.11.7-rc1, numpy>=1.26.4,<2.0.0, libc 2.36-9+deb12u4",
    "12 + 34 = 46; 123456789 * 987654321 = 121932631112635269; 3.14159265358979; +1.23456789; -5e-10; 1,000,000,000",
    "100 200 300 400; 555 - 123 - 4567; 2**64 = 18446744073709551616; 1/3 = 0.3333333333333333; 5+1234567890",
    "0123456789 and 012345678; 01-12-2024 10:30, 01.12.2024 10:30, 01 12 2024 10:30:00; 0.123456789, 007, 00:12:34",
    "0101 1010 1101 0001, 0x7fff5fbff8c0, 0b101010, chmod 0755 a && chmod 0644 b",
    "i need $20000 transferred from my savings; the answer is #### 4080; order 4111111111111112, row 1234567812345678",
    "192.168.100.200:8080, fe80::1ff:fe23:4567:890a, 00:1A:2B:3C:4D:5E",
    "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855, commit da39a3ee5e6b4b0d3255bfef95601890afd80709",
    "md5 D41D8CD98F00B204E9800998ECF8427E, id 123e4567-e89b-12d3-a456-426614174000",
    '"integrity": "sha512-z4PhNX7vuL3xVChQ1m2AB9Yg5AULVxXcg/SpIdNs6c5H0NE8XYXysP+DGNKHfuwvY7kxvUdBeoGlODJ6+SfaPg=="',
    "@app.route('/x')\ndef f(x: int) -> int:\n    return a@b + q@k.transpose(-2, -1) + w@x.T + x@self.weight_ih",
    "git clone git@github.com:owner/repo.git && pip install pkg@1.2.3 user@localhost",
    "class AbstractSingletonProxyFactoryBean2Implementation(XMLHttpRequestFactory3): pass",
    "test_matrix_multiplication_of_3_by_4_and_4_by_5 = convert_to_base_16_then_2",
    "move_num('Its11our12path13to14see15things16do17things') and Cool543TriksMake987Trips",
    "_ZN4llvm12DenseMapBaseINS_8DenseMapIPKNS_5ValueENS",
    "/home/User1/Projects/MyApp2/src/Main3.java, /usr/lib/python3/dist-packages/x86_64-linux-gnu",
    "r1bqkb1r/pp2pppp/2n2n2/3p4/3P4/2N2N2/PP2PPPP/R1BQKB1R w KQkq - 0 5",
    "the bearer of bad news; a bearer authentication-scheme; sk-learn-compatible-estimators; task-oriented-dialogues-2024",
    "ISBN 978-3-16-148410-0, 0-306-40615-2; DOI 10.1000/182; C6H12O6; the 1990s; 24/7; 50-50; 4-4-2",
    "DE and GB are codes; DE89 3704 0044 0532 0130 01 has a wrong check digit",
    "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----",
    "Screenshot_20241125-103000_Chrome.png IMG-20240101-WA0001.jpg",
    "SELECT * FROM t WHERE id = 5 AND name LIKE '%@%'; for (i=0;i<10;i++) a[i]+=1;",
]


@pytest.mark.parametrize(("text", "wanted"), FOUND)
def test_what_is_replaced(text: str, wanted: str) -> None:
    assert redact_text(text)[0] == wanted


@pytest.mark.parametrize("text", KEPT)
def test_what_survives(text: str) -> None:
    assert redact_text(text) == (text, Counter())


def test_what_was_replaced_is_counted_by_kind() -> None:
    text = f"a@example.org b@example.org +14155550123 4111111111111111 {KEY} GB82WEST12345698765432"
    assert redact_text(text)[1] == {"e-mail": 2, "phone": 1, "card": 1, "key": 1, "IBAN": 1}


@given(st.text(alphabet="+-.()/@:= \n0123456789abAZ", max_size=300))
def test_a_text_changes_exactly_where_something_is_counted(text: str) -> None:
    once, counts = redact_text(text)
    assert (once == text) == (not counts)


@pytest.mark.parametrize(
    "piece", ["a", "1", "a1B", "+1 ", "a@", "a.", "0123 ", "-----BEGIN RSA PRIVATE KEY-----", "sk-", "eyJ-", "AB12 "]
)
def test_a_long_text_is_searched_in_proportional_time(piece: str) -> None:
    redact_text(piece * (200_000 // len(piece)) + "!")  # a rule that backtracks would not come back


# --- examples ---------------------------------------------------------------------------------------------------------


def test_every_text_of_an_example_is_redacted_and_equal_ones_alike() -> None:
    secret = "mira@example.org"
    example = Example(
        (("system", secret), ("user", f"ask {secret}"), ("assistant", f"I wrote {secret}")),
        "t",
        f"from {secret}",
        final="+14155550123",
        program=(f"a = '{secret}'", f"assert f('{secret}')"),
    )
    counts: Counter[str] = Counter()
    kept = redact(example, counts)
    assert kept == Example(
        (("system", "[e-mail]"), ("user", "ask [e-mail]"), ("assistant", "I wrote [e-mail]")),
        "t",
        "from [e-mail]",
        final="[phone]",
        program=("a = '[e-mail]'", "assert f('[e-mail]')"),
    )
    assert counts == {"e-mail": 6, "phone": 1}


def test_an_answer_of_nothing_but_a_placeholder_is_refused_by_its_line() -> None:
    lines = ['{"prompt": "Who?", "completion": "Mira"}', '{"prompt": "Her address?", "completion": "mira@example.org."}']
    counts: Counter[str] = Counter()
    good, bad = parse_lines(lines, clean=lambda example: redact(example, counts))
    assert [row.answer for row in good] == ["Mira"] and not counts
    ((number, reason),) = bad
    assert number == 2 and "redacted to [e-mail]." in reason and "mira" not in reason and "privacy.redact" in reason
    with pytest.raises(DataError):
        redact(Example((("user", "q"), ("assistant", f"{KEY} {KEY}"))), counts)
    said = Example((("user", "q"), ("assistant", "[e-mail]")))  # its own word
    assert redact(said, counts) == said


def test_observe_redacts_before_anything_is_stored_and_says_so(tmp_path: Path) -> None:
    base, home = tiny.build(tmp_path / "tiny.gguf")[0], tmp_path / "home"
    rows = [
        Example((("user", "I am mira@example.org"), ("assistant", "Hello"))),
        json.dumps({"prompt": "and my key?", "completion": f"It is {KEY}."}),
        json.dumps({"prompt": "and my address?", "completion": "mira@example.org"}),
    ]
    with Learner.init(base, home) as learner:
        report = learner.observe(rows)
        assert (report.added, report.redacted, [n for n, _ in report.bad]) == (2, {"e-mail": 1, "key": 1}, [3])
        asked = {row.example.messages[0][1]: row.example.answer for row in learner.store.rows("pending")}
        assert asked == {"I am [e-mail]": "Hello", "and my key?": "It is [key]."}
        files = b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())
        assert b"mira@" not in files and KEY.encode() not in files and b"[e-mail]" in files
    told = CliRunner().invoke(cli, ["--home", str(home), "observe", "-"], input=rows[1])
    assert told.exit_code == 0 and "redacted before storing: 1 [key]" in told.output
    settings = home / "edgecl.toml"
    settings.write_text(settings.read_text().replace("redact = true", "redact = false"))
    with Learner(home) as learner:
        report = learner.observe(rows)
        assert (report.added, report.redacted, report.bad) == (3, {}, [])
