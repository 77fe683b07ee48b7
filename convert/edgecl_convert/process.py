"""Python in child processes, which find this package wherever it lies: what llama.cpp does to one does not end its parent.

A file of the folder that a child starts in may be called as a module is: that folder is no place to import from. From 3.11 on
Python knows an option for that; what is done here works without.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_SAFELY = "import sys; sys.path[:] = filter(None, sys.path)"  # with -c, '' is the folder that Python starts in
_RUN = "del sys.argv[0]; import runpy; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"


def child_environment(*roots: Path) -> dict[str, str]:
    """Return this process's environment for one that imports this package, and others from `roots`."""
    own = (*roots, Path(__file__).resolve().parent.parent)
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # an empty one is the folder it starts in, too
    return os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, own), *given])}


def module_command(module: str, *arguments: str) -> list[str]:
    """Return a command that does what `python -m MODULE ARGUMENTS` does."""
    return [sys.executable, "-c", f"{_SAFELY}; {_RUN}", module, *arguments]


def run_python(code: str, *arguments: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run code in a child process, with `data` on its stdin."""
    command = [sys.executable, "-c", f"{_SAFELY}\n{code}", *arguments]
    return subprocess.run(command, input=data, env=child_environment(), capture_output=True, check=False)
