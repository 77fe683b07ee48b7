"""llama.cpp: load a generation, answer, score and time it, have it write rows."""

from .latency import N_PROMPT, latency
from .model import Vocab, VocabFile
from .prose import likeliest_in, read_prose
from .rewording import reword
from .scoring import Row, RowScore, fitted, score
from .session import GGML_TYPE_F16, GGML_TYPE_F32, Engine
from .writing import Written, write_rows

__all__ = [
    "GGML_TYPE_F16",
    "GGML_TYPE_F32",
    "N_PROMPT",
    "Engine",
    "Row",
    "RowScore",
    "Vocab",
    "VocabFile",
    "Written",
    "fitted",
    "latency",
    "likeliest_in",
    "read_prose",
    "reword",
    "score",
    "write_rows",
]
