"""llama.cpp behind Engine: scores are those of plain decoding, however rows are batched; switching; what is refused."""

import math
import os
import shutil
from dataclasses import replace
from functools import partial
from itertools import compress

import numpy as np
import pytest
import torch
from parrot import write_parrot
from tiny import END, N_VOCAB, START, Tiny, add_vocab, build, random_adapter, random_tokens, torch_model, write_model

from edgecl.data import parse_example
from edgecl.engine import GGML_TYPE_F32, Engine, Row, VocabFile, fitted, latency, likeliest_in, read_prose, score
from edgecl.errors import EngineError
from edgecl.stages import is_right
from edgecl.template import chat_format
from edgecl_convert import GgufFile, write_gguf_adapter

SHARED = random_tokens(10, seed=50)
TEXT = "The tiny model reads this line. Then it reads another one, in the same plain words, and that is all.\n" * 2
EXTRA = 12


def open_engine(path, adapter=None, **options) -> Engine:
    return Engine(path, adapter, **{"n_ctx": 512, "n_threads": 1, "kv_type": GGML_TYPE_F32} | options)


def build_talker(path, architecture: str, add_bos: bool = False):
    """Build a model that ends its turns: the row of <|im_end|> in its head is three times as long as the others."""
    tiny = Tiny(architecture)
    model = torch_model(tiny)
    with torch.no_grad():
        if architecture == "gemma3":  # its head is its embedding: with a large one it repeats the last token for ever
            model.lm_head.weight *= 0.2
        model.lm_head.weight[END] *= 3
    return write_model(path, model, tiny, partial(add_vocab, add_bos=add_bos))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Models and adapters by name: llama, gemma3, other (llama), adapter (for llama), wide (another base) and its adapter."""
    folder = tmp_path_factory.mktemp("engine")
    out = {name: build_talker(folder / f"{name}.gguf", name) for name in ("llama", "gemma3")}
    out["llama_bos"] = build_talker(folder / "llama_bos.gguf", "llama", add_bos=True)
    out["other"], _ = build(folder / "other.gguf", seed=7)
    out["wide"], _ = build(folder / "wide.gguf", width=128)
    for name, base in (("adapter", "llama"), ("gemma3_adapter", "gemma3"), ("wide_adapter", "wide")):
        out[name] = folder / f"{name}.adapter.gguf"
        with GgufFile(out[base]) as gguf:
            write_gguf_adapter(out[name], random_adapter(gguf, size=0.2))
    return out


@pytest.fixture(scope="module")
def engine(paths):
    with open_engine(paths["llama"]) as one:
        yield one


def greedy(engine: Engine, prompt: list[int], n: int) -> list[int]:
    """Return n greedy tokens, fewer where the turn ends; its end-of-turn token is then the last."""
    tokens = list(engine.generate(prompt, n))
    return tokens if len(tokens) == n else [*tokens, END]


def make_rows(engine: Engine, n: int = 12) -> list[Row]:
    """Return rows behind one prefix: right to the end, right but cut, right at first, and wrong from the start."""
    rows = []
    for i in range(n):
        prompt = SHARED + random_tokens(3 + 4 * i, seed=i)  # the longest: 57 tokens, several of gemma3's windows
        answer = greedy(engine, prompt, 8 if i % 4 == 1 else 40)
        if i % 4 == 2:
            answer = [*answer[: len(answer) // 2], 65, 66, END]
        rows.append(Row(prompt, [70, 71, 72, END] if i % 4 == 3 else answer, EXTRA if i % 3 else 4 * EXTRA))
    return rows


def text_of(engine: Engine, tokens: list[int]) -> str:
    return engine.vocab.text_of(tokens, is_indented=True)


def plain_score(engine: Engine, row: Row) -> tuple[str, float]:
    """Return what `score` must give, from `generate` and `logits` alone."""
    text = text_of(engine, list(engine.generate(row.prompt, len(row.answer) + row.extra_tokens)))
    if text_of(engine, greedy(engine, row.prompt, len(row.answer))) == text_of(engine, row.answer):
        text = text_of(engine, row.answer)  # right: nothing is decoded after the wanted answer
    logits = torch.from_numpy(engine.logits(row.prompt + row.answer)).double()
    where = torch.arange(len(row.prompt) - 1, len(row.prompt) + len(row.answer) - 1)
    return text, float(torch.nn.functional.cross_entropy(logits[where], torch.tensor(row.answer)))


# --- scoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "adapter"), [("llama", None), ("gemma3", None), ("gemma3", "gemma3_adapter")])
def test_score_equals_decoding_row_by_row_however_rows_are_batched(paths, architecture, adapter):
    with open_engine(paths[architecture], adapter and paths[adapter]) as engine:
        rows = make_rows(engine)
        wanted = [plain_score(engine, row) for row in rows]
        right = [text == text_of(engine, row.answer) for (text, _), row in zip(wanted, rows, strict=True)]
    assert 4 <= sum(right) <= 8  # both kinds
    assert any(row.answer[-1] == END for row in compress(rows, right))
    for options in ({"n_seq": 1}, {"n_seq": 3}, {"n_seq": 16}, {"n_seq": 16, "n_ctx": 256, "n_batch": 24}):
        with open_engine(paths[architecture], adapter and paths[adapter], **options) as engine:
            for order in (range(len(rows)), reversed(range(len(rows)))):
                indices = list(order)
                scores = list(score(engine, [rows[i] for i in indices]))
                for i, got in zip(indices, scores, strict=True):
                    assert got.text == wanted[i][0]
                    assert got.loss_nats == pytest.approx(wanted[i][1], abs=1e-3)
                    assert got.n_tokens == len(rows[i].answer)


def test_score_with_the_cache_that_serves(paths):
    with open_engine(paths["llama"], kv_type=1, n_seq=4) as engine:  # F16, flash attention
        rows = make_rows(engine, 6)
        for row, got in zip(rows, list(score(engine, rows)), strict=True):
            assert got.loss_nats == pytest.approx(plain_score(engine, row)[1], abs=1e-2)


def test_wrong_answer_is_cut_some_tokens_after_the_wanted_one(paths):
    with open_engine(paths["other"]) as engine:  # a model that does not end its turns
        short, long = (next(score(engine, [Row(SHARED, [70, END], extra)])).text for extra in (3, 9))
        assert long.startswith(short) and short == text_of(engine, greedy(engine, SHARED, 5))
        assert long == text_of(engine, greedy(engine, SHARED, 11))


def test_long_answers_are_not_more_than_the_cache_holds(paths):
    with open_engine(paths["other"], n_ctx=256) as engine:
        rows = [fitted(Row([*SHARED, 65 + i], [70, END]), engine.n_ctx, is_free=True) for i in range(4)]
        texts = [one.text for one in score(engine, rows)]
        assert texts == [plain_score(engine, row)[0] for row in rows]


def scored_parrot(path, record: dict, says: str):
    """Return the example of a record, and what `score` takes down of a model that says one thing, without room and with it."""
    example = parse_example(record)
    with GgufFile(write_parrot(path, says)) as base, open_engine(path) as engine:
        row = Row(*chat_format(base, engine.vocab).row(example))
        rows = [fitted(row, engine.n_ctx), fitted(row, engine.n_ctx, example.is_free)]
        return example, *(one.text for one in score(engine, rows))


def test_a_way_to_the_right_number_is_not_cut(tmp_path):
    says = "bcdfgjklmopqrstuvwxyz: 7"
    example, cut, whole = scored_parrot(tmp_path / "m.gguf", {"prompt": "How many?", "completion": "7", "final": 7}, says)
    assert cut == says[: 2 + EXTRA] and not is_right(example, cut)
    assert whole == says and is_right(example, whole)
    other, cut, same = scored_parrot(tmp_path / "n.gguf", {"prompt": "How many?", "completion": "7"}, says)
    assert cut == same == says[: 2 + EXTRA] and not is_right(other, says)  # here the words count


def test_the_rest_of_a_function_keeps_its_indentation(tmp_path):
    record = {
        "messages": [{"role": "user", "content": "Complete it."}, {"role": "assistant", "content": "\tyield 3"}],
        "prompt": "def f():\n", "test": "def check(g):\n    assert list(g()) == [3]", "entry_point": "f",
    }  # fmt: skip
    example, _, text = scored_parrot(tmp_path / "m.gguf", record, "\tyield 3")
    assert text == "\tyield 3" and is_right(example, text)


def test_score_of_nothing_and_of_one_prompt_that_begins_another(engine):
    assert list(score(engine, [])) == []
    rows = [Row(SHARED, [70, END]), Row([*SHARED, 80, 81], [71, END]), Row(SHARED, [72, END])]
    together = list(score(engine, rows))
    alone = [next(score(engine, [row])) for row in rows]
    for one, other in zip(together, alone, strict=True):
        assert one == replace(other, loss_nats=pytest.approx(other.loss_nats, abs=1e-4))


@pytest.mark.parametrize(("name", "before"), [("llama", []), ("llama_bos", [START])])
def test_prose_is_read_as_a_computation_by_hand_reads_it(paths, monkeypatch, name, before):
    monkeypatch.setattr("edgecl.engine.prose.WINDOW", 40)
    monkeypatch.setattr("edgecl.engine.prose.N_WINDOWS", 3)
    log_p = {}
    with open_engine(paths[name]) as base, open_engine(paths[name], paths["adapter"]) as adapted:
        tokens = base.vocab.encode(TEXT)
        assert len(tokens) > 3 * 40
        for engine in (base, adapted):
            windows = [engine.logits([*before, *tokens[i : i + 40]])[len(before) : -1] for i in (0, 40, 80)]
            logits = np.concatenate(windows).astype(np.float64)
            log_p[engine] = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        targets = [token for i in (0, 40, 80) for token in tokens[i + 1 : i + 40]]
        nats = -np.mean([row[target] for row, target in zip(log_p[adapted], targets, strict=True)])
        kld = (np.exp(log_p[base]) * (log_p[base] - log_p[adapted])).sum(1).mean()
        whole = read_prose(adapted, TEXT, likeliest_in(base, TEXT))
        assert kld > 0.01 and (whole.nats, whole.kld) == pytest.approx((nats, kld), rel=1e-3)

        monkeypatch.setattr("edgecl.engine.prose.N_LIKELIEST", base.vocab.n_vocab // 8)
        expected = likeliest_in(base, TEXT)
        part = read_prose(adapted, TEXT, expected)
        assert part.nats == whole.nats and 0 < part.kld < whole.kld
        same = read_prose(base, TEXT, expected)
        assert same.kld == pytest.approx(0, abs=1e-6) and same.nats != whole.nats


# --- adapters and models ----------------------------------------------------------------------------------------------


def test_adapter_changes_answers_and_none_restores_them(paths):
    prompt = SHARED
    with open_engine(paths["llama"]) as engine:
        before, logits = greedy(engine, prompt, 20), engine.logits(SHARED)
        engine.set_adapter(paths["adapter"])
        with_adapter = greedy(engine, prompt, 20)
        assert with_adapter != before and not np.allclose(engine.logits(SHARED), logits, atol=0.1)
        engine.set_adapter(None)
        assert greedy(engine, prompt, 20) == before and np.array_equal(engine.logits(SHARED), logits)
    with open_engine(paths["llama"], paths["adapter"]) as engine:
        assert greedy(engine, prompt, 20) == with_adapter


def test_switch_serves_another_file_and_its_adapter(paths):
    wanted = {}
    for name, adapter in (("llama", None), ("other", None), ("llama", "adapter")):
        with open_engine(paths[name], adapter and paths[adapter]) as engine:
            wanted[name, adapter] = engine.logits(SHARED)
    with open_engine(paths["other"]) as engine:
        for name, adapter in [*wanted, *reversed(wanted)]:
            engine.switch(paths[name], adapter and paths[adapter])
            assert engine.model_path == paths[name]
            assert np.allclose(engine.logits(SHARED), wanted[name, adapter], atol=1e-4)


def test_another_file_under_the_same_name_is_loaded(paths, tmp_path):
    with open_engine(paths["other"]) as engine:
        wanted = engine.logits(SHARED)
    served = tmp_path / "model.gguf"
    shutil.copy(paths["llama"], served)
    with open_engine(served) as engine:
        assert not np.allclose(engine.logits(SHARED), wanted, atol=1e-4)
        shutil.copy(paths["other"], tmp_path / "new.gguf")
        os.replace(tmp_path / "new.gguf", served)
        engine.switch(served)
        assert np.array_equal(engine.logits(SHARED), wanted)


def test_failed_switch_closes_and_a_switch_back_serves_again(paths, tmp_path):
    with open_engine(paths["llama"]) as engine:
        before = engine.logits(SHARED)
        with pytest.raises(EngineError):
            engine.switch(tmp_path / "missing.gguf")
        with pytest.raises(EngineError, match="closed"):
            engine.logits(SHARED)
        engine.switch(paths["llama"])
        assert np.array_equal(engine.logits(SHARED), before)


def test_adapter_of_another_base_is_refused_and_leaves_the_base(paths):
    with open_engine(paths["llama"]) as engine:
        before = engine.logits(SHARED)
        engine.set_adapter(paths["adapter"])
        for name in ("wide_adapter", "gemma3_adapter", "other"):
            with pytest.raises(EngineError, match=r"adapter|lora"):
                engine.set_adapter(paths[name])
            assert np.array_equal(engine.logits(SHARED), before)
    with pytest.raises(EngineError):
        open_engine(paths["llama"], paths["wide_adapter"])


# --- what is refused --------------------------------------------------------------------------------------------------


def damaged(path, kind: str, good):
    data = good.read_bytes()
    contents = {
        "text": b"this is no model\n" * 100,
        "empty": b"",
        "truncated": data[: len(data) // 2],
        "header only": data[:100],
        "huge count": data[:8] + b"\xff" * 8 + data[16:],
    }
    path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "header only", "huge count"])
def test_malformed_files_are_refused_before_llama_cpp_sees_them(paths, tmp_path, kind, engine):
    with pytest.raises(EngineError, match=r"model\.gguf: (is|claims) "):
        open_engine(damaged(tmp_path / "model.gguf", kind, paths["llama"]))
    with pytest.raises(EngineError, match=r"model\.gguf: (is|claims) "):
        VocabFile(tmp_path / "model.gguf")
    with pytest.raises(EngineError, match=r"bad\.gguf: (is|claims) "):
        engine.set_adapter(damaged(tmp_path / "bad.gguf", kind, paths["adapter"]))


def test_files_that_are_no_model_are_refused(paths, tmp_path):
    for path in (paths["adapter"], tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(EngineError):
            open_engine(path)


def test_a_row_longer_than_the_context_is_scored_by_what_fits(paths):
    short, long = Row(SHARED, [70, END]), Row(random_tokens(300), [70, END])
    talkative = Row(SHARED, random_tokens(300, seed=1))
    with open_engine(paths["llama"], n_ctx=256, n_seq=2) as engine:
        rows = [fitted(row, engine.n_ctx) for row in (long, talkative, short)]
        assert rows == [Row(long.prompt[-242:], long.answer), Row(SHARED[-1:], talkative.answer[:243]), short]
        assert [fitted(row, engine.n_ctx, True) for row in (long, talkative)] == rows[:2]  # no room is made for other words
        assert fitted(short, engine.n_ctx, True) == replace(short, extra_tokens=128)
        assert fitted(short, 100, True) == replace(short, extra_tokens=88)
        scores = list(score(engine, rows))
        assert scores[2] == next(score(engine, [short]))
        assert [one.n_tokens for one in scores] == [2, 243, 2]


def test_prompt_longer_than_the_context_is_refused_and_the_engine_goes_on(paths):
    with open_engine(paths["llama"], n_ctx=256, n_seq=2) as engine:
        good = Row(SHARED, [70, END])
        before = next(score(engine, [good]))
        long = random_tokens(300)
        for prompt in (long, random_tokens(256), []):
            with pytest.raises(EngineError, match=f"{len(prompt)} tokens, the context holds 256"):
                list(engine.generate(prompt))
        for attempt in (
            lambda: list(score(engine, [Row(long, [70, END])])),
            lambda: list(score(engine, [good, Row(long, [70, END])])),
            lambda: engine.logits(long),
        ):
            with pytest.raises(EngineError, match="n_ctx 256"):
                attempt()
            assert next(score(engine, [good])) == before
        full = list(engine.generate(random_tokens(250), 100))
        assert len(full) <= 6


def test_closed_engine_says_so(paths):
    engine = open_engine(paths["llama"], paths["adapter"])
    engine.close()
    engine.close()
    for use in (
        lambda: list(engine.generate(SHARED)),
        lambda: engine.logits(SHARED),
        lambda: engine.feed(SHARED),
        lambda: engine.forward([(65, 0, 0, True)]),
        lambda: engine.clear(),
        lambda: engine.copy_prefix(0, 1, 1),
        lambda: engine.forget_from(0, 0),
        lambda: engine.set_adapter(paths["adapter"]),
        lambda: engine.set_adapter(None),
        lambda: engine.vocab.encode("a"),
        lambda: list(score(engine, [Row(SHARED, [70])])),
        lambda: likeliest_in(engine, TEXT),
        lambda: read_prose(engine, TEXT, []),
        lambda: latency(engine),
    ):
        with pytest.raises(EngineError, match="closed"):
            use()


def test_vocabulary_of_a_closed_model_says_so(paths):
    with open_engine(paths["llama"]) as engine, VocabFile(paths["llama"]) as alone:
        before = engine.vocab
        engine.switch(paths["other"])
        after = engine.vocab
        ids = after.encode("the")
    for vocab in (before, after, alone):
        for use in (lambda v: v.encode("the"), lambda v: v.piece(ids[0]), lambda v: v.is_end(END), lambda v: v.text_of(ids)):
            with pytest.raises(EngineError, match="closed"):
                use(vocab)


# --- vocabulary and latency -------------------------------------------------------------------------------------------


def test_vocabulary_of_the_file(paths, engine):
    vocab = engine.vocab
    assert (vocab.n_vocab, vocab.bos) == (N_VOCAB, None)
    text = "<|im_start|>user\nthe é in ☃<|im_end|>\n"
    ids = vocab.encode(text)
    assert ids[0] == START and ids.count(END) == 1 and len(ids) < len(text.encode())
    assert b"".join(map(vocab.piece, ids)).decode() == "user\nthe é in ☃\n"  # control tokens have no text
    assert vocab.text_of(ids) == "user\nthe é in ☃"
    assert vocab.text_of([*vocab.encode(" a "), END, *vocab.encode("b")]) == "a"
    assert vocab.text_of(vocab.encode(" a "), is_indented=True) == " a"
    assert vocab.is_end(END) and not vocab.is_end(START) and not vocab.is_end(65)
    assert vocab.text_of(vocab.encode("☃")[:1]) == "\N{REPLACEMENT CHARACTER}"
    with VocabFile(paths["llama"]) as alone:
        assert alone.encode(text) == ids and alone.bos is None and alone.with_bos([65]) == [65]
    with VocabFile(paths["llama_bos"]) as alone:
        assert alone.with_bos([65]) == [START, 65]


def test_latency_reports_every_figure(engine):
    figures = latency(engine, repeats=1, n_prompt=70, n_decode=4)
    assert set(figures) == {"pp512", "tg128", "ttft_ms", "itl_p50_ms", "itl_p95_ms"}
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
