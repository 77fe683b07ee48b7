"""What loads a model, each run in a child process: write, train, merge and measure of a night; bench and verify.

`python -m edgecl.stages STAGE` reads one JSON object from stdin and writes JSON lines to stdout (see `child`). Everything
that comes in and goes out is paths, numbers and rows, so a stage can be run by hand on what a log shows.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecl_convert import (
    Adapter,
    ConvertError,
    GgufFile,
    in_minimums,
    merge,
    read_gguf_adapter,
    verify,
    write_gguf_adapter,
)

from .child import room
from .data import Example, is_correct
from .errors import EdgeclError, NotNow
from .profile import Profile, TrainSettings
from .sandbox import passes, programs_of
from .template import ChatFormat, chat_format

if TYPE_CHECKING:
    from .train import Night, TrainReport, TrainRow

Request = dict[str, Any]
Report = Callable[[int, int, str], None]
HERE = Path(__file__).resolve().parent
ANCHOR_TOKENS = 32  # of a piece: as long as a short row
MAX_ANCHORS = 48  # what the base predicts on each is computed before the first night
ROWS_A_WORDING = 10  # a new question in other words takes about as long as so many written rows
ASKING = 0.3  # of the time for training is for the asker


def example_from(record: list[Any]) -> Example:
    """Return an example from (messages, task, final, program, last_only) as a request carries it."""
    messages, task, final, program, last_only = record
    return Example(tuple((role, content) for role, content in messages), task, "", final, program, last_only)


def is_right(example: Example, answer: str) -> bool:
    """Return whether an answer is right: code by running it, anything else by its words."""
    if example.program is None:
        return is_correct(example, answer)
    before, after = example.program
    return passes(*programs_of(before, answer, after))


def prose_text() -> str:
    """Return the text that measures general ability: written for this project, never trained on."""
    return (HERE / "prose.txt").read_text("utf-8")


def anchor_pieces(vocab: Any) -> list[list[int]]:
    """Return token ids of pieces of general text, from all over the text that holds a model to its base."""
    ids = vocab.encode((HERE / "anchor.txt").read_text("utf-8"))
    pieces = [ids[i : i + ANCHOR_TOKENS] for i in range(0, len(ids) - ANCHOR_TOKENS, ANCHOR_TOKENS)]
    return [vocab.with_bos(piece) for piece in pieces[:: math.ceil(len(pieces) / MAX_ANCHORS)]]


def load_stage(request: Request, report: Report) -> Request:
    """Load a model and compute one token."""
    from .engine import Engine

    with Engine(request["model"], None, **request["engine"]) as engine:
        list(engine.generate([0], 1))
    return {}


def write_stage(request: Request, report: Report) -> Request:
    """Have models write rows to rehearse, what they might be asked and what they answer, and new questions in other words.

    Where `copy` names a file and a type, the base runs from that (see `writers.base_copy`). What is not begun within `seconds`
    is left out, of each writer as of any other.
    """
    from .engine import Engine, reword, write_rows

    written: list[Any] = []
    asked = [question_of(example_from(record)) for record in request["reword"]]
    n_rows = sum(writer["n"] for writer in request["writers"])
    total, n_left = n_rows + len(asked), n_rows + ROWS_A_WORDING * len(asked)
    ends = time.monotonic() + request["seconds"]

    def say(done: int, _: int) -> None:
        report(len(written) + done, total, "rows")

    model, qtype = request["copy"] or (request["base"], None)
    with GgufFile(request["base"]) as base:
        if qtype:
            merge(base, None, model, qtype)
        with Engine(model, **request["engine"]) as engine:
            for writer in request["writers"]:
                seconds = (ends - time.monotonic()) * writer["n"] / n_left
                n_left -= writer["n"]
                engine.switch(model if writer["model"] == request["base"] else writer["model"], writer["asker"])
                chats = chat_format(base, engine.vocab)
                near = [ids for record in writer["near"] if (ids := asked_ids(chats, record))]
                if writer["near"] and not near:
                    continue
                answering = partial(engine.set_adapter, writer["adapter"])
                found = write_rows(engine, *chats.around_question, writer["n"], writer["seed"], near, answering, say, seconds)
                written += [asdict(row) for row in found]
            if asked:
                engine.switch(model)
            reworded = reword(engine, asked, request["writers"][0]["seed"], say, ends - time.monotonic())
    return {"written": written, "reworded": reworded}


def asked_ids(chats: ChatFormat, record: list[Any]) -> list[int]:
    """Return the ids of the question that a chat begins with; none where it begins with something else."""
    row = chats.encode(example_from(record))
    return row.ids[row.asked[0] : max(row.asked[1] - 1, 0)]


def question_of(example: Example) -> str:
    """Return what a chat of one question asks, "" of a longer one: its last question means nothing alone."""
    asked = [content for role, content in example.messages if role == "user"]
    return asked[0] if len(asked) == 1 else ""


def train_stage(request: Request, report: Report) -> Request:
    """Train tonight's adapter, which answers, and then the one that asks; write both as GGUF."""
    from .engine import VocabFile
    from .train import LatentStore, Night, TrainReport
    from .train.batches import usable

    with GgufFile(request["base"]) as gguf:
        with VocabFile(gguf.path) as vocab:
            chats = chat_format(gguf, vocab)
            reworded = request["reworded"] or [[]] * len(request["new"])
            new = [train_row(chats, example_from(r), others) for r, others in zip(request["new"], reworded, strict=True)]
            replay, heldout = ([train_row(chats, example_from(r)) for r in request[key]] for key in ("replay", "heldout"))
            new, replay = (_named(rows, ids) for rows, ids in zip((new, replay), request.get("ids", ([], [])), strict=True))
            replay += [written_row(chats, **row) for row in not_asked_tonight(chats, request["new"], request["written"])]
            anchor = anchor_pieces(vocab)
            asking = request["new"] if request["asker_gguf"] else []
            asked = {i: row for i, record in enumerate(asking) if (row := asking_row(chats, example_from(record)))}
        start = read_gguf_adapter(request["start"]) if request["start"] else None
        told = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: told.set())  # until here there is nothing to save
        runs, settings = Path(request["runs"]), TrainSettings(**request["settings"])
        limits = Profile(**request["limits"])
        if all(usable(row, limits.n_ctx) is None for row in new):
            return asdict(TrainReport(left_out=list(range(len(new))))) | {"ask_s": 0.0, "no_asker": ""}
        minutes = limits.minutes * (ASKING if asked else 0.0)
        night = Night(start, anchor, heldout, base_sha256=request["base_sha256"], stop=told.is_set)
        night.in_blocks, night.ram_share = in_minimums(gguf, request["quant"]), room(runs, limits.ram_bytes)

        def say(done: int, total: int, loss: float) -> None:
            report(done, total, f"loss {loss:.3f}")

        with LatentStore(runs / "latents.db", request["base_sha256"]) as store:
            night.store, night.checkpoint = store, runs / "checkpoint.safetensors"
            answering = replace(limits, minutes=limits.minutes - minutes)
            adapter, result = _trained(gguf, new, replay, _of_rank(settings, night), answering, night, say)
        adapter.base_sha256 = request["base_sha256"]
        write_gguf_adapter(request["adapter_gguf"], adapter)
        ask_s, no_asker = 0.0, ""
        learned = [row for i, row in asked.items() if i not in {*result.left_out, *result.unmet}]
        if learned:
            night = Night(base_sha256=request["base_sha256"], ram_share=night.ram_share, stop=told.is_set, samples=True)
            try:
                with LatentStore(runs / "asker.db", request["base_sha256"]) as store:
                    night.store, night.checkpoint = store, runs / "asker.safetensors"
                    asker, facts = _trained(gguf, learned, [], _asking(settings), replace(limits, minutes=minutes), night, say)
            except NotNow:
                raise
            except EdgeclError as error:  # a later night has the adapter ask in its place
                no_asker = str(error)
            else:
                asker.base_sha256 = request["base_sha256"]
                write_gguf_adapter(request["asker_gguf"], asker)
                ask_s = facts.train_s
    return asdict(result) | {"ask_s": ask_s, "no_asker": no_asker}


