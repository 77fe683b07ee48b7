"""Latent cache: the same states as computed anew, found again on later nights, never a wrong or stale one."""

import resource
import shutil
import sqlite3
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny import build, random_adapter, random_tokens

from edgecl.profile import Profile, TrainSettings
from edgecl.train import LatentStore, Night, TrainRow, train
from edgecl.train.decoder import Decoder
from edgecl.train.latents import OF_FREE, Latents
from edgecl.train.lora import Lora
from edgecl.train.losses import anchors, losses
from edgecl.train.weights import Placement, Weights
from edgecl_convert import GgufFile

pytestmark = pytest.mark.usefixtures("one_thread")

CPU32 = Placement(torch.device("cpu"), torch.float32)
PREFIX = random_tokens(10, 1)
BODIES = [random_tokens(5 + i, 2 + i) for i in range(4)]
ROWS = [TrainRow(PREFIX + body, [False] * (len(PREFIX) + 3) + [True] * (len(body) - 3)) for body in BODIES]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with GgufFile(build(tmp_path_factory.mktemp("latents") / "base.gguf", n_layer=3)[0]) as gguf:
        yield gguf


def latents(base, store, first_layer=2, below=None) -> Latents:
    decoder = Decoder(base, CPU32)
    lora = Lora(base, decoder.shape, 4, 8.0, 0, CPU32)
    if below is not None:
        lora.warm_start(below)
    lora.freeze_below(first_layer)
    return Latents(decoder, lora, store)


def states(found: Latents) -> torch.Tensor:
    return found.states([row.ids for row in ROWS])


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_losses_and_gradients_are_those_without_a_cache(tmp_path, architecture):
    with GgufFile(build(tmp_path / "base.gguf", architecture)[0]) as gguf, LatentStore(tmp_path / "l.db", "b") as store:
        found = latents(gguf, store, first_layer=1, below=random_adapter(gguf, size=0.2))
        decoder, lora = found.decoder, found.lora
        results = []
        for cache in (None, found, found):  # computed, then read back
            lora.flat.grad.zero_()
            loss = losses(decoder, lora, ROWS, None, cache).answers.sum()
            loss.backward()
            results.append((loss.item(), lora.flat.grad.clone()))
        assert found.n_computed == len(ROWS) and found.n_found >= len(ROWS)
        for loss, gradient in results[1:]:
            assert loss == pytest.approx(results[0][0], rel=1e-5)
            assert (gradient - results[0][1]).norm() < 1e-5 * results[0][1].norm()


def test_a_later_night_finds_rows_in_other_company(base, tmp_path):
    with LatentStore(tmp_path / "l.db", "b") as store:
        whole = states(latents(base, store))
    with LatentStore(tmp_path / "l.db", "b") as store:
        again = latents(base, store)
        part = again.states([ROWS[3].ids, ROWS[1].ids])
    assert again.n_computed == 0
    of_row = whole.split([len(row.ids) for row in ROWS])
    assert torch.equal(part, torch.cat([of_row[3], of_row[1]]))


def test_looking_ahead_decodes_a_packed_layer_once_for_all_parts_and_computes_a_row_once(base, tmp_path, monkeypatch):
    decoded: list[int] = []
    decode = Weights._decode_layer
    monkeypatch.setattr(Weights, "_decode_layer", lambda self, layer, out: decoded.append(layer) or decode(self, layer, out))
    with LatentStore(tmp_path / "alone.db", "b") as alone, LatentStore(tmp_path / "ahead.db", "b") as ahead:
        expected = torch.cat([latents(base, alone, 3).states([row.ids]) for row in ROWS])
        found = latents(base, ahead, 3)
        found.decoder.weights = Weights(base, found.decoder.shape, CPU32, n_resident=0)
        decoded.clear()
        found.look_ahead([ROWS[:2], [*ROWS[2:], ROWS[0]]], max(len(row.ids) for row in ROWS))
        assert decoded == [0, 1, 2] and found.n_computed == len(ROWS) and found.n_found == 0
        torch.testing.assert_close(states(found), expected, rtol=1e-5, atol=1e-5)
        assert found.n_computed == len(ROWS)


def test_another_base_depth_prefix_or_lower_adapter_is_computed_anew(base, tmp_path):
    path = tmp_path / "l.db"
    with LatentStore(path, "b") as store:
        states(latents(base, store))
        for other in (latents(base, store, first_layer=1), latents(base, store, below=random_adapter(base))):
            states(other)
            assert other.n_found == 0
        moved = latents(base, store)
        moved.states([PREFIX[1:] + body for body in BODIES])
        assert moved.n_found == 0
    with LatentStore(path, "another") as store:
        other = latents(base, store)
        states(other)
        assert other.n_found == 0


