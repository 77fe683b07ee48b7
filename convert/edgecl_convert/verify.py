"""Is a written GGUF the model it was made from? Token ids first, then logits.

Token ids of llama.cpp are compared with those of the folder's tokenizer.json (tokenizers library) on `TORTURE` or the texts
that are given; where llama.cpp cannot do what the tokenizer does (`Vocabulary.limits`), they must be those of the nearest
tokenizer that it can do. Then both models see the same ids, and llama.cpp's logits (F32 KV cache) are compared with those of
transformers in float32: mean KL divergence in nats, and how often the most probable token is the same. A GGUF source is
compared in llama.cpp alone.

Memory: transformers holds every weight as float32, 4 bytes each, and (T, V) float32 logits; llama.cpp holds the file
beside it.

*Does not cover*: generation, the KV cache's other types, kernels of another machine; a model that is wrong only on long texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConvertError
from .ggml import F32Array, QType, bits_per_weight
from .gguf_file import GgufFile
from .hf_tokenizer import HfTokenizer, library_tokenizer, read_tokenizer
from .llama_model import LlamaModel
from .served_tokenizer import serve
from .torture import PLAIN, TORTURE

_AROUND = 4  # ids shown before and after a difference
# Most KLD in nats, least top-1 agreement: several times what SmolLM2-135M shows, a small model, which suffers more than large
# ones. Activations are rounded as well: to the type of the weights, or to 8 bits.
_FLOAT_BOUNDS = {QType.F32: (1e-5, 0.995), QType.F16: (1e-4, 0.99), QType.BF16: (1e-3, 0.98)}
_BOUNDS = ((8.0, 0.02, 0.9), (5.25, 0.25, 0.7), (4.0, 1.0, 0.5), (3.0, 2.0, 0.3), (0.0, 4.0, 0.1))  # from that many bits on


@dataclass
class VerifyReport:
    """What was compared and what differed; JSON-ready through dataclasses.asdict.

    Attributes:
        ok: nothing failed.
        failure: what failed first, in one line; "" when ok.
        texts: texts whose ids were compared.
        texts_limited: of those, the ones where llama.cpp cannot give the tokenizer's ids, and gives the nearest instead.
        texts_wrong: the ones that have other ids.
        limits: why some are limited, as `Vocabulary.limits` says it.
        text: the first wrong text, `expected` and `got` its ids around the first difference, `position` where that is.
        kld_nats, top1: mean over the tokens, None where logits were not compared; `max_kld_nats` and `min_top1` bound them.
        worst_type: the least precise type of a matrix, in a GGUF source as well; it decides the bounds.
    """

    ok: bool = True
    failure: str = ""
    texts: int = 0
    texts_limited: int = 0
    texts_wrong: int = 0
    limits: list[str] = field(default_factory=list)
    text: str = ""
    position: int = 0
    expected: list[int] = field(default_factory=list)
    got: list[int] = field(default_factory=list)
    n_tokens: int = 0
    kld_nats: float | None = None
    top1: float | None = None
    max_kld_nats: float = 0.0
    min_top1: float = 0.0
    worst_type: str = ""

    def fail(self, failure: str) -> None:
        """Note a failure; the first one is kept."""
        self.ok, self.failure = False, self.failure or failure


def verify(
    source: Path | str, gguf: Path | str, texts: Iterable[str] = TORTURE, n_tokens: int = 256, n_threads: int = 0
) -> VerifyReport:
    """Compare a written GGUF file with what it was made from.

    Args:
        source: a Hugging Face folder, or a GGUF file.
        texts: for the token ids; the logits are computed on a text of their own.
        n_tokens: of that text, as far as the model's context reaches; 0 to compare ids only.
        n_threads: of llama.cpp, 0 for every core.

    Raises:
        ConvertError: one of them cannot be read or loaded. That they differ is a report, not an error.
    """
    source, gguf, texts = Path(source), Path(gguf), list(texts)
    report = VerifyReport(texts=len(texts) + 1)
    _set_bounds(report, [gguf] if source.is_dir() else [gguf, source])
    prompt = _compare_tokens(report, source, gguf, texts)
    if n_tokens:
        with GgufFile(gguf) as file:
            ids = prompt[: min(n_tokens, int(file.get(f"{file.architecture}.context_length", n_tokens)))]
        with LlamaModel(gguf) as model:
            if max(ids) >= model.n_vocab:
                report.fail(f"id {max(ids)} is beyond the {model.n_vocab} tokens of {gguf}")
                return report
            _compare_logits(report, _reference(source, ids, n_threads), model.logits(ids, n_threads))
    return report


def bounds_of(qtype: QType) -> tuple[float, float]:
    """Return the most KLD in nats and the least top-1 agreement that are allowed to matrices of a type."""
    if qtype in _FLOAT_BOUNDS:
        return _FLOAT_BOUNDS[qtype]
    return next((kld, top1) for bits, kld, top1 in _BOUNDS if bits_per_weight(qtype) >= bits)


def _set_bounds(report: VerifyReport, paths: Sequence[Path]) -> None:
    kinds: set[QType] = set()
    for path in paths:  # a quantized source rounds activations too
        with GgufFile(path) as file:
            kinds |= {info.qtype for info in file.tensors.values() if len(info.shape) > 1}
    worst = max(kinds, key=lambda kind: (bounds_of(kind), kind.name), default=QType.F32)
    report.worst_type = worst.name
    report.max_kld_nats, report.min_top1 = bounds_of(worst)


# --- token ids --------------------------------------------------------------------------------------------------------


@dataclass
class _Expected:
    """What the source makes of every text.

    Attributes:
        ids: its own ids; `nearest` the ones that llama.cpp can give.
        around: ids that it puts before and after a prompt.
        ties: several cuts of a text may be equally good (unigram), then any order of the same ids will do.
    """

    ids: list[list[int]]
    nearest: list[list[int]]
    around: tuple[list[int], list[int]]
    limits: list[str] = field(default_factory=list)
    ties: bool = False


def _compare_tokens(report: VerifyReport, source: Path, gguf: Path, texts: Sequence[str]) -> list[int]:
    """Compare every text; return the ids of PLAIN as a prompt has them."""
    texts = [*texts, PLAIN]
    expected = _expected_of_folder(source, texts) if source.is_dir() else _expected_of_gguf(source, texts)
    report.limits = expected.limits
    before, after = expected.around
    with LlamaModel(gguf, vocab_only=True) as model:
        for text, ids, nearest in zip(texts, expected.ids, expected.nearest, strict=True):
            got = model.encode(text)
            if got == ids:
                continue
            if got == nearest or (expected.ties and sorted(got) == sorted(nearest)):
                report.texts_limited += 1
                continue
            report.texts_wrong += 1
            _show_difference(report, text, nearest, got)
        letter = model.encode("a")
        if (got := model.encode("a", add_special=True)) != before + letter + after:
            _show_difference(report, "a", before + letter + after, got, " as a prompt")
    return before + expected.nearest[-1]


def _expected_of_gguf(source: Path, texts: Sequence[str]) -> _Expected:
    with LlamaModel(source, vocab_only=True) as model:
        ids = [model.encode(text) for text in texts]
        return _Expected(ids, ids, _split_around(model.encode("a", add_special=True), model.encode("a")))


def _expected_of_folder(source: Path, texts: Sequence[str]) -> _Expected:
    tokenizer = read_tokenizer(source)
    served = serve(tokenizer)
    library, nearest = (library_tokenizer(tokenizer.path, data) for data in (tokenizer.data, served.data))
    before, after = _split_around(library.encode("a").ids, _ids(library, "a"))
    if (flag := tokenizer.settings.get("add_bos_token")) is not None:  # goes before what tokenizer.json adds
        before = _named(tokenizer, library, "bos") if flag else []
    if (flag := tokenizer.settings.get("add_eos_token")) is not None:
        after = _named(tokenizer, library, "eos") if flag else []
    ids, near = ([_ids(encoder, text) for text in texts] for encoder in (library, nearest))
    return _Expected(ids, near, (before, after), served.limits, served.model == "t5")


def _split_around(full: list[int], plain: list[int]) -> tuple[list[int], list[int]]:
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return full[:at], full[at + len(plain) :]


def _named(tokenizer: HfTokenizer, library: Any, name: str) -> list[int]:
    token = tokenizer.settings.get(f"{name}_token")
    text = token.get("content") if isinstance(token, dict) else token
    index = library.token_to_id(text) if text else None
    return [] if index is None else [index]


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _show_difference(report: VerifyReport, text: str, expected: list[int], got: list[int], how: str = "") -> None:
    """Keep the first difference, a few ids around it."""
    if not report.ok:
        return
    pairs = zip(expected, got, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))
    first = max(0, at - _AROUND)
    report.text, report.position = text, at
    report.expected, report.got = (ids[first : at + _AROUND + 1] for ids in (expected, got))
    report.fail(
        f"token ids of {text[:60]!r}{how} differ at position {at}: expected {report.expected}, llama.cpp gives {report.got}, "
        f"from position {first} on"
    )


# --- logits -----------------------------------------------------------------------------------------------------------


def _reference(source: Path, ids: list[int], n_threads: int) -> Iterator[F32Array]:
    """Yield the source's logits of consecutive parts of a sequence."""
    if source.is_dir():
        yield _torch_logits(source, ids)
        return
    with LlamaModel(source) as model:
        yield from model.logits(ids, n_threads)


