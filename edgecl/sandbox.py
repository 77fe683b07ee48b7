"""A model's code, run against tests in a child process that can do nothing but compute.

No network (a namespace of its own where the system allows it), no file written, no other process started, limited CPU time,
memory and wall time. What a program prints is dropped; it has passed when it runs to its end.

*Does not cover*: code that is written to break out. Python's audit hooks stop what a model says by accident, not an attacker
who knows them; the namespace and the resource limits hold for both. Linux.
"""

from __future__ import annotations

import marshal
import re
import secrets
import subprocess
import sys
import tempfile

CPU_S, WALL_S = 3, 20  # on a busy machine, a night gets little of a core
MEMORY_BYTES = 512_000_000
INDENT = "    "
_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)

_RUNNER = """
import marshal, os, resource, sys
cpu_s, memory_bytes = map(int, sys.argv[1:])
token, *programs = marshal.load(sys.stdin.buffer)
done = os.dup(1)
nothing = os.open(os.devnull, os.O_WRONLY)
os.dup2(nothing, 1), os.dup2(nothing, 2)
try:
    import ctypes
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET: no interface but its own
except OSError:
    pass
for what, most in (("CPU", cpu_s), ("AS", memory_bytes), ("FSIZE", 0), ("CORE", 0), ("NPROC", 0)):
    limit = getattr(resource, "RLIMIT_" + what)
    resource.setrlimit(limit, (most, most))
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
BARRED = tuple('''socket. subprocess. ctypes. shutil. ftplib. smtplib. urllib. http. pty. sqlite3. signal. os.system os.exec
    os.spawn os.posix_spawn os.fork os.kill os.remove os.rename os.rmdir os.mkdir os.link os.symlink os.truncate os.chmod
    os.chown os.setxattr os.putenv'''.split())
def bar(event, args):
    if event.startswith(BARRED) or event == "open" and (args[2] or 0) & WRITES:
        raise PermissionError(event)
sys.addaudithook(bar)
def compiled(program):
    try:
        return compile(program, "answer", "exec")
    except SyntaxError:
        return None
exec(next(filter(None, map(compiled, programs))), {"__name__": "__main__"})
os.write(done, token.encode())
os._exit(0)
"""


def code_in(answer: str) -> str:
    """Return the code of an answer: what stands in its first fence, or all of it."""
    found = _FENCED.search(answer)
    return found[1] if found else answer


def programs_of(before: str, answer: str, after: str) -> list[str]:
    """Return the programs that an answer between `before` and `after` may mean: its code as it stands, or indented otherwise.

    Some chat templates trim answers, so that the rest of a function begins without its indentation; with others a space comes
    first that is no part of the answer.
    """
    code = code_in(answer)
    bare = code.lstrip()
    return [f"{before}{text}\n{after}\n" for text in dict.fromkeys((code, bare, INDENT + bare))]


def passes(*programs: str) -> bool:
    """Return whether the first of some programs that compiles runs to its end, within the limits and without an exception."""
    token = secrets.token_hex(16)  # a program that leaves early does not know it
    with tempfile.TemporaryDirectory(prefix="edgecl-sandbox-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", _RUNNER, str(CPU_S), str(MEMORY_BYTES)],
                input=marshal.dumps([token, *programs]),
                capture_output=True,
                timeout=WALL_S,
                cwd=folder,
                env={},
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0 and done.stdout == token.encode()