def not_asked_tonight(chats: ChatFormat, new: Sequence[list[Any]], written: Sequence[Request]) -> list[Request]:
    """Return written rows but those that ask what a new row asks: it may correct what earlier nights answer there."""
    asked = {tuple(asked_ids(chats, record)) for record in new}
    return [row for row in written if tuple(row["asked"]) not in asked]


def _named(rows: list[TrainRow], ids: Sequence[int]) -> list[TrainRow]:
    """Return rows that errors call by their ids in the store, where these are told."""
    return [replace(row, name=str(i)) for row, i in zip(rows, ids, strict=True)] if ids else rows


def _of_rank(settings: TrainSettings, night: Night) -> TrainSettings:
    """Return settings with the rank that a night has: as much as the adapter that it goes on from at least."""
    before = [len(a) for a, _ in night.start.pairs.values()] if night.start else []
    r = max([settings.rank(bool(night.in_blocks)), *before])
    return replace(settings, r=r, lora_alpha=settings.lora_alpha * r / settings.r)


def _asking(settings: TrainSettings) -> TrainSettings:
    """Return what the asker is told: a night's questions are to be known by heart, whatever else is forgotten for it."""
    twice, rate = 2 * settings.batch_rows, 4.5 * settings.learning_rate
    return replace(settings, epochs=10, batch_rows=twice, learning_rate=rate, depth=1 / 3, anchor_weight=0.0, patience=0)


