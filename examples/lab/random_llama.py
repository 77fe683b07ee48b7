"""A llama-shaped GGUF of random Q4_0 weights, the size of a model that a small board would serve; it can say nothing.

``python examples/lab/random_llama.py OUT.gguf`` writes 1.24 billion weights in 0.7 GB: 16 layers of width 2,048 with a
vocabulary of 128,256, which is the shape of Llama 3.2 1B. Memory and time of training do not depend on what the weights are.
"""

import sys
from pathlib import Path

import gguf
import numpy as np

from edgecl_convert.ggml import quantize

WIDTH, N_FF, N_LAYER, N_HEAD, N_KV, N_VOCAB = 2048, 8192, 16, 32, 8, 128_256
Q4_0 = gguf.GGMLQuantizationType.Q4_0


def write_random_llama(path: Path) -> Path:
    """Write the model, a tensor at a time, and return its path."""
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_KV)
    writer.add_context_length(2048)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    head_dim = WIDTH // N_HEAD
    shapes = {"token_embd": (N_VOCAB, WIDTH)}
    for layer in range(N_LAYER):
        sizes = {"attn_q": WIDTH, "attn_k": N_KV * head_dim, "attn_v": N_KV * head_dim, "attn_output": WIDTH}
        shapes |= {f"blk.{layer}.{name}": (rows, WIDTH) for name, rows in sizes.items()}
        shapes |= {f"blk.{layer}.{name}": (N_FF, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down"] = (WIDTH, N_FF)
    norms = ["output_norm", *(f"blk.{layer}.{name}" for layer in range(N_LAYER) for name in ("attn_norm", "ffn_norm"))]
    rng = np.random.default_rng(0)
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    for name, shape in shapes.items():
        weights = rng.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)
        writer.add_tensor(f"{name}.weight", quantize(weights, Q4_0), raw_dtype=Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    print(write_random_llama(Path(sys.argv[1])))
