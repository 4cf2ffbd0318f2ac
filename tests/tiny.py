"""Tiny checkpoints of every family, with random weights that are the same on every machine.

The weights are far larger than a fresh model's: with a standard deviation of 0.02 attention is an average over the
past, logits are almost nothing, and a model whose RoPE, window or head order is wrong would pass.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from model import Config, Llama, PackedAttention

LLAMA = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MISTRAL = LLAMA | {"model_type": "mistral"}
LLAMA3 = LLAMA | {"num_key_value_heads": 2, "rope_theta": 500000.0, "attention_bias": False}
SCALING = {  # of 64 original positions: one wave is kept, one is on the ramp, the others are stretched
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

FAMILIES = {  # config.json as transformers 4 writes it
    "llama-2": LLAMA,  # neither rope_theta nor num_key_value_heads
    "llama-3": LLAMA3 | {"rope_scaling": None, "mlp_bias": False, "pretraining_tp": 1},
    "llama-3.1": LLAMA3 | {"rope_scaling": SCALING},
    "llama-3.2": LLAMA3 | {"rope_scaling": SCALING | {"factor": 32.0}, "head_dim": 16, "tie_word_embeddings": True},
    "tinyllama": LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 1, "rope_theta": 1e4, "rope_scaling": None},
    "smollm2": LLAMA | {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "rope_theta": 100000.0,
                        "rope_interleaved": False, "tie_word_embeddings": True},
    "mistral-0.1": MISTRAL | {"num_key_value_heads": 2, "rope_theta": 10000.0, "sliding_window": 7},
    "mistral-bare": MISTRAL | {"num_attention_heads": 16},  # neither sliding_window nor num_key_value_heads
    "mistral-0.3": MISTRAL | {"num_key_value_heads": 2, "rope_theta": 1e6, "sliding_window": None, "head_dim": None},
    "nemo": MISTRAL | {"num_key_value_heads": 2, "rope_theta": 1e6, "sliding_window": None, "head_dim": 10},
}  # fmt: skip


def dialect_5(config: dict) -> dict:
    """The same `config.json` as transformers 5 writes it."""
    config = dict(config)
    theta, scaling = config.pop("rope_theta", 10000.0), config.pop("rope_scaling", None) or {}
    return config | {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}


def fill(model: Llama) -> Llama:
    """Random weights, each drawn by its name: logits of order 3, attention that picks a few of its keys."""
    for name, parameter in model.named_parameters():
        noise = np.random.default_rng(list(name.encode())).standard_normal(tuple(parameter.shape))
        if parameter.dim() == 1:
            value = 1 + noise / 4
        else:
            gain = {"q_proj": 1.5, "k_proj": 1.5, "lm_head": 3.0, "embed_tokens": 3.0}.get(name.split(".")[-2], 1.0)
            value = gain * noise / parameter.shape[1] ** 0.5
        parameter.data = torch.from_numpy(value).to(parameter.dtype)
    return model


def write(folder: Path, config: dict, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint folder with one model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = fill(Llama(Config.from_folder(folder)))
    tensors = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def logits(model: Llama, tokens: list[int]) -> torch.Tensor:
    """Next-token logits [T, V] after every token of one plain sequence."""
    offsets, positions = torch.tensor([0, len(tokens)], dtype=torch.int32), torch.arange(len(tokens))
    attend = PackedAttention(positions, offsets, offsets, model.config.sliding_window)
    return model.logits(model.model(torch.tensor(tokens), positions, attend))
