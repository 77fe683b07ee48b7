"""What names a person or opens a door, replaced by a placeholder before a row is stored: "[e-mail]", "[key]", ...

A model learns its rows by heart and says them to whoever asks; what never reached the store cannot be said. Rules know forms,
not meanings, and where a form is also that of harmless text a check decides: Luhn's for cards, the remainder of an IBAN, for
keys how often letters and digits take turns. Hexadecimal digests, dates, versions and arithmetic stay as they are.

What is written in Chinese, Japanese, Korean or Thai may stand right beside what is replaced, and stays.

*Does not cover*: names, addresses, passwords that look like words, phone numbers without country or area code, e-mail addresses
in those scripts.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from .data import Example
from .errors import DataError

_NO_DIGIT = re.compile(r"[^0-9]")
_COUNTING = "01234567890123456789"
_FRACTION = re.compile(r"\+\d+\.\d+")
_HEX = re.compile(r"(?:0x)?[0-9a-fA-F-]+")


def _is_card(text: str) -> bool:
    """Return whether the digits add up as Luhn wants it."""
    digits = [int(digit) for digit in reversed(_NO_DIGIT.sub("", text))]
    return (sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])) % 10 == 0


def _is_iban(text: str) -> bool:
    """Return whether the number leaves 1 when divided by 97 (ISO 13616), with letters as 10 to 35."""
    code = text.replace(" ", "")
    return 15 <= len(code) <= 34 and int("".join(str(int(sign, 36)) for sign in code[4:] + code[:4])) % 97 == 1


def _is_phone(text: str) -> bool:
    """Return whether there are as many digits as a phone number has, and none of them binary, counted up or a fraction."""
    digits = _NO_DIGIT.sub("", text)
    return (
        9 <= len(digits) <= 15 and not set(digits) <= {"0", "1"} and digits not in _COUNTING and not _FRACTION.fullmatch(text)
    )


def _is_random(text: str) -> bool:
    """Return whether letters, capitals and digits take turns as in no word or name; digests, paths and C++ symbols are none."""
    if not _has_digits(text) or _HEX.fullmatch(text) or text.count("/") > 3 or text.startswith("_Z"):
        return False
    kinds = ["d" if sign.isdigit() else "u" if sign.isupper() else "l" if sign.islower() else "" for sign in text]
    turns = sum(a != b for a, b in itertools.pairwise(kinds) if a and b)
    return turns >= 0.4 * len(text)  # 0.6 is the mean of random letters and digits; names with numbers stay below


def _has_digits(text: str) -> bool:
    return sum(sign.isdigit() for sign in text) >= 2


def _always(_: str) -> bool:
    return True


_L = "A-Za-z\u00c0-\u0dff\u10a0-\u10ff\u1200-\u137f\u1e00-\u1fff"  # of scripts that put spaces between words
_DOMAIN = rf"(?:[{_L}\w-]{{1,63}}\.){{1,8}}[{_L}]{{2,24}}"
_EMAIL = rf"(?<![{_L}\d.%+-])(?!git@|_)[{_L}\w.%+-]{{1,64}}@{_DOMAIN}(?!_?[{_L}\d(\[]|\.[{_L}\w])"
_PREFIXES = "sk-|[sprw][kh](?:sec)?_(?:live|test)_|gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|hf_|npm_|pypi-"
_RULES: tuple[tuple[str, str, Callable[[str], bool]], ...] = (  # what an earlier one replaced, a later one does not see
    ("key", r"(?s)-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY-----.*?(?:-----END (?:[A-Z]+ ){0,3}PRIVATE KEY-----|\Z)", _always),
    ("key", r"(?<=(?i:bearer) )[\w.~+/=-]{15,}[\w=]", _has_digits),
    ("key", r"(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*", _always),  # a JSON web token
    ("key", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{35}(?![\w-])", _always),
    ("key", rf"\b(?:{_PREFIXES})[\w-]{{16,}}|\bSG\.[\w-]{{16,}}\.[\w-]{{16,}}", _has_digits),
    ("key", r"(?<![\w+/.-])(?!sha\d{3}-)[A-Za-z0-9_+/-]{24,}={0,2}(?![\w+/-])", _is_random),
    ("e-mail", _EMAIL, _always),
    ("IBAN", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", _is_iban),
    ("card", r"(?<![\w.-])(?:[2-6]\d{3}([ -])\d{4}\1\d{4}\1\d{4}|3[47]\d\d([ -])\d{6}\2\d{5})(?![\w-]|\.\d)", _is_card),
    ("card", r"(?<![\w.-])(?:[4-6]\d{15}|2[2-7]\d{14}|3[47]\d{13})(?![\w-]|\.\d)", _is_card),
    ("phone", r"(?<![\w)+-])(?<!\d\.)\+[1-9]\d{0,14}(?:[ ./-]?\(\d{1,5}\)\d{0,12}|[ ./-]\d{1,14}){0,7}(?![\w-])", _is_phone),
    ("phone", r"(?<![\w.+/-])(?:1-)?(?:\(\d{3}\) ?\d{3}[ .-]|\d{3}-\d{3}-|\d{3}\.\d{3}\.)\d{4}(?![\w-]|\.\d)", _is_phone),
    ("phone", r"(?<![\w.+/-])\(?0[1-9]\d{1,3}(?:\) ?|[ /-])[1-9]\d{1,7}(?:[ -]\d{2,5}){0,4}(?![\w:-]|\.\d)", _is_phone),
    ("phone", r"(?<![\w.+/-])(?:0[1-9](?:[ .-]\d\d){4}|0[1-9]\d{7,9})(?![\w:-]|\.\d)", _is_phone),
    ("phone", r"(?<![\w.+/-])(?<!\d )00[1-9]\d{0,3}(?:[ /-]?\d{2,8}){2,5}(?![\w:-]|\.\d)", _is_phone),
)
_COMPILED = [(kind, re.compile(expression, re.ASCII), check) for kind, expression, check in _RULES]
_PLACEHOLDER = re.compile(r"\[(?:e-mail|phone|card|IBAN|key)\]")


def redact_text(text: str) -> tuple[str, Counter[str]]:
    """Return a text with placeholders for what the rules find, and how many were replaced by kind."""
    counts: Counter[str] = Counter()

    def placeholder(found: re.Match[str], kind: str, check: Callable[[str], bool]) -> str:
        if not check(found[0]):
            return found[0]
        counts[kind] += 1
        return f"[{kind}]"

    for kind, expression, check in _COMPILED:
        text = expression.sub(partial(placeholder, kind=kind, check=check), text)
    return text, counts


def redact(example: Example, counts: Counter[str]) -> Example:
    """Return an example with placeholders in all of its texts, and add to `counts` how many were replaced by kind.

    Raises:
        DataError: nothing but placeholders is left of the answer. A model that learned it would only learn to say "[e-mail]",
            so the row is refused, and its giver told.
    """
    found: Counter[str] = Counter()

    def clean(text: str) -> str:
        kept, n = redact_text(text)
        found.update(n)
        return kept

    kept = replace(
        example,
        messages=tuple((role, clean(content)) for role, content in example.messages),
        source=clean(example.source),
        final=clean(example.final) if example.final else example.final,
        program=(clean(example.program[0]), clean(example.program[1])) if example.program else None,
    )
    if kept.answer != example.answer and not any(map(str.isalnum, _PLACEHOLDER.sub("", kept.answer))):
        raise DataError(
            f"the answer is redacted to {kept.answer.strip()}, and nothing is left to learn; "
            "privacy.redact = false in edgecl.toml keeps it"
        )
    counts.update(found)
    return kept
