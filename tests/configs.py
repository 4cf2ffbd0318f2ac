"""List config.json as the Llama and Mistral families publish it, and compare folders with peers.

`PUBLISHED` names models and the keys in which their config.json differs from its base. Sizes are
shrunk: the ratios of heads, the keys, their spelling and all other values are the models'. Lengths
are shrunk with them, 8,192 positions to 64 and a window of 4,096 to 7, because a tiny model with a
short text would not notice the original ones.

The facts come from config.json files that are quoted in public repositories (mlc-llm's
model_preset.py, litgpt's config.py, tests of inference engines) and from the models' cards. Where
only a size was at hand, the other keys are those that the transformers of that time wrote.

    PYTHONPATH=. python tests/configs.py    every model and mutation; exit status 1 if one differs
"""

import json
import logging
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import tiny
from formats import checkpoint
from formats.config import HARMLESS_KEYS
from formats.errors import CheckpointError

TOKENS = np.random.default_rng(1).integers(0, 61, 40).tolist()
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "tie_word_embeddings"),
)
TOLERANCE = 1e-4  # of a logit, in float32; logits are of order 3

# fmt: off
BASE = {
    "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61, "bos_token_id": 1,
    "eos_token_id": 2, "use_cache": True, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}
LLAMA1 = BASE | {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6, "torch_dtype": "float16", "transformers_version": "4.28.0",
}
LLAMA2 = LLAMA1 | {
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "pretraining_tp": 1, "rope_scaling": None,
    "num_key_value_heads": 4, "transformers_version": "4.31.0.dev0",
}
CODELLAMA = LLAMA2 | {
    "max_position_embeddings": 128, "rope_theta": 1000000, "torch_dtype": "bfloat16",
    "transformers_version": "4.33.0.dev0",
}
LLAMA3 = LLAMA2 | {
    "max_position_embeddings": 64, "rope_theta": 500000.0, "num_key_value_heads": 1,
    "attention_bias": False, "attention_dropout": 0.0, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
}
STRETCHED = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_type": "llama3",
}
LLAMA31 = LLAMA3 | {
    "max_position_embeddings": 1024, "mlp_bias": False, "rope_scaling": STRETCHED,
    "eos_token_id": [2, 3, 4], "transformers_version": "4.42.3",
}
LLAMA32 = LLAMA31 | {
    "head_dim": 8, "rope_scaling": STRETCHED | {"factor": 32.0}, "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}
SMOL = LLAMA3 | {
    "hidden_size": 24, "num_attention_heads": 3, "mlp_bias": False, "pad_token_id": 2,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "max_position_embeddings": 16,
}
SMOL2 = SMOL | {
    "max_position_embeddings": 64, "rope_theta": 100000, "is_llama_config": True,
    "rope_interleaved": False, "rope_scaling": None,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
}
MISTRAL = BASE | {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_key_value_heads": 1,
    "max_position_embeddings": 256, "rope_theta": 10000.0, "sliding_window": 7,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0",
}
MISTRAL3 = MISTRAL | {
    "rope_theta": 1000000.0, "sliding_window": None, "attention_dropout": 0.0,
    "transformers_version": "4.42.0.dev0",
}
NEMO = MISTRAL3 | {"head_dim": 6, "max_position_embeddings": 1000}

PUBLISHED = {
    # Llama 1 and its fine-tunes: no num_key_value_heads, no rope_theta, often a padding token
    "LLaMA 7B": LLAMA1 | {"max_sequence_length": 16, "pad_token_id": 0},
    "LLaMA 13B": LLAMA1 | {"num_attention_heads": 8, "_name_or_path": "llama-13b"},
    "LLaMA 65B": LLAMA1 | {"num_attention_heads": 8, "rms_norm_eps": 1e-5, "pad_token_id": -1},
    "Vicuna 7B v1.3": LLAMA1 | {"_name_or_path": "vicuna-7b", "pad_token_id": 0},
    "WizardLM 13B v1.0": LLAMA1 | {"vocab_size": 62, "use_cache": False, "pad_token_id": 0},
    "Alpaca 7B": LLAMA1 | {"vocab_size": 62, "torch_dtype": "float32", "max_sequence_length": 16},
    "OpenLLaMA 3B": LLAMA1 | {"hidden_size": 40, "pad_token_id": 0},
    "OpenLLaMA 7B v2": LLAMA1 | {"transformers_version": "4.30.0.dev0"},
    # Llama 2
    "Llama 2 7B": LLAMA2 | {"_name_or_path": "meta-llama/Llama-2-7b-hf"},
    "Llama 2 13B": LLAMA2 | {"pretraining_tp": 2, "pad_token_id": 0, "num_attention_heads": 8,
                             "num_key_value_heads": 8},
    "Llama 2 70B": LLAMA2 | {"num_attention_heads": 8, "num_key_value_heads": 1},
    "Llama 2 7B Chat": LLAMA2 | {"max_length": 32, "temperature": 0.6, "top_p": 0.9,
                                 "do_sample": True},
    "Vicuna 7B v1.5": LLAMA2 | {"max_length": 32, "pad_token_id": 0},
    "Vicuna 7B v1.5 16k": LLAMA2 | {"rope_scaling": {"factor": 4.0, "type": "linear"}},
    "Llama 2 7B 32K (Together)": LLAMA2 | {
        "rope_scaling": {"factor": 8.0, "type": "linear"},
        "auto_map": {"AutoModelForCausalLM": "modeling_flash_llama.LlamaForCausalLM"}},
    "Yarn Llama 2 7B 64k": LLAMA2 | {"rope_scaling": {
        "factor": 16.0, "original_max_position_embeddings": 32, "type": "yarn", "finetuned": True}},
    "CLEX 7B": LLAMA2 | {"log_scale": False, "use_flashattn": True, "rope_scaling": {
        "type": "clex", "max_factor": 16}},
    "Tulu 2 7B": LLAMA2 | {"vocab_size": 62, "max_position_embeddings": 64,
                           "transformers_version": "4.35.0.dev0"},
    "Nous Hermes Llama 2 13B": LLAMA2 | {"vocab_size": 62, "pad_token_id": 0, "use_cache": False},
    "WizardMath 7B": LLAMA2 | {"vocab_size": 62, "max_position_embeddings": 16},
    "Orca 2 7B": LLAMA2 | {"vocab_size": 62, "attention_bias": False, "torch_dtype": "float32"},
    "LongAlpaca 7B": LLAMA2 | {"vocab_size": 62, "rope_scaling": {"factor": 8.0, "type": "linear"}},
    "Xwin LM 7B": LLAMA2 | {"use_cache": False, "model_max_length": 32},
    # Code Llama
    "CodeLlama 7B": CODELLAMA | {"_name_or_path": "codellama/CodeLlama-7b-hf"},
    "CodeLlama 34B": CODELLAMA | {"num_attention_heads": 8, "num_key_value_heads": 1},
    "CodeLlama 7B Python": CODELLAMA | {"transformers_version": "4.33.0.dev0"},
    "Phind CodeLlama 34B v2": CODELLAMA | {"num_key_value_heads": 1, "use_cache": False},
    "WizardCoder Python 13B": CODELLAMA | {"vocab_size": 62, "pad_token_id": 0},
    # Others with Llama's class
    "TinyLlama 1.1B Chat v0.4": LLAMA2 | {
        "num_attention_heads": 8, "num_key_value_heads": 1, "rope_theta": 10000.0,
        "torch_dtype": "float32"},
    "TinyLlama 1.1B Chat v1.0": LLAMA2 | {
        "num_attention_heads": 8, "num_key_value_heads": 1, "rope_theta": 10000.0,
        "attention_bias": False},
    "TinyLlama 1.1B of nanotron": LLAMA2 | {"rope_interleaved": True, "is_llama_config": True},
    "Yi 6B": LLAMA2 | {"num_attention_heads": 8, "num_key_value_heads": 1, "rope_theta": 5000000.0,
                       "pad_token_id": 0, "rms_norm_eps": 1e-5},
    "Yi 34B": LLAMA2 | {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1,
                        "rope_theta": 5000000.0, "pad_token_id": 0},
    "Yi 6B 200K": LLAMA2 | {"num_key_value_heads": 1, "rope_theta": 10000000.0,
                            "max_position_embeddings": 1600},
    "Yi 1.5 9B": LLAMA2 | {"num_key_value_heads": 1, "rope_theta": 5000000.0,
                           "attention_bias": False, "attention_dropout": 0.0},
    "SOLAR 10.7B Instruct": LLAMA2 | {"num_key_value_heads": 1, "rope_theta": 10000.0,
                                      "attention_bias": False, "use_cache": True},
    "DeepSeek LLM 7B": LLAMA2 | {"attention_bias": False, "bos_token_id": 3, "eos_token_id": 4},
    "DeepSeek Coder 1.3B": LLAMA2 | {"rope_theta": 100000,
                                     "rope_scaling": {"factor": 4.0, "type": "linear"}},
    "Granite 3B Code": LLAMA2 | {"attention_bias": True, "mlp_bias": True,
                                 "attention_dropout": 0.1},
    "made up: scaled logits": LLAMA2 | {"logit_scale": 0.0625},
    "Falcon 3 7B": LLAMA3 | {"num_attention_heads": 3, "head_dim": 16, "hidden_size": 24,
                             "rope_theta": 1000042, "rms_norm_eps": 1e-6, "mlp_bias": False},
    "Salamandra 7B": LLAMA3 | {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "num_hidden_layers": 3},
    "EuroLLM 1.7B": LLAMA3 | {"num_key_value_heads": 2, "rope_theta": 10000.0},
    "Llama Guard 7B": LLAMA2 | {"transformers_version": "4.36.2", "attention_bias": False},
    "SmolLM 135M": SMOL | {"_name_or_path": "HuggingFaceTB/cosmo2-135M-webinst-sc2"},
    "SmolLM 360M": SMOL | {"hidden_size": 60, "num_attention_heads": 15, "num_key_value_heads": 5},
    "SmolLM 1.7B": SMOL | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4},
    "SmolLM2 135M": SMOL2 | {"initializer_range": 0.041666666666666664},
    "SmolLM2 360M": SMOL2 | {"hidden_size": 60, "num_attention_heads": 15,
                             "num_key_value_heads": 5},
    "SmolLM2 1.7B": LLAMA3 | {"num_key_value_heads": 4, "rope_theta": 130000,
                              "tie_word_embeddings": True, "pad_token_id": 2, "mlp_bias": False},
    # Llama 3 and its fine-tunes
    "Llama 3 8B": LLAMA3 | {"bos_token_id": 58, "eos_token_id": 59},
    "Llama 3 8B Instruct": LLAMA3 | {"bos_token_id": 58, "eos_token_id": 60},
    "Llama 3 70B": LLAMA3 | {"num_attention_heads": 8},
    "Llama 3 8B SimPO": LLAMA3 | {"_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
                                  "use_cache": False, "transformers_version": "4.41.1"},
    "Llama 3 8B 262k (Gradient)": LLAMA3 | {"rope_theta": 283461213.0,
                                            "max_position_embeddings": 2048},
    "Hermes 2 Pro Llama 3 8B": LLAMA3 | {"vocab_size": 62, "pad_token_id": 5},
    "made up: Llama 3 from unsloth": LLAMA3 | {"unsloth_version": "2024.8", "pad_token_id": 60},
    "Llama 3 8B reward model": LLAMA3 | {"architectures": ["LlamaForSequenceClassification"],
                                         "id2label": {"0": "LABEL_0"}},
    "Llama 3 8B in 4 bits": LLAMA3 | {"quantization_config": {
        "load_in_4bit": True, "quant_method": "bitsandbytes"}},
    # Llama 3.1 to 3.3
    "Llama 3.1 8B": LLAMA31,
    "Llama 3.1 70B": LLAMA31 | {"num_attention_heads": 8},
    "Llama 3.1 405B": LLAMA31 | {"hidden_size": 64, "num_attention_heads": 16},
    "Llama 3.2 1B": LLAMA32 | {"_name_or_path": "meta-llama/Llama-3.2-1B-Instruct"},
    "Llama 3.2 3B": LLAMA32 | {"hidden_size": 24, "num_attention_heads": 3},
    "Llama 3.2 1B, unsloth": LLAMA32 | {"unsloth_fixed": True, "pad_token_id": 4},
    "Llama 3.3 70B Instruct": LLAMA31 | {"num_attention_heads": 8, "head_dim": 4,
                                         "transformers_version": "4.47.0.dev0"},
    "Llama 3.1 Nemotron 70B": LLAMA31 | {"num_attention_heads": 8},
    "Llama 3.1 Nemotron Nano 8B": LLAMA31 | {"head_dim": 8, "transformers_version": "4.47.1"},
    "Llama 3.1 Tulu 3 8B": LLAMA31 | {"vocab_size": 62, "use_cache": False, "pad_token_id": 5},
    "Hermes 3 Llama 3.1 8B": LLAMA31 | {"eos_token_id": 3, "_attn_implementation_autoset": True},
    "R1 Distill Llama 8B": LLAMA31 | {"transformers_version": "4.43.0.dev0", "eos_token_id": 3},
    "R1 Distill Llama 70B": LLAMA31 | {"num_attention_heads": 8, "pad_token_id": None},
    "Llama 3.1 8B of transformers 5": tiny.dialect_5(LLAMA31 | {"dtype": "bfloat16"}),
    "made up: both dialects": LLAMA31 | {
        "rope_parameters": STRETCHED | {"rope_theta": 500000.0}},
    "made up: Llama 3.1 with yarn": LLAMA31 | {"rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128}},
    "Nemotron Super 49B": LLAMA31 | {"model_type": "nemotron-nas",
                                     "architectures": ["DeciLMForCausalLM"]},
    # Mistral
    "Mistral 7B v0.1": MISTRAL,
    "Mistral 7B Instruct v0.1": MISTRAL | {"_name_or_path": "mistralai/Mistral-7B-v0.1"},
    "Mistral 7B Instruct v0.2": MISTRAL3 | {"transformers_version": "4.36.0"},
    "Mistral 7B v0.3": MISTRAL3 | {"vocab_size": 62},
    "Mathstral 7B": MISTRAL3 | {"head_dim": 8, "vocab_size": 62},
    "Mistral Nemo 12B": NEMO,
    "Ministral 8B Instruct": MISTRAL3 | {"head_dim": 6, "rope_theta": 100000000.0,
                                         "sliding_window": 24},
    "Mistral Small 22B": NEMO | {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 8},
    "Mistral Small 24B": NEMO | {"rope_theta": 100000000.0},
    "Mistral Large 2": MISTRAL3 | {"hidden_size": 48, "num_attention_heads": 12, "head_dim": 4},
    "Codestral 22B": MISTRAL3 | {"hidden_size": 48, "num_attention_heads": 6, "vocab_size": 62},
    "Zephyr 7B beta": MISTRAL | {"_name_or_path": "mistralai/Mistral-7B-v0.1", "pad_token_id": 2},
    "OpenHermes 2.5 7B": MISTRAL | {"vocab_size": 62, "use_cache": False, "eos_token_id": 60},
    "Starling LM 7B": MISTRAL | {"vocab_size": 62, "eos_token_id": 60, "use_cache": True},
    "OpenChat 3.5": MISTRAL | {"vocab_size": 62, "max_position_embeddings": 64},
    "Mistral Base SFT SimPO": MISTRAL | {"attention_dropout": 0.0, "use_cache": False,
                                         "transformers_version": "4.39.3"},
    "Dolphin 2.6 Mistral": MISTRAL | {"vocab_size": 62, "attention_dropout": 0.0,
                                      "sliding_window": 7},
    "Yarn Mistral 7B 128k": MISTRAL | {"rope_scaling": {
        "factor": 16.0, "original_max_position_embeddings": 64, "type": "yarn",
        "finetuned": True}, "auto_map": {"AutoConfig": "configuration_mistral.MistralConfig"}},
    "E5 Mistral 7B (embeddings)": MISTRAL | {"architectures": ["MistralModel"]},
    "Mistral 7B for mlc-llm": MISTRAL | {"sliding_window_size": 4096, "attention_sink_size": 4},
    "Ministral 3 8B (text)": MISTRAL3 | {"model_type": "ministral3"},
    "Mixtral 8x7B": MISTRAL3 | {"model_type": "mixtral", "num_local_experts": 8},
}

MUTATED = ("Llama 2 7B", "Llama 3.2 1B", "Llama 3.1 8B of transformers 5", "Mistral 7B v0.1")

# What a key may be changed to, besides values made from its own.
OTHER_VALUES = [None, True, False, 0, 1, -1, 2, 3.5, 1e6, "", "true", "4", [], {}, [1], {"a": 1}]
UNKNOWN = {  # keys that neither class of transformers declares, or that are about something else
    "logit_scale": 0.5, "logits_scaling": 8.0, "embedding_multiplier": 12.0, "clip_qkv": 8.0,
    "residual_multiplier": 0.22, "attention_multiplier": 0.0156, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 256, "scale_emb": 12,
    "scale_depth": 1.4, "dim_model_base": 256, "qk_norm": True, "use_qk_norm": True,
    "no_rope_layers": [1, 0], "max_window_layers": 1, "layer_types": ["sliding_attention"] * 2,
    "sliding_window": 4, "use_sliding_window": True, "rotary_pct": 0.5, "rotary_emb_base": 5000,
    "rope_ratio": 2.0, "rope_local_base_freq": 10000.0, "quantization": {"bits": 4},
    "compression_config": {"quant_method": "compressed-tensors"}, "pruned_heads": {"0": [1]},
    "per_layer_config": {"0": {"intermediate_size": 12}}, "num_nextn_predict_layers": 1,
    "transformers_weights": "other.safetensors", "rms_norm_type": "gemma", "norm_eps": 0.1,
    "n_layer": 1, "alibi": True, "parallel_residual": True, "head_dim": 6, "rope_theta": 500.0,
    "partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "tie_encoder_decoder": True,
    "original_max_position_embeddings": 8, "is_encoder_decoder": True, "add_cross_attention": True,
    "neftune_noise_alpha": 5.0, "num_experts": 4, "attention_bias": True, "mlp_bias": True,
    "auto_map": {"AutoModelForCausalLM": "modeling_other.Other"}, "lm_head_bias": True,
}
# fmt: on


def mutations(base: dict) -> list[tuple[str, dict, dict]]:
    """Return changed copies of a config.json: (what was changed, `base`, the copy)."""
    changed = [(f"{key} = {value!r}", base | {key: value}) for key, value in UNKNOWN.items()]
    for key, value in base.items():
        others = [] if key in HARMLESS_KEYS else [*OTHER_VALUES, str(value), [value]]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            others += [value * 2, value / 2, float(value), int(value)]
        if isinstance(value, dict):
            others += [copy for _, _, copy in mutations(value)]
        changed += [(f"{key} = {other!r}", base | {key: other}) for other in others]
        changed.append((f"no {key}", {k: v for k, v in base.items() if k != key}))
    return [(what, base, copy) for what, copy in changed]


def transformers_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Return the logits [T, V] that the installed transformers computes with a folder, float32."""
    import transformers

    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    with warnings.catch_warnings(action="ignore"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens])).logits[0]


def equal_or_refused(folder: Path, tokens: list[int] = TOKENS) -> str:
    """Compare a folder's logits with transformers'; return the message of a refusal, or "".

    transformers 5 refuses a value of another type than it declares, even where it cannot matter, as
    "use_cache": 1. That counts as a refusal.

    Raises:
        AssertionError: the folder is read, but as another model than transformers reads, or as one
            that transformers refuses to read.
    """
    from huggingface_hub.errors import StrictDataclassFieldValidationError

    try:
        actual = tiny.logits(checkpoint.load(folder), tokens)
    except CheckpointError as e:
        assert str(folder) in str(e) and "\n" not in str(e)
        return str(e)
    try:
        expected = transformers_logits(folder, tokens)
    except StrictDataclassFieldValidationError as e:
        return f"transformers refuses a type: {e}"
    except Exception as e:
        raise AssertionError(f"transformers refuses what was read: {e!r}"[:500]) from None
    difference = (actual - expected).abs().max().item()
    assert difference < TOLERANCE, f"silently different: logits differ by {difference}"
    return ""


def mix_dtypes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with float32 norms, a float16 embedding and bfloat16 matrices."""
    special = {"norm": torch.float32, "embed_tokens": torch.float16}
    mixed = {}
    for name, tensor in tensors.items():
        dtypes = [dtype for part, dtype in special.items() if part in name]
        mixed[name] = tensor.to(dtypes[0] if dtypes else torch.bfloat16)
    return mixed


def write(folder: Path, config: dict) -> Path:
    """Write config.json, and random weights of its sizes that do not depend on its other keys."""
    same = {key: config[key] for key in SIZES if key in config}
    tiny.write(folder, {"model_type": "llama"} | same)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> int:
    """Compare every published model, and every mutation of four of them."""
    cases = [(name, "published", config, config) for name, config in PUBLISHED.items()]
    for name in MUTATED:
        cases += [(name, *mutation) for mutation in mutations(PUBLISHED[name])]
    outcomes: Counter[str] = Counter()
    for name, what, base, config in cases:
        with tempfile.TemporaryDirectory() as root:
            folder = write(Path(root), base)
            (folder / "config.json").write_text(json.dumps(config))
            try:
                message = equal_or_refused(folder)
                outcome = "refused" if message else "equal"
            except AssertionError as e:
                outcome, message = "FAILED", str(e)
        outcomes[f"{'published' if what == 'published' else 'mutated'}, {outcome}"] += 1
        if outcome == "FAILED" or (message and what == "published"):
            print(f"{name}, {what}: {message}"[:300])
    print(dict(outcomes))
    return any("FAILED" in outcome for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
