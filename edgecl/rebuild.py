"""A generation's merged model, written again where it was deleted to save space or is damaged: base and adapter are there."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from edgecl_convert import GgufFile, resolve_quant

from .child import Limits, Progress, run_stage
from .errors import GenerationError
from .generations import Generation, check_files, sha256_file


def rebuild(generation: Generation, base: str, out: Path, limits: Limits, progress: Progress | None = None) -> bool:
    """Merge a generation into its base as its night did; one that served base + adapter at F16, which keeps all of it.

    Returns:
        Whether the file is the one that served, bit for bit. It is not, once a newer edgecl merges otherwise.

    Raises:
        GenerationError: its adapter is gone or was changed.
        EdgeclError: the merge failed.
    """
    manifest, adapter = generation.manifest, generation.folder / "adapter.gguf"
    check_files(replace(generation, adapter=adapter))
    with GgufFile(base) as gguf:
        qtype = resolve_quant(manifest.model.removeprefix("model-").removesuffix(".gguf") or "F16", gguf, learned=True)
    run_stage("merge", {"base": base, "adapter": str(adapter), "out": str(out), "quant": qtype}, limits, progress)
    return sha256_file(out) == manifest.files.get(manifest.model)


def restore(generation: Generation, base: str, limits: Limits, progress: Progress | None = None) -> None:
    """Put a generation's merged model back where it serves from, if it is not there as it was published.

    Raises:
        GenerationError: what comes out is not what served, or base + adapter served and the adapter is gone or was changed.
        EdgeclError: as `rebuild`.
    """
    if not generation.number:
        return
    if generation.adapter or generation.model.is_file():
        try:
            check_files(generation)
            return
        except GenerationError:
            if generation.adapter:
                raise
    again = generation.folder.parents[1] / "runs/.model.tmp"  # where drafts are cleared of what a crash leaves
    again.parent.mkdir(mode=0o700, exist_ok=True)
    if rebuild(generation, base, again, limits, progress):
        os.replace(again, generation.model)
    else:
        again.unlink()
        raise GenerationError(
            f"generation {generation.number}: its model was dropped to save space, or was damaged, and this edgecl merges "
            "another one; roll back to one that is there, or `edgecl export` it"
        )
