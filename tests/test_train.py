"""Training: exact gradients, repeatable adapters, and rows that are really learned."""

from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tiny import N_VOCAB, STD, WINDOW, Tiny, build, random_adapter, random_tokens, torch_model, write_model

from edgecl.errors import Diverged, NotNow
from edgecl.profile import Profile, TrainSettings
from edgecl.train import Night, TrainRow, loop, train, weights
from edgecl.train.decoder import OUT_MULTIPLE, Decoder
from edgecl.train.lora import Lora
from edgecl.train.losses import anchors, losses
from edgecl.train.optimizer import AdamW
from edgecl.train.packing import pack, tree
from edgecl.train.weights import Placement, placement
from edgecl_convert import GgufFile, UnsupportedError, in_minimums, merge
from edgecl_convert.grid import by_block
from edgecl_convert.names import module_of

Q = gguf.GGMLQuantizationType
FAST = TrainSettings(r=8, lora_alpha=16.0, epochs=20, depth=1.0, min_steps=1, anchor_weight=0.0, learning_rate=5e-3)
PREFIX = random_tokens(20, seed=100)  # longer than gemma3's window
BOUND = 1e-5  # relative error of a float32 gradient
CPU32 = Placement(torch.device("cpu"), torch.float32)
ANCHORS = [random_tokens(32, seed=200 + i) for i in range(4)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function architecture -> (open GGUF file, torch model), each built once."""
    folder = tmp_path_factory.mktemp("train")

    @cache
    def one(architecture):
        path, model = build(folder / f"{architecture}.gguf", architecture)
        return GgufFile(path), model

    return one


def make_row(seed: int, n_prompt: int, n_answer: int, prefix=PREFIX) -> TrainRow:
    ids = prefix + random_tokens(n_prompt + n_answer, seed)
    return TrainRow(ids, [False] * (len(prefix) + n_prompt) + [True] * n_answer)


ROWS = [make_row(i, 3 + 5 * i, 2 + i % 3) for i in range(6)]  # up to 52 tokens
LONG = make_row(9, 95, 3)  # attends in a line of its own
TAUGHT = replace(ROWS[3], likely=[[(5, 0.7), (9, 0.2), (7, 0.1)], [(8, 0.5), (9, 0.5), (3, 0.0)]])
BRANCHES = [replace(row, ids=row.ids[:20] + ROWS[4].ids[20:27] + row.ids[27:]) for row in (ROWS[2], ROWS[3], ROWS[5])]
CHATTY = replace(ROWS[5], supervised=[20 < t < 25 or t > 40 for t in range(len(ROWS[5].ids))])  # two answers in one row


def facts(n: int, seed: int) -> list[TrainRow]:
    """Rows whose answer can only be known by heart: a key of three tokens, an answer of two."""
    return [make_row(1000 * seed + i, 3, 2) for i in range(n)]


def warm(base, decoder, adapter, r=4, lora_alpha=8.0, first_layer=0) -> Lora:
    """Return an adapter in torch that goes on from `adapter`."""
    lora = Lora(base, decoder.shape, r, lora_alpha, 0, decoder.place)
    lora.warm_start(adapter)
    lora.freeze_below(first_layer)
    return lora


def fit(base, new, replay=(), settings=FAST, night=None, progress=None, **limits):
    return train(base, new, replay, settings, Profile(**{"threads": 1} | limits), night, progress)


def answer_loss(base, adapter, rows) -> float:
    """Return the mean answer loss of a base with an adapter, in float32, without prefix or batch."""
    decoder = Decoder(base, CPU32)
    lora = None if adapter is None else warm(base, decoder, adapter, FAST.r, FAST.lora_alpha)
    with torch.no_grad():
        total = sum(losses(decoder, lora, [row], None).answers.sum().item() for row in rows)
    return total / len(rows)


RESIDENT = {"resident": (None, True), "packed": (0, False), "half packed": (1, False), "checkpointed": (None, True)}


# --- gradients --------------------------------------------------------------------------------------------------------


def reference_gradients(written, base, adapter, rows, anchor, weight):
    """Return loss and gradients by plain autograd: full rows one by one, transformers' own eager attention, W + s B A."""
    shell = warm(base, Decoder(base, CPU32), adapter)  # only for names and row order
    weights = {name: parameter.detach() for name, parameter in written.named_parameters()}
    pairs, merged = {}, {}
    for name in shell.names:
        a, b = pairs[name] = [p.clone().requires_grad_() for p in (shell.a(name), shell.b(name))]
        module = module_of(name, base.architecture)
        merged[module] = weights[module] + adapter.scaling(name) * b @ a

    def logits(ids, parameters):
        return torch.func.functional_call(written, parameters, (torch.tensor([ids]),), {"use_cache": False}).logits[0]

    loss = torch.zeros(())
    for row in rows:
        where = [t - 1 for t, wanted in enumerate(row.supervised) if wanted]
        got = logits(row.ids, merged)
        target = F.one_hot(torch.tensor(row.ids), N_VOCAB).float()
        for t, choices in zip(where, row.likely, strict=False):
            target[t + 1] = sum(share * target.new_zeros(N_VOCAB).index_fill(0, torch.tensor(v), 1) for v, share in choices)
        loss = loss + F.cross_entropy(got[where], target[[t + 1 for t in where]])
    mean = loss / len(rows)
    p = torch.log_softmax(logits(anchor, {}).detach(), -1)
    q = torch.log_softmax(logits(anchor, merged), -1)
    drift = (p.exp() * (p - q)).sum(-1).mean()
    (mean + weight * drift).backward()
    return mean.item(), {name: (a.grad, b.grad) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("first_layer", [0, 1])
@pytest.mark.parametrize("mode", RESIDENT)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_gradients_equal_plain_autograd(models, architecture, mode, first_layer):
    base, written = models(architecture)
    rows, anchor = [LONG, *ROWS[:3], TAUGHT, ROWS[4], CHATTY, *BRANCHES], ANCHORS[0]
    assert [len(path) for path in tree([row.ids for row in rows], [20 + 2] * len(rows)).paths][-3:] == [22] * 3
    assert max(len(row.ids) for row in rows) > 2 * WINDOW
    adapter = random_adapter(base, size=0.2)
    wanted_loss, wanted = reference_gradients(written, base, adapter, rows, anchor, 0.5)

    decoder = Decoder(base, CPU32, *RESIDENT[mode])
    decoder.checkpointing = mode == "checkpointed"
    held = anchors(decoder, [anchor])[0]
    lora = warm(base, decoder, adapter, first_layer=first_layer)
    each = loop.backward(decoder, lora, rows, held, 0.5, 320)  # 320 tokens: two parts, long and short rows in one

    assert sum(each) / len(rows) == pytest.approx(wanted_loss, rel=1e-5)
    trained = [name for name in lora.names if int(name.split(".")[1]) >= first_layer]
    assert len(trained) == 7 * (decoder.shape.n_layer - first_layer)
    assert not any(part.any() for name in lora.names if name not in trained for part in lora.gradients(name))
    errors, sizes = [], []
    for name in trained:
        for got, reference in zip(lora.gradients(name), wanted[name], strict=True):
            errors.append(float((got - reference).norm()))
            sizes.append(float(reference.norm()))
            assert errors[-1] < BOUND * sizes[-1], name
    assert sum(errors) < BOUND * sum(sizes)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_last_layer_goes_on_with_the_tokens_that_are_wanted(models, architecture):
    base, _ = models(architecture)
    decoder = Decoder(base, CPU32)
    packed = pack(decoder, [LONG.ids], [(0, len(LONG.ids) - n) for n in (3, 2, 1)])
    x, last = decoder.weights.embed(packed.ids), decoder.shape.n_layer - 1
    assert len(decoder.layer(x, last, packed.where, None, 3)) == OUT_MULTIPLE < len(x)
    torch.testing.assert_close(decoder.run(x, packed.where, None, n_wanted=3), decoder.run(x, packed.where, None)[:3])


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_batch_behind_a_prefix_equals_row_by_row(models, architecture):
    base, _ = models(architecture)
    decoder = Decoder(base, CPU32)
    with torch.no_grad():
        batch = losses(decoder, None, [*ROWS, LONG], None).answers
        rows = [losses(decoder, None, [row], None).answers.item() for row in [*ROWS, LONG]]
        held = replace(anchors(decoder, [ANCHORS[1]])[0], ids=ANCHORS[0])  # another text's: the base itself diverges
        beside = losses(decoder, None, ROWS, held).drift
        alone = losses(decoder, None, [ROWS[0]], held).drift
    assert batch.tolist() == pytest.approx(rows, rel=1e-5)
    assert beside.item() == pytest.approx(alone.item(), rel=1e-4) and alone.item() > 0.1


# --- the loop ---------------------------------------------------------------------------------------------------------


def same(one, other) -> bool:
    return one.pairs.keys() == other.pairs.keys() and all(
        np.array_equal(x, y) for name in one.pairs for x, y in zip(one.pairs[name], other.pairs[name], strict=True)
    )


def test_same_seed_gives_the_same_adapter_bit_for_bit(models):
    base, _ = models("llama")
    settings = replace(FAST, epochs=2, anchor_weight=1.0)
    runs = [fit(base, facts(12, 1), facts(5, 2), replace(settings, seed=s), night=Night(anchor=ANCHORS))[0] for s in (3, 3, 4)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    untrained = [fit(base, facts(3, 1), [], replace(FAST, seed=s), minutes=1e-9)[0] for s in (3, 3, 4)]
    assert same(untrained[0], untrained[1]) and not same(untrained[0], untrained[2])  # the start is drawn by it too


def test_layers_below_are_trained_until_they_are_frozen(models, tmp_path):
    base, _ = models("llama")
    settings, path = replace(FAST, epochs=8, freeze_at=0.5, weight_decay=0.1), tmp_path / "run.safetensors"
    found = []
    for _ in range(4):  # two of eight steps each
        told = iter([False, False, True])
        with suppress(NotNow):
            fit(base, facts(8, 1), [], settings, Night(checkpoint=path, stop=lambda told=told: next(told)))
        with safe_open(path, "pt") as file:
            found.append(file.get_tensor("flat"))
    half = len(found[0]) // 2  # two layers, all of one's numbers before the other's
    moved = [[not torch.equal(a[part], b[part]) for part in (slice(half), slice(half, None))] for a, b in pairwise(found)]
    assert moved == [[True, True], [False, True], [False, True]]


def test_rows_are_learned_and_shuffled_answers_are_not(models):
    base, _ = models("llama")
    rows = facts(24, 1)
    shuffled = [replace(row, ids=row.ids[:-2] + other.ids[-2:]) for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
    before = answer_loss(base, None, rows)
    learned, report = fit(base, rows, [], FAST)
    control, control_report = fit(base, shuffled, [], FAST)
    assert report.steps == control_report.steps == 20 * 3
    assert report.losses[0] == pytest.approx(before, rel=0.25)
    assert answer_loss(base, learned, rows) < 0.2 * before
    assert answer_loss(base, control, shuffled) < 0.2 * answer_loss(base, None, shuffled)
    assert answer_loss(base, control, rows) > max(0.5 * before, 10 * answer_loss(base, learned, rows))


def test_replay_keeps_an_earlier_night(models):
    base, _ = models("llama")
    old, new = facts(12, 1), facts(12, 2)
    first, _ = fit(base, old, [], FAST)
    forgot, _ = fit(base, new, [], FAST, night=Night(start=first))
    kept, _ = fit(base, new, old, FAST, night=Night(start=first))
    assert answer_loss(base, kept, old) < 0.2 * answer_loss(base, forgot, old)
    assert answer_loss(base, kept, new) < 1.0


def test_warm_start_goes_on_where_the_last_night_ended(models):
    base, _ = models("qwen3")
    rows = facts(16, 1)
    settings = replace(FAST, epochs=4)
    first, report = fit(base, rows, [], settings)
    _, again = fit(base, rows, [], settings, night=Night(start=first))
    assert again.losses[0] < 0.8 * report.losses[0]
    untouched, _ = fit(base, rows, [], settings, Night(start=first), minutes=1e-9)
    assert answer_loss(base, untouched, rows) == pytest.approx(answer_loss(base, first, rows), rel=1e-5)


@pytest.fixture
def one_minute_a_step(monkeypatch):
    """Return a progress after which training's clock shows a minute more."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def progress(done: int, total: int, loss: float) -> None:
        clock.now += 60

    return progress


def test_time_limit_stops_early_with_a_usable_adapter(models, one_minute_a_step):
    base, _ = models("llama")
    rows = facts(24, 1)
    adapter, report = fit(base, rows, [], FAST, progress=one_minute_a_step, minutes=4.5)
    assert report.stopped_early and report.steps == 5 == len(report.losses)
    assert report.unmet == []
    assert report.train_s == 300 and report.tokens == 5 * 8 * 25 and report.tokens_per_s == pytest.approx(1000 / 300)
    adapter.check_fits(base)
    assert answer_loss(base, adapter, rows) < answer_loss(base, None, rows)


def test_rows_that_no_step_came_to_are_named(models, one_minute_a_step):
    base, _ = models("llama")
    rows = facts(23, 1)
    unanswered = TrainRow([1, 2, 3], [False] * 3)
    _, report = fit(base, [unanswered, *rows], [], replace(FAST, epochs=2), progress=one_minute_a_step, minutes=1.5)
    assert report.left_out == [0] and report.steps == 2 and 7 <= len(report.unmet) <= 8
    assert report.tokens == 25 * (23 - len(report.unmet)) and set(report.unmet) <= set(range(1, 24))
    _, all_met = fit(base, rows, [], replace(FAST, epochs=1))
    assert all_met.unmet == []


def test_small_night_repeats_its_rows_until_min_steps(models):
    base, _ = models("llama")
    seen = []
    _, report = fit(
        base, facts(3, 1), [], replace(FAST, epochs=1, min_steps=7), progress=lambda done, total, _: seen.append((done, total))
    )
    assert seen == [(i + 1, 7) for i in range(7)] and report.steps == 7 and not report.stopped_early


def test_a_small_night_that_has_its_rows_in_other_words_is_longer_and_knows_them_in_those(models):
    base, _ = models("llama")
    rows, settings = facts(3, 1), replace(FAST, epochs=2, min_steps=30)
    others = [replace(other, ids=[*other.ids[:-2], *row.ids[-2:]]) for row, other in zip(rows, facts(3, 2), strict=True)]
    both = [replace(row, reworded=[other]) for row, other in zip(rows, others, strict=True)]
    plain, before = fit(base, rows, [], settings)
    adapter, report = fit(base, both, [], settings)
    assert (before.steps, report.steps) == (30, 45)
    assert answer_loss(base, adapter, rows) < 0.3 * answer_loss(base, None, rows)
    assert answer_loss(base, adapter, others) < 0.5 * answer_loss(base, plain, others)


def test_anchor_holds_the_model_to_its_base(models):
    base, _ = models("llama")

    def drift(weight: float) -> tuple[float, float]:
        rows = facts(16, 1)
        settings = replace(FAST, epochs=10, freeze_at=1.0, anchor_weight=weight)
        adapter, _ = fit(base, rows, [], settings, night=Night(anchor=ANCHORS))
        decoder = Decoder(base, CPU32)
        lora = warm(base, decoder, adapter, FAST.r, FAST.lora_alpha)
        with torch.no_grad():
            divergences = [losses(decoder, lora, rows[:1], held).drift.item() for held in anchors(decoder, ANCHORS)]
        return float(np.mean(divergences)), answer_loss(base, adapter, rows)

    (free, free_loss), (held, held_loss) = drift(0.0), drift(1.0)
    assert free > 0.05
    assert held < 0.7 * free
    assert held_loss < 0.5 * answer_loss(base, None, facts(16, 1)) and free_loss < held_loss


def test_weights_of_another_size_than_the_metadata_has_are_refused(tmp_path):
    model = torch_model(Tiny())
    model.config.intermediate_size = 200
    path = write_model(tmp_path / "m.gguf", model, Tiny())
    with GgufFile(path) as base, pytest.raises(UnsupportedError, match=r"ffn_gate.weight is \(96, 64\), .* wants \(200, 64\)"):
        Decoder(base, CPU32)


def test_untrained_adapter_changes_nothing_and_is_a_snapshot(models):
    base, _ = models("qwen2")
    lora = Lora(base, Decoder(base, CPU32).shape, 4, 8.0, 1, CPU32)
    adapter = lora.adapter()
    assert answer_loss(base, adapter, ROWS) == answer_loss(base, None, ROWS)
    assert all(np.abs(a).max() > 0 and not b.any() for a, b in adapter.pairs.values())
    with torch.no_grad():
        lora.flat += STD
    assert not any(b.any() for _, b in adapter.pairs.values())


@pytest.mark.parametrize(("most", "left"), [(0.0, 5.0), (1.0, 1.0), (9.0, 5.0)])
def test_a_gradient_is_shortened_to_the_limit_where_there_is_one(most, left):
    flat = torch.nn.Parameter(torch.zeros(2))
    flat.grad = torch.tensor([3.0, 4.0])
    assert AdamW(flat, 0.0, most).clip() == 5.0
    assert flat.grad.norm().item() == pytest.approx(left)


def test_loss_that_is_not_a_number_is_an_error(models, monkeypatch):
    base, _ = models("llama")
    monkeypatch.setattr(loop, "backward", lambda *arguments: [float("nan")] * len(arguments[2]))
    with pytest.raises(Diverged, match=r"step 1 of 20 \(rows: new [123], .*learning_rate"):
        fit(base, facts(3, 1), [], FAST)


def test_a_loss_that_is_not_a_number_names_its_rows_and_not_the_whole_step(models, monkeypatch):
    base, _ = models("llama")
    new = [replace(row, name=str(10 + i)) for i, row in enumerate(facts(8, 1))]
    replay = [replace(row, name="written") for row in facts(6, 2)]

    def spoilt(names: set[str]):
        def losses_of(*arguments) -> list[float]:
            return [float("nan") if row.name in names else 1.0 for row in arguments[2]]

        monkeypatch.setattr(loop, "backward", losses_of)
        with pytest.raises(Diverged) as caught:
            fit(base, new, replay, FAST)
        assert "or remove the row that causes it (`edgecl forget ID`)" in str(caught.value)
        return str(caught.value).split("(rows: ")[1].split("); lower")[0]

    assert spoilt({"12"}) == "12" and spoilt({"written"}) == "written"
    assert sorted(spoilt({"12", "written"}).split(", ")) == ["12", "written"]
    some = spoilt({row.name for row in new})
    assert some.endswith(" and 3 more") and len(some.split(", ")) == loop.NAMED


# --- what is returned -------------------------------------------------------------------------------------------------


@pytest.fixture
def after_each_step(monkeypatch):
    """Return the trained numbers as they were before the first step, and after each."""
    seen, step = [], AdamW.step

    def noted(self, *arguments):
        if not seen:
            seen.append(self.flat.detach().clone())
        step(self, *arguments)
        seen.append(self.flat.detach().clone())

    monkeypatch.setattr(AdamW, "step", noted)
    return seen


def pairs_of(base, flat, settings=FAST):
    lora = Lora(base, Decoder(base, CPU32).shape, settings.r, settings.lora_alpha, settings.seed, CPU32)
    lora.flat.detach().copy_(flat)
    return lora.adapter()


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("patience", [0, 3])
def test_what_is_returned_is_the_best_on_held_out_rows_else_the_average_else_the_last(
    models, after_each_step, ema_decay, patience
):
    base, _ = models("llama")
    settings = replace(FAST, ema_decay=ema_decay, patience=patience, eval_every=2, learning_rate=1e-2)
    rows = facts(16, 1)
    adapter, report = fit(base, rows, [], settings, Night(heldout=[rows[0], *facts(4, 2)]))
    first, *after = after_each_step
    averages, average = [], first.double()
    for step, flat in enumerate(after):
        decay = min(ema_decay, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * flat.double()
        averages.append(average.float())
    n_steps = min(report.heldout, key=report.heldout.__getitem__) if patience else report.steps
    assert report.stopped_early == bool(patience) and (n_steps < report.steps) == bool(patience)
    wanted, last = pairs_of(base, averages[n_steps - 1]), pairs_of(base, after[-1])
    for name, pair in adapter.pairs.items():
        for got, reference in zip(pair, wanted.pairs[name], strict=True):
            np.testing.assert_allclose(got, reference, atol=1e-6)
    assert same(adapter, last) == (not ema_decay and not patience)
    if patience:
        loss = answer_loss(base, adapter, [rows[0], *facts(4, 2)])
        assert report.heldout[n_steps] == pytest.approx(loss, rel=0.02), "what is returned is what was measured"


# --- where it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "cores", "used"), [(0, 4, 3), (4, 4, 3), (2, 4, 2), (0, 2, 2), (2, 2, 2), (9, 4, 3)])
def test_a_core_of_more_than_two_is_left_however_many_threads_are_asked_for(models, monkeypatch, threads, cores, used):
    base, _ = models("llama")
    asked = []
    monkeypatch.setattr(weights, "default_threads", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    fit(base, facts(3, 1), [], FAST, minutes=1e-9, threads=threads)
    assert asked == [used]


@pytest.mark.parametrize(
    ("n_gpu_layers", "has_cuda", "is_fast", "device", "dtype"),
    [
        (-1, True, True, "cuda", torch.bfloat16),
        (99, True, False, "cuda", torch.float32),
        (0, True, True, "cpu", None),
        (-1, False, True, "cpu", None),
    ],
)
def test_cuda_is_taken_where_it_is_there_and_allowed(monkeypatch, n_gpu_layers, has_cuda, is_fast, device, dtype):
    def is_supported(including_emulation=True):
        return is_fast or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    for cpu_is_fast in (True, False):
        monkeypatch.setattr(weights, "bf16_is_fast", lambda fast=cpu_is_fast: fast)
        on_cpu = torch.bfloat16 if cpu_is_fast else torch.float32
        assert placement(n_gpu_layers) == Placement(torch.device(device), dtype or on_cpu)


# --- what is merged into minimums -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("qtype", "tied"), [(Q.Q4_0, True), (Q.Q4_1, True), (Q.Q5_0, True), (Q.Q8_0, False), (Q.F16, False)])
def test_what_is_learned_on_four_bits_is_all_in_the_file_of_four_bits(tmp_path, qtype, tied):
    rows = facts(12, 1)
    with GgufFile(build(tmp_path / "tiny.gguf", qtype=qtype, width=128)[0]) as base:
        in_blocks = in_minimums(base, "keep_minimums")
        adapter, _ = fit(base, rows, [], FAST, Night(in_blocks=in_blocks))
        assert all((by_block(a) is not None) == tied for a, _ in adapter.pairs.values())
        report = merge(base, adapter, tmp_path / "merged.gguf", "keep_minimums")
        with GgufFile(tmp_path / "merged.gguf") as merged:
            learned, served = answer_loss(base, adapter, rows), answer_loss(merged, None, rows)
        assert learned < 0.2 * answer_loss(base, None, rows)
        if tied:
            assert report.rounded == {"minimums": len(adapter.pairs)}
            assert served == pytest.approx(learned, rel=0.02)
        again, _ = fit(base, rows, [], replace(FAST, epochs=1), Night(start=adapter, in_blocks=in_blocks))
        assert all((by_block(a) is not None) == tied for a, _ in again.pairs.values()), "the next night goes on like it"
        whole, _ = fit(base, rows, [], replace(FAST, epochs=1))
        assert all(by_block(a) is None for a, _ in whole.pairs.values())


def test_an_adapter_that_differs_within_blocks_goes_on_doing_so(tmp_path):
    with GgufFile(build(tmp_path / "tiny.gguf", qtype=Q.Q4_1, width=128)[0]) as base:
        older = random_adapter(base, size=0.1)
        night = Night(start=older, in_blocks=in_minimums(base, "keep"))
        adapter, _ = fit(base, facts(4, 1), [], replace(FAST, epochs=1), night)
        assert all(by_block(a) is None for a, _ in adapter.pairs.values())


@pytest.mark.parametrize("depth", [1.0, 0.5])
def test_a_larger_rank_changes_nothing_of_what_an_adapter_does(models, depth):
    base, _ = models("llama")
    older = random_adapter(base, size=0.1)
    untouched, _ = fit(base, facts(4, 1), [], replace(FAST, depth=depth), Night(start=older), minutes=1e-9)
    assert len(older.pairs["blk.0.attn_q.weight"][0]) < FAST.r
    assert answer_loss(base, untouched, ROWS) == pytest.approx(answer_loss(base, older, ROWS), rel=1e-5)