def _torch_logits(folder: Path, ids: list[int]) -> F32Array:
    """Return transformers' float32 logits (T, V), with its attention in the plainest form."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConvertError(f"{folder}: transformers could not load this model: {str(error).splitlines()[0]}") from None
    with torch.no_grad():
        logits: F32Array = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
    return logits


def _compare_logits(report: VerifyReport, reference: Iterator[F32Array], served: Iterator[F32Array]) -> None:
    kld = same = 0.0
    for wanted, got in zip(_rows(reference), _rows(served), strict=True):
        n = min(len(wanted), len(got))  # an embedding may have more rows than there are tokens
        p, q = _log_softmax(wanted[:n]), _log_softmax(got[:n])
        kld += float((np.exp(p) * (p - q)).sum())
        same += float(p.argmax() == q.argmax())
        report.n_tokens += 1
    report.kld_nats, report.top1 = kld / report.n_tokens, same / report.n_tokens
    measured = f"KLD {report.kld_nats:.2g} nats, top-1 {report.top1:.1%} over {report.n_tokens} tokens"
    if not report.kld_nats < report.max_kld_nats or report.top1 < report.min_top1:  # NaN fails too
        report.fail(
            f"logits differ: {measured}; with {report.worst_type} at most {report.max_kld_nats:g} nats and at least "
            f"{report.min_top1:.1%} are allowed"
        )


def _rows(parts: Iterator[F32Array]) -> Iterator[F32Array]:
    for part in parts:
        yield from part


def _log_softmax(logits: F32Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
