"""Training in torch: base weights from GGUF, LoRA, batches, the loop."""

from .batches import TrainRow
from .loop import TrainReport, train

__all__ = ["TrainReport", "TrainRow", "train"]
