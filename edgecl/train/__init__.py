"""Training in torch: base weights from GGUF, LoRA, batches, the loop."""

import os

# A thread of OpenMP that waits for the next product spins for a while: briefly, because decoding needs its core meanwhile.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from .batches import TrainRow
from .checkpoint import DamagedCheckpointError
from .latents import LatentStore
from .loop import Night, TrainReport, train

__all__ = ["DamagedCheckpointError", "LatentStore", "Night", "TrainReport", "TrainRow", "train"]
