"""Turn a GGUF file back into a Hugging Face folder, with transformers' own GGUF reader: a folder to convert from.

``python examples/lab/gguf_to_hf.py [--dtype bfloat16] smollm2 DIR`` writes config.json, model.safetensors and the tokenizer to
DIR. In float32 the weights are exactly what the file's blocks decode to; converting DIR to F32 has to give them again.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from edgecl.learner import find_model


def gguf_to_hf(gguf: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a GGUF file's weights, configuration and tokenizer as a Hugging Face folder."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    """Convert what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a GGUF file, or smollm2 for the packaged one")
    parser.add_argument("dir", type=Path)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    args = parser.parse_args()
    gguf_to_hf(find_model(args.model), args.dir, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
