"""A picture of one or several probes: gaps as bars, kurtosis by tensor. Needs matplotlib (the `plot` extra)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .atomic import atomic_file
from .errors import ConvertError, UnsupportedError
from .probe import MAX_GAP_PERCENT, ProbeReport

FORMATS = ("png", "svg", "pdf")


def check_plot(path: Path) -> None:
    """Check that a picture can be drawn, before anything is measured.

    Raises:
        UnsupportedError: matplotlib is not installed, or the name's ending is not one of FORMATS.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("a picture needs matplotlib, which is not installed; run: pip install 'edgecl[plot]'")
    if path.suffix.lower().lstrip(".") not in FORMATS:
        raise UnsupportedError(f"{path}: a picture's name must end in .{', .'.join(FORMATS)}")


def draw(reports: Sequence[ProbeReport], path: Path) -> Path:
    """Draw one row per model: the gap of each way of rounding, and the kurtosis of each tensor by layer; return `path`.

    Raises:
        UnsupportedError: see `check_plot`.
        ConvertError: the picture cannot be written.
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 3.4 * len(reports)
    figure, axes = plt.subplots(len(reports), 2, figsize=(10, height), squeeze=False, width_ratios=(1, 1.5))
    for (left, right), report in zip(axes, reports, strict=True):
        _bars(left, report)
        _kurtosis(right, report)
    figure.tight_layout()
    try:
        with atomic_file(path, 0o644) as out:
            figure.savefig(out, dpi=120, format=path.suffix.lower().lstrip("."))
    except ValueError as error:
        raise ConvertError(f"{path}: cannot be drawn: {error}") from None
    finally:
        plt.close(figure)
    return path


def _bars(axis: Any, report: ProbeReport) -> None:
    gaps = list(report.gaps.values())
    places, percents = range(len(gaps)), [gap.percent for gap in gaps]
    colours = ["tab:blue" if key.startswith("int8") else "tab:orange" for key in report.gaps]
    axis.bar(places, percents, yerr=[gap.margin for gap in gaps], color=colours, width=0.6, capsize=3, ecolor="0.35")
    for place, gap in zip(places, gaps, strict=True):
        top = max(gap.percent + gap.margin, 0)
        axis.annotate(f"{gap.percent:+.2f}%", (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axis.axhline(0, color="0.2", linewidth=0.8)
    axis.axhline(MAX_GAP_PERCENT, color="tab:red", linewidth=0.8, linestyle=":", label=f"limit of {MAX_GAP_PERCENT:.0f}%")
    _wide_scale(axis, [gap.percent + sign * gap.margin for gap in gaps for sign in (-1, 1)] + [MAX_GAP_PERCENT])
    axis.set_xticks(places, [gap.how.replace(" groups ", "\ngroups\n") for gap in gaps], fontsize=8)
    axis.set_ylabel("rise of perplexity, %")
    axis.legend(fontsize=7, loc="upper left")
    axis.set_title(f"{Path(report.model).name[:40]}\nperplexity {report.perplexity:.2f}", fontsize=9)


def _kurtosis(axis: Any, report: ProbeReport) -> None:
    kinds: dict[str, list[tuple[int, float]]] = {}
    others: list[tuple[str, float]] = []
    for tensor in report.tensors:
        match tensor.name.split("."):
            case ["blk", layer, kind, *_] if layer.isdigit():
                kinds.setdefault(kind, []).append((int(layer), tensor.kurtosis))
            case [name, *_]:
                others.append((name, tensor.kurtosis))
    for i, (kind, points) in enumerate(sorted(kinds.items())):
        axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, linewidth=0.8, color=f"C{i % 10}", label=kind)
    for i, (name, value) in enumerate(others):
        axis.axhline(value, linestyle=("--", "-.")[i % 2], linewidth=0.8, color="0.4", label=name)
    _wide_scale(axis, [tensor.kurtosis for tensor in report.tensors])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("layer")
    axis.set_ylabel("excess kurtosis")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axis.set_title("tails of the weights by tensor\n(0: as a normal distribution)", fontsize=9)


def _wide_scale(axis: Any, values: Sequence[float]) -> None:
    """Let small and very large values be seen side by side: linear up to 1, logarithmic beyond."""
    low, high = min(0.0, *values), max(0.0, *values)
    if max(-low, high) > 2:
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(1.5 * low - 0.1, 2 * high)
        axis.yaxis.set_major_formatter("{x:g}")
