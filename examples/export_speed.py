"""How long a Hugging Face folder takes to become a Q8_0 GGUF, and how much memory, beside gguf-py's own writer.

Makes a bfloat16 folder of the packaged model, then converts it, alternating: once as `edgecl convert` does, in a child
process whose peak memory is read, and once with gguf.GGUFWriter and gguf.quants.quantize in another, which gets the same
tensors, decoded by our reader, and the same metadata. Prints the medians and their ratio as JSON. Ours fsyncs its file.

    python examples/export_speed.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = """
import json, sys, time
began = time.perf_counter()
from edgecl_convert import merge, open_source
imported = time.perf_counter()
with open_source(sys.argv[1]) as model:
    merge(model, None, sys.argv[2], "Q8_0", n_threads=int(sys.argv[3]))
print(json.dumps({
    "s": time.perf_counter() - imported,
    "import_s": imported - began,
    "rss": int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024,
    "torch": "torch" in sys.modules,
}))
"""
THEIRS = """
import json, sys, time
import gguf
from edgecl_convert import GgufFile, open_source
fields = []
with GgufFile(sys.argv[3]) as ours:
    for key in ours.keys:
        kind, item = (int.from_bytes(ours.raw_field(key)[i : i + 4], "little") for i in (0, 4))
        item = gguf.GGUFValueType(item) if kind == gguf.GGUFValueType.ARRAY else None
        if key != "general.architecture":
            fields.append((key, ours.get(key), gguf.GGUFValueType(kind), item))
    qtypes = {name: info.qtype for name, info in ours.tensors.items()}
began = time.perf_counter()
with open_source(sys.argv[1]) as model:
    writer = gguf.GGUFWriter(sys.argv[2], model.architecture)
    for field in fields:
        writer.add_key_value(*field)
    for name, qtype in qtypes.items():
        writer.add_tensor(name, gguf.quants.quantize(model.weights(name), qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
print(json.dumps({
    "s": time.perf_counter() - began,
    "rss": int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024,
}))
"""


def run(code: str, *arguments: Path | str) -> dict[str, float]:
    """Return what a child process prints."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, stdout=subprocess.PIPE)
    facts: dict[str, float] = json.loads(done.stdout)
    return facts


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    ours, alone, theirs = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder, ours_path, theirs_path = (Path(name) / part for part in ("hf", "ours.gguf", "theirs.gguf"))
        lab = Path(__file__).parent / "lab"
        subprocess.run([sys.executable, lab / "gguf_to_hf.py", "smollm2", folder, "--dtype", "bfloat16"], check=True)
        for attempt in range(repeats + 1):
            one = run(OURS, folder, ours_path, "1")
            both = run(OURS, folder, ours_path, "0")
            other = run(THEIRS, folder, theirs_path, ours_path)
            if attempt:  # the first of each warms up
                alone.append(one)
                ours.append(both)
                theirs.append(other)

    def median(runs: list[dict[str, float]], key: str) -> float:
        return round(statistics.median(facts[key] for facts in runs), 3)

    print(
        json.dumps(
            {
                "convert_s": median(ours, "s"),
                "convert_1_thread_s": median(alone, "s"),
                "gguf_py_s": median(theirs, "s"),
                "ratio": round(statistics.median(a["s"] / b["s"] for a, b in zip(ours, theirs, strict=True)), 3),
                "ratio_1_thread": round(statistics.median(a["s"] / b["s"] for a, b in zip(alone, theirs, strict=True)), 3),
                "peak_rss_mb": round(max(facts["rss"] for facts in ours) / 1e6),
                "gguf_py_peak_rss_mb": round(max(facts["rss"] for facts in theirs) / 1e6),
                "torch_imported": any(facts["torch"] for facts in ours),
            }
        )
    )


if __name__ == "__main__":
    main()