@pytest.mark.parametrize("damage", ["bit", "shorter", "not a database", "truncated", "table", "not to be opened"])
def test_what_is_damaged_is_computed_anew(base, tmp_path, damage):
    path = tmp_path / "l.db"
    with LatentStore(path, "b") as store:
        wanted = states(latents(base, store))
    if damage == "not a database":
        path.write_bytes(b"hello, this is no database at all")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1500])
    elif damage == "not to be opened":
        path.unlink()
        path.symlink_to(path)
    else:
        database = sqlite3.connect(path)
        with database:
            if damage == "table":
                database.execute("DROP TABLE latents")
            for key, blob in database.execute("SELECT key, states FROM latents").fetchall() if damage != "table" else ():
                wrong = bytes([blob[0] ^ 1]) + blob[1:] if damage == "bit" else blob[:-256]
                database.execute("UPDATE latents SET states = ? WHERE key = ?", (wrong, key))
        database.close()
    with LatentStore(path, "b") as store:
        found = latents(base, store)
        assert torch.equal(states(found), wanted)
        assert found.n_found == 0
        assert torch.equal(states(found), wanted) and found.n_computed == len(ROWS)


def test_over_its_limit_it_forgets_what_was_not_used_for_longest(base, tmp_path):
    row_bytes = 4 * 64 * 8
    rows = [random_tokens(8, 50 + i) for i in range(6)]
    path = tmp_path / "l.db"
    for row in rows[:4]:
        with LatentStore(path, "b", max_bytes=4 * row_bytes) as store:
            latents(base, store).states([row])
    with LatentStore(path, "b", max_bytes=4 * row_bytes) as store:  # the first is used again, two come new
        latents(base, store).states([rows[0]])
        latents(base, store).states(rows[4:])
    with LatentStore(path, "b", max_bytes=4 * row_bytes) as store:
        found = []
        for row in rows:
            cache = latents(base, store)
            cache.decoder.layer = None  # nothing may be computed: what is not there would be an error
            try:
                cache.states([row])
                found.append(True)
            except TypeError:
                found.append(False)
    assert found == [True, False, False, True, True, True]


def test_a_disk_that_is_full_costs_time_not_the_night(base, tmp_path):
    with LatentStore(tmp_path / "l.db", "b", max_bytes=10) as store:
        first, second = latents(base, store), latents(base, store)
        assert torch.equal(states(first), states(second)) and second.n_found == 0


@contextmanager
def full_disk():
    """Files of this process cannot grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("is_there", [False, True], ids=["no folder", "full"])
def test_where_no_cache_can_be_written_nothing_is_kept(base, tmp_path, is_there):
    folder = tmp_path / "runs"
    if is_there:
        folder.mkdir()
    with full_disk(), LatentStore(folder / "l.db", "b") as store:
        first, second = latents(base, store), latents(base, store)
        assert torch.equal(states(first), states(second)) and second.n_found == 0


def test_a_cache_that_another_process_has_locked_is_left_as_it_is(base, tmp_path):
    path = tmp_path / "l.db"
    with LatentStore(path, "b") as store:
        wanted = states(latents(base, store))
        other = sqlite3.connect(path)
        other.execute("BEGIN EXCLUSIVE")
        assert torch.equal(states(latents(base, store)), wanted)
        with LatentStore(path, "b") as later:
            assert torch.equal(states(latents(base, later)), wanted)
        other.close()
        again = latents(base, store)
        assert torch.equal(states(again), wanted) and again.n_computed == 0, "what was there is there"


def test_a_cache_grows_by_a_share_of_the_free_disk_at_most(base, tmp_path, monkeypatch):
    path, row_bytes = tmp_path / "l.db", 4 * 64 * 8
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(row_bytes / OF_FREE)))
    for n_opened in (1, 2, 3):  # each time there is room for one more
        with LatentStore(path, "b") as store:
            for i in range(2):
                latents(base, store).states([random_tokens(8, 10 * n_opened + i)])
        database = sqlite3.connect(path)
        assert database.execute("SELECT count(*) FROM latents").fetchone() == (n_opened,)
        database.close()


def test_what_the_base_predicts_on_general_text_is_kept_too(base, tmp_path):
    decoder, texts = Decoder(base, CPU32), [random_tokens(12 + i, 70 + i) for i in range(11)]
    wanted = anchors(decoder, texts)
    with LatentStore(tmp_path / "l.db", "b") as store:
        first = anchors(decoder, texts[:7], store=store)
        both = anchors(decoder, texts, store=store)
        decoder.run = None  # nothing may be computed
        again = anchors(decoder, texts[::-1], store=store)[::-1]
        with pytest.raises(TypeError):
            anchors(decoder, [texts[0][1:]], store=store)
    for found in (first, both, again):
        for one, other in zip(found, wanted, strict=False):
            assert one.ids == other.ids and one.entropy == pytest.approx(other.entropy, rel=1e-4)
            assert (one.expected - other.expected).norm() < 1e-4 * other.expected.norm()


def test_an_adapter_trained_with_a_cache_is_the_one_trained_without(base, tmp_path):
    settings = TrainSettings(epochs=2, min_steps=1, depth=0.34, learning_rate=5e-3, anchor_weight=1.0)
    anchor = [random_tokens(16, 90 + i) for i in range(2)]
    with LatentStore(tmp_path / "l.db", "b") as store:
        cached = [train(base, ROWS, [], settings, Profile(threads=1), Night(anchor=anchor, store=store))[0] for _ in range(2)]
    alone, _ = train(base, ROWS, [], settings, Profile(threads=1), Night(anchor=anchor))
    for name in alone.pairs:
        for one, other, plain in zip(cached[0].pairs[name], cached[1].pairs[name], alone.pairs[name], strict=True):
            assert (one == other).all()
            assert abs(one - plain).max() < 1e-4 + 1e-3 * abs(plain).max()
