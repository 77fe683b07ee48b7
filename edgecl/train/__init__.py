"""Training in torch: base weights from GGUF, LoRA, batches, the loop."""

from .batches import TrainRow
from .latents import LatentStore
from .loop import TrainReport, train

__all__ = ["LatentStore", "TrainReport", "TrainRow", "train"]
