"""Python in child processes, which find this package wherever it lies: what llama.cpp does to one does not end its parent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def child_environment(*roots: Path) -> dict[str, str]:
    """Return this process's environment for one that imports this package, and others from `roots`.

    A file of the user's folder may be called as a module is: that folder is no place to import from.
    """
    paths = [*map(str, roots), str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths).rstrip(os.pathsep)}


def run_python(code: str, *arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run code in a child process, with `data` on its stdin."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, input=data, env=child_environment(), capture_output=True, check=False)
