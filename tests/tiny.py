"""Build tiny checkpoints of every family, with random weights that are equal on every machine.

The weights are far larger than a fresh model's. At a standard deviation of 0.02, attention is close
to an average of the past and logits are close to 0. A model with wrong RoPE, a wrong window or the
wrong order of heads would then pass.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from formats.checkpoint import read_config
from model import Llama, PackedAttention

LLAMA = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-2,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = LLAMA | {"num_key_value_heads": 2, "rope_theta": 500000.0, "attention_bias": False}
MISTRAL = LLAMA | {"model_type": "mistral"}
MISTRAL_GQA = MISTRAL | {"num_key_value_heads": 2}

# With 64 original positions, one frequency is kept, one is on the ramp, the others are stretched.
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

FAMILIES = {  # config.json as transformers 4 writes it
    "llama-2": LLAMA,  # neither rope_theta nor num_key_value_heads
    "llama-3": LLAMA3 | {"rope_scaling": None, "mlp_bias": False, "pretraining_tp": 1},
    "llama-3.1": LLAMA3 | {"rope_scaling": SCALING},
    "llama-3.2": LLAMA3 | {"rope_scaling": SCALING | {"factor": 32.0}, "head_dim": 16,
                           "tie_word_embeddings": True},
    "tinyllama": LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 1, "rope_theta": 1e4,
                          "rope_scaling": None},
    "smollm2": LLAMA | {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1,
                        "rope_theta": 100000.0, "rope_interleaved": False,
                        "tie_word_embeddings": True},
    "mistral-0.1": MISTRAL_GQA | {"rope_theta": 10000.0, "sliding_window": 7},
    "mistral-bare": MISTRAL | {"num_attention_heads": 16},  # no window, no num_key_value_heads
    "mistral-0.3": MISTRAL_GQA | {"rope_theta": 1e6, "sliding_window": None, "head_dim": None},
    "nemo": MISTRAL_GQA | {"rope_theta": 1e6, "sliding_window": None, "head_dim": 10},
}  # fmt: skip

# Factors on the standard deviation of a weight matrix. They give logits of order 3, and attention
# that picks a few of its keys.
GAINS = {"q_proj": 1.5, "k_proj": 1.5, "lm_head": 3.0, "embed_tokens": 3.0}


def dialect_5(config: dict) -> dict:
    """Return the same `config.json` as transformers 5 writes it."""
    config = dict(config)
    theta, scaling = config.pop("rope_theta", 10000.0), config.pop("rope_scaling", None) or {}
    return config | {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}


def fill(model: Llama) -> Llama:
    """Fill the model with random weights, each drawn from a seed made of its name."""
    for name, parameter in model.named_parameters():
        rng = np.random.default_rng(list(name.encode()))
        noise = rng.standard_normal(tuple(parameter.shape))
        if parameter.dim() == 1:
            value = 1 + noise / 4
        else:
            gain = GAINS.get(name.split(".")[-2], 1.0)
            value = gain * noise / parameter.shape[1] ** 0.5
        parameter.data = torch.from_numpy(value).to(parameter.dtype)
    return model


def write(folder: Path, config: dict, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint folder with one model.safetensors, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = fill(Llama(read_config(folder)))
    tensors = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def logits(model: Llama, tokens: list[int]) -> torch.Tensor:
    """Return the next-token logits [T, V] after every token of one unpacked sequence."""
    positions = torch.arange(len(tokens))
    offsets = torch.tensor([0, len(tokens)], dtype=torch.int32)
    attend = PackedAttention(positions, offsets, offsets, model.config.sliding_window)
    return model.logits(model.model(torch.tensor(tokens), positions, attend))
