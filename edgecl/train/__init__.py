"""Training in torch: base weights from GGUF, LoRA, batches, the loop."""

import os

# A thread of OpenMP that waits for the next product spins for a while: briefly, because decoding needs its core meanwhile.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from .batches import TrainRow
from .checkpoint import UnreadableCheckpointError
from .latents import LatentStore
from .loop import Night, TrainReport, train

__all__ = ["LatentStore", "Night", "TrainReport", "TrainRow", "UnreadableCheckpointError", "train"]
