"""Texts on which wrong tokenizers differ, written for this project.

`TORTURE` is what people write and what breaks converters: code, numbers, many scripts, marks that combine, emoji that join,
every kind of white space, very long words. `CLASSES` holds one or two characters of each class that a pre-tokenizer can tell
apart; all strings of up to three of them are what pre-tokenizers are compared on. `PLAIN` is ordinary text,
which a model can predict, for its logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

_SPACES = " \t\n\r\x0b\x0c\x85\u00a0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
_INVISIBLE = "\x00\x01\x1b\x1c\x1f\x7f\u00ad\u180e\u200b\u200c\u200d\u200e\u2060\ufeff\ufffd\ue000\u0378"

CLASSES = "aSt'1٣½ \t\n\r\u00a0.!+_中é\u0301\u0e31😀\u200d\x00"

TORTURE: tuple[str, ...] = (
    "",
    " ",
    "a",
    "The old lighthouse keeper counted 17 boats, then 18; the last one had no lights.",
    "  two spaces in front, two behind  ",
    "a b  c   d    e     f      g       h        i",
    "\n",
    "\n\n\n",
    "one\ntwo\r\nthree\rfour\n\n  five\n \n\tsix\t\tseven \n",
    "\t\tindented\n\t    mixed\n    \tother way\n",
    "trailing newline and spaces \n   \n   ",
    "don't DON'T we'll WE'LL I'm I'M they've THEY'VE he'd HE'D you're YOU'RE it's IT'S 'tis '90s rock'n'roll O'Neill''s",
    "it’s she’ll ‘single’ “double” „low“ «guillemets» ‹single› … – — ‑ ‐",
    "0 1 12 123 1234 12345 123456 1234567 12345678 123456789 1234567890",
    "3.14159 -2.5e-10 1,000,000.00 1_000_000 0xDEADBEEF 0b1010 0o17 1e5 .5 5. 50% $9.99 €1.234,56 £3 ¥500",
    "v2.10.3-rc1+build.77 192.168.0.1 2001:db8::ff00:42:8329 2026-11-22T06:49:12Z 12:30 #42 C3PO R2-D2 H2O CO₂ m² x³",
    "½ ¼ ² ³ ① ② Ⅷ ⅻ ٣ ٤٢ ४२ ๔๒ 四十二 〇 １２３",
    'def f(x: int = 3) -> dict[str, int]:\n    """Doc."""\n    return {f\'{x!r}\': x ** 2 for _ in range(10) if x != -1}\n',
    'for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; /* why? */ } // done\n#include <stdio.h>\nprintf("%d\\n", *p->q);',
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 AND name LIKE '%o\\'Neil%' GROUP BY 1;--",
    '<div class="a b" data-x=\'{"k": [1, 2.0, null, true]}\'>&nbsp;&lt;tag/&gt;</div><!-- c -->',
    "$ grep -rn --include='*.py' \"TODO\" ./src | awk '{print $1}' > out.txt 2>&1 && echo $? || exit 1",
    "https://user:pass@example.org:8080/a/b%20c/?q=1&r=%C3%A9#frag mailto:mira.o@example.com @handle #tag ~/.config \\\\srv\\x",
    r"\begin{align} \alpha_{i}^{2} &= \sum_{k=0}^{\infty} \frac{x^k}{k!} \\ E &= mc^2 \end{align}",
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case __dunder__ x1y2z3 iPhone15Pro",
    "!!! ??? ... ,,, --- === *** ### ((( ))) [[ ]] {{ }} <<< >>> ||| &&& ^^^ ~~~ ``` ''' \"\"\" :-) ;) <3 ¯\\_(ツ)_/¯",
    "Größe straße ÄÖÜ äöü ẞ naïve café coöperate señor garçon Ångström İstanbul ılık Þór ǅ ﬁ ﬂ",
    "cafe\u0301 n\u0303 A\u030a o\u0308\u0304 Z\u0351\u036b\u0343\u036aa\u0302\u0301l\u0301g\u0300o\u0321 \u0301alone",
    "Привет, как дела? Съешь ещё этих мягких французских булок. Ελληνικά: ἄνθρωπος, Ὀδυσσεύς. Հայերեն ქართული",
    "שָׁלוֹם עוֹלָם! مَرْحَبًا بِالعَالَم، كَيْفَ حَالُكَ؟ فارسی: می‌خواهم اردو: ٹھیک ہے",
    "हिन्दी में क्‍या हाल है? বাংলা কেমন আছেন தமிழ் எப்படி తెలుగు ಕನ್ನಡ മലയാളം සිංහල ไทยสบายดีไหม ภาษาไทย ລາວ မြန်မာ ខ្មែរ བོད་ཡིག",
    "你好，世界！我今天買了3本書。日本語のテキスト、カタカナとひらがなー漢字。한국어 텍스트입니다. 한글",
    "Tiếng Việt: Đường phố ở Hà Nội. Türkçe: ağaç, şişe. Polski: zażółć gęślą jaźń. Čeština: příliš žluťoučký kůň",
    "መልካም ቀን ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ ꦗꦮ 𐍈𐌰 𒀀𒁀 𓀀𓂀 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 ＦＵＬＬ ｗｉｄｔｈ ㍿ ㌔ ﷺ",
    "😀 😃😄 🙂‍↔️ 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 ❤️ ❤ ☺︎ #️⃣ 1️⃣ 🧑🏿‍🚀 ✈️ ©️ ™ 🫠",
    "emoji😀in😀words and 3😀4 or 😀.😀! 👍👍👍👍👍👍👍👍👍👍👍👍",
    "".join(f"x{space}y{space}{space}z" for space in _SPACES),
    _SPACES + "end" + _SPACES,
    "".join(f"a{char}1{char}" for char in _INVISIBLE),
    "▁already▁ ▁▁escaped ▁ Ġ Ċ Âł <0x0A> <0x41> <unk> <s> </s> [UNK] [PAD0] [PAD1]",
    "<|endoftext|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<s>[INST] hi [/INST] there</s><bos><start_of_turn>user\nhi<end_of_turn>\n<eos><pad>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|> <|im_end|> text <|im_end|>text",
    "<|im_start <|im_end|><|im_end|> |im_end|> <<|im_end|>> <|im_end|",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 4,
    "a" * 300 + "b" * 200 + "é" * 100 + "中" * 100,
    "ab" * 150 + "1" * 150 + "." * 150 + " " * 150 + "\n" * 70 + "=" * 80 + "\t" * 40,
    "Mr. and Mrs. O'Brien-Smith (née Jones), of 221B Baker St., paid £1,234.56 on 3/4/'21 @ 5:30p.m.—didn't they?!",
)


PLAIN = """\
The ferry leaves at seven in the morning and comes back at five in the afternoon. If you miss it, you have to stay on \
the island until the next day, which is not as bad as it sounds: there is a small hotel near the harbour, and the owner makes \
very good soup. Last summer my sister and I missed it on purpose. We walked along the beach, talked to the old man who \
repairs the nets, and watched the sun go down behind the lighthouse. In the evening it began to rain, and everybody sat in \
the kitchen and told stories until midnight.

How do I count the words of a file in Python? Open the file, read it line by line, split each line at white space, and add up \
the lengths of the lists:

def count_words(path):
    total = 0
    with open(path) as file:
        for line in file:
            total += len(line.split())
    return total

The function returns 0 for an empty file. It does not read the whole file into memory at once, so it can be used for very \
large files as well.
"""


def probes() -> Iterator[str]:
    """Yield the texts that pre-tokenizers are compared on: TORTURE, then every string of one to three of CLASSES."""
    yield from TORTURE
    for length in (1, 2, 3):
        yield from map("".join, itertools.product(CLASSES, repeat=length))
