"""The conversion stage, usable alone: Hugging Face folder or GGUF in, GGUF out, adapters merged; imports nothing of edgecl.

Opens neither torch nor llama_cpp: ggml's kernels are called by path. Only `verify` does, and a probe, in a child process.
"""

from .adapter import (
    Adapter,
    read_adapter,
    read_gguf_adapter,
    read_peft_adapter,
    write_gguf_adapter,
    write_peft_adapter,
)
from .adaptive import adaptive_recipe, check_quant, choose_recipe
from .atomic import atomic_file, fsync_folder, write_atomic
from .errors import AdapterError, ConvertError, GgufError, UnsupportedError
from .gguf_file import GgufFile
from .hf_model import HfModel
from .imatrix import Imatrix, measure, read_or_measure
from .merge import MergeReport, check_output, in_minimums, merge, update_survival
from .probe import ProbeReport, check_probeable, probe
from .probe_plot import check_plot
from .probe_plot import draw as draw_probes
from .recipe import resolve_quant
from .source import Source, open_source
from .torture import TORTURE
from .verify import VerifyReport, verify
from .vocab import Vocabulary, read_vocabulary

__all__ = [
    "TORTURE",
    "Adapter",
    "AdapterError",
    "ConvertError",
    "GgufError",
    "GgufFile",
    "HfModel",
    "Imatrix",
    "MergeReport",
    "ProbeReport",
    "Source",
    "UnsupportedError",
    "VerifyReport",
    "Vocabulary",
    "adaptive_recipe",
    "atomic_file",
    "check_output",
    "check_plot",
    "check_probeable",
    "check_quant",
    "choose_recipe",
    "draw_probes",
    "fsync_folder",
    "in_minimums",
    "measure",
    "merge",
    "open_source",
    "probe",
    "read_adapter",
    "read_gguf_adapter",
    "read_or_measure",
    "read_peft_adapter",
    "read_vocabulary",
    "resolve_quant",
    "update_survival",
    "verify",
    "write_atomic",
    "write_gguf_adapter",
    "write_peft_adapter",
]
