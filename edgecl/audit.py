"""Whether a home's files are still what its manifests say: every hash is computed anew.

*Does not cover*: the newest manifest, which no later one vouches for, beyond what it says of its files; the store's rows; a
`keep_models` that was lower when a model was dropped: such a model is said to be missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .errors import GenerationError
from .generations import ASKER, Generation, Generations, sha256_file

MISSING, CHANGED, UNKNOWN = "missing", "changed", "unknown"


@dataclass(frozen=True)
class Finding:
    """A file that is not as it should be.

    Attributes:
        path: as a person finds it: relative to the home, or the base's own path.
        problem: missing, changed or unknown; detail: what is known about it.
    """

    path: str
    problem: str
    detail: str = ""


@dataclass
class AuditReport:
    """What was checked.

    Attributes:
        dropped: merged models that were deleted to save space (keep_models), and can be rebuilt.
    """

    findings: list[Finding] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    n_files: int = 0
    n_bytes: int = 0
    dropped: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether everything is as the manifests say."""
        return not self.findings


def audit(home: Path, keep_models: int) -> AuditReport:
    """Compute every hash of a home's manifests anew: the base, every generation's files, and parents.

    A night may run meanwhile: what it publishes after the look at the folder is not checked. Where the base's manifest is gone
    or damaged nothing else is known, and it is the only finding.
    """
    generations, report = Generations(home), AuditReport()
    base = _load(generations, 0, report)
    if base is None:
        return report
    _check(base.model, str(base.model), base.manifest.base_sha256, report)
    loaded = [base, *(found for number in _numbers(generations, report) if (found := _load(generations, number, report)))]
    for generation in loaded:
        _check_files(generations, generation, keep_models, report)
    report.generations = [generation.number for generation in loaded]
    _check_parents(loaded, generations, report)
    try:
        generations.current()
    except GenerationError as error:
        report.findings.append(Finding("current", CHANGED if generations.link.is_symlink() else MISSING, str(error)))
    return report


def _numbers(generations: Generations, report: AuditReport) -> list[int]:
    """Return the numbers of all generations but the base, with those whose manifest is gone; report what is none."""
    numbers = []
    for path in sorted(generations.folder.iterdir()):
        if path.is_dir() and path.name.isdecimal():
            numbers.append(int(path.name))
        elif not path.name.startswith(".draft-"):  # of a night that runs now, or died
            report.findings.append(Finding(_name(path, generations), UNKNOWN, "is no generation"))
    return [number for number in numbers if number]


def _load(generations: Generations, number: int, report: AuditReport) -> Generation | None:
    path = generations.folder / f"{number:04d}" / "manifest.json"
    report.n_files += 1
    try:
        return generations.load(number)
    except GenerationError as error:
        problem = CHANGED if path.is_file() else MISSING
        report.findings.append(Finding(_name(path, generations), problem, str(error) if problem == CHANGED else ""))
        return None


def _check_files(generations: Generations, generation: Generation, keep_models: int, report: AuditReport) -> None:
    manifest, folder = generation.manifest, generation.folder
    for name, wanted in manifest.files.items():
        path = folder / name
        is_old = name == manifest.model and not generations.keeps_model(generation.number, keep_models)
        if not path.exists() and (is_old or name == ASKER):  # `forget` deletes askers
            report.dropped.append(_name(path, generations))
        else:
            _check(path, _name(path, generations), wanted, report)
    found = (path for path in sorted(folder.rglob("*")) if not path.is_dir() or path.is_symlink())
    for path in found:
        if str(path.relative_to(folder)) not in {*manifest.files, "manifest.json"}:
            report.findings.append(Finding(_name(path, generations), UNKNOWN, "no manifest names it"))


def _check(path: Path, name: str, wanted: str, report: AuditReport) -> None:
    report.n_files += 1
    try:
        got = sha256_file(path)
        report.n_bytes += path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        report.findings.append(Finding(name, MISSING, getattr(error, "strerror", None) or str(error)))
        return
    if got != wanted:
        report.findings.append(Finding(name, CHANGED, f"sha256 is {got[:12]}, was {str(wanted)[:12]}"))


def _check_parents(loaded: list[Generation], generations: Generations, report: AuditReport) -> None:
    hashes = {generation.hash for generation in loaded}
    named = {generation.manifest.parent for generation in loaded}
    for child in loaded:
        if child.number == 0 or child.manifest.parent in hashes:
            continue
        orphans = [
            _name(g.folder / "manifest.json", generations) for g in loaded if g.number < child.number and g.hash not in named
        ]
        detail = f"its parent, {child.manifest.parent[:12]}, is no manifest here"
        detail += f"; one of these may have been it: {', '.join(orphans)}" if orphans else ""
        report.findings.append(Finding(_name(child.folder / "manifest.json", generations), CHANGED, detail))


def _name(path: Path, generations: Generations) -> str:
    return str(path.relative_to(generations.home))
