"""The head over a sample of the vocabulary: right on average, answers always in it, as good to learn by heart with."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_train import CPU32, FAST, answer_loss, facts, fit
from tiny import N_VOCAB, build

from edgecl.errors import NotNow
from edgecl.train import LatentStore, Night
from edgecl.train.decoder import Decoder
from edgecl.train.head import NO_TOKEN, NTH, Sample, log_sum
from edgecl_convert import GgufFile

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = facts(4, seed=3)
ANSWERS = sorted({token for row in ROWS for token in row.answer})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    return GgufFile(build(tmp_path_factory.mktemp("head") / "tiny.gguf", "llama")[0])


@pytest.mark.parametrize("is_resident", [True, False])
@pytest.mark.parametrize("rows_at_once", [16, 1000])
def test_over_all_turns_a_sample_sums_to_the_vocabulary(
    base: GgufFile, monkeypatch: pytest.MonkeyPatch, rows_at_once: int, is_resident: bool
) -> None:
    assert 0 < N_VOCAB % 16 < NTH, "in one turn, nothing of the last part"
    weights = Decoder(base, CPU32, resident_head=is_resident).weights
    monkeypatch.setattr("edgecl.train.weights.HEAD_PART", rows_at_once * weights.shape.width)
    hidden = torch.randn(5, weights.shape.width, generator=torch.Generator().manual_seed(1))
    without = torch.tensor([NO_TOKEN, *ANSWERS[:4]])
    sample, sums, gradients = Sample(weights, ROWS), [], []
    for sample.turn in range(NTH):
        log_z, gradient = log_sum(hidden, without, weights, sample)
        sums.append(log_z.double().exp())
        gradients.append(gradient.double() * sums[-1][:, None])
    assert all((first - second).abs().max() > 1e-3 * first.max() for first, second in pairwise(sums)), "others in each turn"
    whole, expected = log_sum(hidden, without, weights)
    torch.testing.assert_close(torch.stack(sums).mean(0), whole.double().exp(), rtol=1e-5, atol=0.0)
    expected = expected.double() * whole.double().exp()[:, None]
    assert (torch.stack(gradients).mean(0) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("n_vocab", "sizes"), [(256, [64] * 4), (96, [48] * 2), (90, [64, 26]), (272, [64] * 4 + [16])])
def test_parts_of_the_head_are_of_one_size_where_its_rows_allow_it(
    base: GgufFile, monkeypatch: pytest.MonkeyPatch, n_vocab: int, sizes: list[int]
) -> None:
    weights = Decoder(base, CPU32).weights
    monkeypatch.setattr("edgecl.train.weights.HEAD_PART", 70 * weights.shape.width)
    monkeypatch.setattr(weights, "shape", replace(weights.shape, n_vocab=n_vocab))
    monkeypatch.setattr(weights, "_head", torch.arange(n_vocab)[:, None])
    parts = list(weights.head())
    assert [len(rows) for _, rows in parts] == sizes
    assert torch.cat([rows for _, rows in parts]).flatten().tolist() == list(range(n_vocab))
    assert [first for first, _ in parts] == [int(rows[0]) for _, rows in parts]


def test_the_whole_vocabulary_is_what_torch_sums(base: GgufFile) -> None:
    weights = Decoder(base, CPU32).weights
    hidden = torch.randn(3, weights.shape.width, generator=torch.Generator().manual_seed(2)).requires_grad_()
    logits = hidden @ weights.head_rows(range(N_VOCAB)).T
    left = torch.ones(3, N_VOCAB, dtype=torch.bool)
    left[1, 7] = left[2, N_VOCAB - 1] = False
    expected = logits.masked_fill(~left, -torch.inf).logsumexp(-1)
    expected.sum().backward()
    found, gradient = log_sum(hidden.detach(), torch.tensor([NO_TOKEN, 7, N_VOCAB - 1]), weights)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-5, atol=1e-5)


def test_a_sample_whose_others_are_all_answers_is_a_number(base: GgufFile) -> None:
    weights = Decoder(base, CPU32).weights
    everything = [replace(ROWS[0], ids=list(range(N_VOCAB)), supervised=[True] * N_VOCAB)]
    hidden = torch.randn(2, weights.shape.width, generator=torch.Generator().manual_seed(3))
    without = torch.tensor([NO_TOKEN, 5])
    for found, expected in zip(
        log_sum(hidden, without, weights, Sample(weights, everything)), log_sum(hidden, without, weights), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_are_learned_by_heart_with_a_sample_and_a_run_goes_on_bit_for_bit(base: GgufFile, tmp_path: Path) -> None:
    rows = facts(16, seed=4)
    whole, _ = fit(base, rows, night=Night())
    sampled, report = fit(base, rows, night=Night(samples=True))
    before = answer_loss(base, None, rows)
    assert answer_loss(base, sampled, rows) < 0.1 * before
    assert answer_loss(base, sampled, rows) < answer_loss(base, whole, rows) + 0.05 * before

    upper, steps = replace(FAST, depth=0.5), iter(range(report.steps))
    night = Night(samples=True, checkpoint=tmp_path / "run.safetensors", stop=lambda: next(steps) == report.steps // 2)
    with LatentStore(tmp_path / "latents.db", "") as night.store:
        uninterrupted, _ = fit(base, rows, settings=upper, night=Night(samples=True, store=night.store))
        with pytest.raises(NotNow):
            fit(base, rows, settings=upper, night=night)
        resumed, report = fit(base, rows, settings=upper, night=replace(night, stop=bool))
    assert report.resumed_at == report.steps // 2
    for name, pair in uninterrupted.pairs.items():
        assert all((a == b).all() for a, b in zip(pair, resumed.pairs[name], strict=True))