def _trained(
    gguf: GgufFile,
    new: list[TrainRow],
    replay: list[TrainRow],
    settings: TrainSettings,
    limits: Profile,
    night: Night,
    say: Callable[[int, int, float], None],
) -> tuple[Adapter, TrainReport]:
    """Train an adapter; a checkpoint that is unreadable is moved: nobody may be there to do that, and only time is lost."""
    from .train import UnreadableCheckpointError, train

    try:
        return train(gguf, new, replay, settings, limits, night, say)
    except UnreadableCheckpointError:
        assert night.checkpoint
        kept = night.checkpoint.replace(night.checkpoint.with_suffix(".old"))
        adapter, report = train(gguf, new, replay, settings, limits, night, say)
        report.plan += f"; from the start: its checkpoint is damaged or of another version, and kept as {kept}"
        return adapter, report


def train_row(chats: ChatFormat, example: Example, reworded: Sequence[str] = ()) -> TrainRow:
    """Return a chat as it is trained on; where it is one question, with others in its place too."""
    from .train import TrainRow

    encoded, others = chats.encode(example), []
    for question in reworded:
        messages = tuple((role, question if role == "user" else content) for role, content in example.messages)
        others.append(train_row(chats, replace(example, messages=messages)))
    return TrainRow(encoded.ids, encoded.supervised, reworded=others)


def asking_row(chats: ChatFormat, example: Example) -> TrainRow | None:
    """Return what a chat begins with as a row whose answer that is; None where it is no question, or longer than one drawn."""
    from .engine.writing import MAX_ASKED
    from .train import TrainRow

    encoded = chats.encode(example)
    first, end = encoded.asked
    is_askable = 0 < end - first <= MAX_ASKED
    return TrainRow(encoded.ids[:end], [i >= first for i in range(end)]) if is_askable else None


def written_row(chats: ChatFormat, asked: list[int], answer: list[int], likely: list[list[tuple[int, float]]]) -> TrainRow:
    """Return a row that a model wrote as it is trained on: its answer by what was likely there."""
    from .train import TrainRow

    before, after = chats.around_question
    prompt = before + asked + after
    supervised = [False] * len(prompt) + [True] * len(answer)
    return TrainRow(prompt + answer, supervised, likely, name="written")


def merge_stage(request: Request, report: Report) -> Request:
    """Merge an adapter into the base, or only re-quantize the base where none is named."""
    with GgufFile(request["base"]) as gguf:
        adapter = read_gguf_adapter(request["adapter"]) if request["adapter"] else None
        return asdict(merge(gguf, adapter, request["out"], request["quant"], progress=report))


def measure_stage(request: Request, report: Report) -> Request:
    """Score prose, and rows for so many seconds, in llama.cpp."""
    from .engine import Engine, Row, fitted, likeliest_in, read_prose, score

    began = time.perf_counter()
    examples = [example_from(record) for record in request["rows"]]
    if request["prose"]:
        with Engine(request["base"], None, **request["engine"]) as engine:  # closed again: a board has memory for one model
            expected = likeliest_in(engine, prose_text())
    with (
        Engine(request["model"], request["adapter"], **request["engine"]) as engine,
        GgufFile(request["base"]) as base,
    ):
        chats = chat_format(base, engine.vocab)
        prose = asdict(read_prose(engine, prose_text(), expected)) if request["prose"] else {}
        scores = []
        rows = [fitted(Row(*chats.row(example)), engine.n_ctx, example.is_free) for example in examples]
        for example, result in zip(examples, score(engine, rows), strict=True):
            scores.append([is_right(example, result.text), result.loss_nats, result.n_tokens])
            report(len(scores), len(examples), Path(request["model"]).name)
            if time.perf_counter() - began > request["seconds"]:
                break
    return {"scores": scores, "prose": prose, "eval_s": time.perf_counter() - began}


def verify_stage(request: Request, report: Report) -> Request:
    """Compare a written GGUF with what it was made from."""
    return asdict(verify(request["source"], request["gguf"]))


def bench_stage(request: Request, report: Report) -> Request:
    """Time a model in llama.cpp, in a context that has room for what is timed."""
    from .engine import N_PROMPT, Engine, latency

    options = request["engine"] | {"n_ctx": max(request["engine"]["n_ctx"], N_PROMPT)}
    with Engine(request["model"], request["adapter"], **options) as engine:
        return dict(latency(engine, request["repeats"]))


STAGES = {
    "load": load_stage,
    "write": write_stage,
    "train": train_stage,
    "merge": merge_stage,
    "measure": measure_stage,
    "bench": bench_stage,
    "verify": verify_stage,
}


def main() -> None:
    """Run one stage and end the process; errors come out as one JSON line, anything else as a traceback in the log."""
    os.umask(0o077)  # what a stage writes lies in a home, and is its owner's alone
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints goes to the log, not between the JSON lines

    def say(message: Request) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    last = 0.0

    def report(done: int, total: int, text: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 0.2:
            last = time.monotonic()
            say({"progress": [done, total, text]})

    try:
        say({"result": STAGES[sys.argv[1]](json.load(sys.stdin), report)})
    except (EdgeclError, ConvertError) as error:
        say({"error": {"message": str(error), "exit_code": getattr(error, "exit_code", 1)}})
    sys.stdout.flush()
    os._exit(0)  # the kernel takes back at once what torch and llama.cpp would hand back piece by piece


if __name__ == "__main__":
    main()
