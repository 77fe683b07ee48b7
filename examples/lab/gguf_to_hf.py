"""Turn a GGUF file back into a Hugging Face folder, with transformers' own GGUF reader: a folder to convert from.

``python examples/lab/gguf_to_hf.py [--dtype bfloat16] smollm2 DIR`` writes config.json, model.safetensors and the tokenizer to
DIR. In float32 the weights are exactly what the file's blocks decode to; converting DIR to F32 has to give them again.
transformers forgets how the file's tokenizer splits words, so that is put back by the name that the file gives it.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from edgecl.places import find_model
from edgecl_convert import GgufFile
from edgecl_convert.pretokenizer import KNOWN


def gguf_to_hf(gguf: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a GGUF file's weights, configuration and tokenizer as a Hugging Face folder."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    with GgufFile(gguf) as file:
        pre = file.get("tokenizer.ggml.pre")
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    data["pre_tokenizer"] = next((k.description() for k in KNOWN if k.pre == pre), data["pre_tokenizer"])
    path.write_text(json.dumps(data, ensure_ascii=False), "utf-8")


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
