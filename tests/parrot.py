"""Models that say one thing: what a chat prints can then be compared with what it must be."""

import shutil
from pathlib import Path

import torch
from tiny import BYTES, END, TOKENS, Tiny, torch_model, write_model

from edgecl import Learner
from edgecl.generations import Generation, Generations, Manifest, now, sha256_file

SHAPE = Tiny(width=256, n_layer=1)


def write_parrot(path: Path, answer: str, is_endless: bool = False) -> Path:
    """Write a model whose only answer is `answer`, over and over where it is endless.

    Each token leads to one next token: nothing but the embedding of the last one reaches the head. So no byte comes twice.
    """
    tokens = [TOKENS.index(BYTES[byte]) for byte in f"\n{answer}".encode()]  # the template ends in a line break
    assert len(set(tokens)) == len(tokens)
    model = torch_model(SHAPE)
    with torch.no_grad():
        embedding = torch.randn(model.get_input_embeddings().weight.shape, generator=torch.Generator().manual_seed(1)).sign()
        model.get_input_embeddings().weight.copy_(embedding)
        head = model.get_output_embeddings().weight.zero_()
        for token, following in zip(tokens, [*tokens[1:], tokens[1] if is_endless else END], strict=True):
            head[following] += embedding[token]
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
    return write_model(path, model, SHAPE)


def make_home(folder: Path, answer: str, is_endless: bool = False, n_ctx: int = 2048) -> Path:
    """Return a home whose base says `answer`."""
    base = write_parrot(folder / "parrot.gguf", answer, is_endless)
    profile = folder / "small.toml"
    profile.write_text(f"n_ctx = {n_ctx}\nn_batch = 256\nthreads = 1\n")
    Learner.init(base, folder / "home", profile=str(profile)).close()
    return folder / "home"


def publish_parrot(home: Path, answer: str) -> Generation:
    """Publish a generation that says `answer`, as a night does: a draft, a rename, a link."""
    generations = Generations(home)
    before = generations.current()
    draft = generations.draft()
    scratch = write_parrot(home / "scratch.gguf", answer)
    shutil.move(scratch, draft / "model.gguf")
    number = generations.next_number()
    files = {"model.gguf": sha256_file(draft / "model.gguf")}
    return generations.publish(
        draft, Manifest(number, before.hash, before.manifest.base_sha256, "model.gguf", now(), files=files)
    )
