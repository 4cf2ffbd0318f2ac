"""Check that nothing in a checkpoint folder is ignored in silence: config.json and the weights.

A folder is read as transformers reads it, or refused. Without transformers, what is refused is
checked, and that the rest is read.
"""

import json
import shutil
from pathlib import Path

import configs
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import TOY, few_pairs, run

import tiny
from formats import checkpoint
from formats.checkpoint import INDEX, Weights, read_config
from formats.config import HARMLESS_KEYS
from formats.errors import CheckpointError

FILE = "model.safetensors"
REFUSED = {  # the published config.json that are refused, and the key that the message names
    "Vicuna 7B v1.5 16k": "rope_scaling.type",
    "Llama 2 7B 32K (Together)": "rope_scaling.type",
    "Yarn Llama 2 7B 64k": "rope_scaling.type",
    "CLEX 7B": "rope_scaling.type",
    "LongAlpaca 7B": "rope_scaling.type",
    "TinyLlama 1.1B of nanotron": "rope_interleaved",
    "DeepSeek Coder 1.3B": "rope_scaling.type",
    "Granite 3B Code": "attention_bias",
    "made up: scaled logits": "logit_scale",
    "made up: Llama 3.1 with yarn": "rope_scaling.rope_type",
    "Llama 3 8B reward model": "architectures",
    "Llama 3 8B in 4 bits": "quantization_config",
    "Nemotron Super 49B": "model_type",
    "Yarn Mistral 7B 128k": "rope_scaling.type",
    "E5 Mistral 7B (embeddings)": "architectures",
    "Mistral 7B for mlc-llm": "sliding_window_size",
    "Ministral 3 8B (text)": "model_type",
    "Mixtral 8x7B": "model_type",
}


def refusal(folder: Path) -> str:
    """Return the message of the error that loading this folder must raise."""
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder)
    return str(error.value)


def with_config(folder: Path, config: dict) -> Path:
    """Write config.json alone; whether it can be read does not depend on the weights."""
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --------------------------------------------------------------------------------------------------
# config.json


@pytest.mark.parametrize("name", configs.PUBLISHED)
def test_published_config_is_read_or_refused_by_name(name, tmp_path):
    """What a published config.json states is implemented, or the message names the key."""
    with_config(tmp_path, configs.PUBLISHED[name])
    if name not in REFUSED:
        read_config(tmp_path)
        return
    with pytest.raises(CheckpointError, match=f"config.json: {REFUSED[name]} = "):
        read_config(tmp_path)


def test_published_configs_against_transformers(tmp_path):
    """Of at least 60 published config.json, 50 give transformers' logits; others are refused."""
    pytest.importorskip("transformers", minversion="5")
    refused = set()
    for name, config in configs.PUBLISHED.items():
        if configs.equal_or_refused(configs.write(tmp_path / name.replace("/", ""), config)):
            refused.add(name)
    assert refused <= REFUSED.keys()  # a refused one may be implemented later
    assert len(configs.PUBLISHED) >= 60 and len(configs.PUBLISHED) - len(refused) >= 50


def test_mutated_configs_against_transformers(tmp_path):
    """A changed or unknown key gives what transformers makes of it, or is refused."""
    # `PYTHONPATH=. python tests/configs.py` runs all of them.
    pytest.importorskip("transformers", minversion="5")
    for name in configs.MUTATED:
        base = configs.PUBLISHED[name]
        folder = configs.write(tmp_path / name.replace("/", ""), base)
        for what, _, config in configs.mutations(base)[len(name) % 11 :: 11]:
            try:
                configs.equal_or_refused(with_config(folder, config))
            except AssertionError as e:
                pytest.fail(f"{name}, {what}: {e}")


KNOWN = {"original_max_position_embeddings", "use_sliding_window", "head_dim", "rope_theta"}


@pytest.mark.parametrize("key", sorted(configs.UNKNOWN.keys() - KNOWN))
def test_unknown_key_is_refused_by_name(key, tmp_path):
    """A key that may change what the model computes is refused by its name, whatever it is."""
    config = configs.PUBLISHED["Llama 3 8B"] | {key: configs.UNKNOWN[key]}
    with pytest.raises(CheckpointError, match=f"config.json: .*{key}"):
        read_config(with_config(tmp_path, config))


def test_harmless_and_null_keys_are_read(tmp_path):
    """Keys on the list, and unknown ones that state nothing, change nothing."""
    config = configs.PUBLISHED["Llama 3 8B"]
    expected = read_config(with_config(tmp_path, config))
    nothing = {"logit_scale": None, "clip_qkv": None, "quantization_config": None}
    more = dict.fromkeys(HARMLESS_KEYS, 0.25) | nothing
    assert read_config(with_config(tmp_path, config | more)) == expected


WRONG = {  # case: (config.json changed to, what the message names)
    "string for a number": ({"hidden_size": "32"}, "hidden_size"),
    "string for a float": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    "null size": ({"intermediate_size": None}, "intermediate_size"),
    "true as text": ({"tie_word_embeddings": "true"}, "tie_word_embeddings"),
    "1 for true": ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    "theta 0": ({"rope_theta": 0}, "rope_theta"),
    "theta as text": ({"rope_theta": "5e5"}, "rope_theta"),
    "two thetas": ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta"),
    "two dialects": (
        {"rope_scaling": configs.STRETCHED, "rope_parameters": {"rope_theta": 5e5}},
        "rope_scaling",
    ),
    "two rope types": ({"rope_scaling": configs.STRETCHED | {"type": "yarn"}}, "type"),
    "rope key unknown": (
        {"rope_scaling": configs.STRETCHED | {"attention_factor": 0.9}},
        "attention_factor",
    ),
    "two original lengths": (
        {"rope_scaling": configs.STRETCHED, "original_max_position_embeddings": 32},
        "original_max_position_embeddings",
    ),
    "frequencies the wrong way": (
        {"rope_scaling": configs.STRETCHED | {"low_freq_factor": 8.0}},
        "low_freq_factor",
    ),
    "rope type null": ({"rope_parameters": {"rope_type": None}}, "rope_type"),
    "rope type 0": ({"rope_scaling": {"type": 0}}, "type"),
    "rope of a list": ({"rope_scaling": []}, "rope_scaling"),
    "rope of every layer": ({"rope_parameters": {"full_attention": {}}}, "rope_parameters"),
    "a window in a Llama": ({"sliding_window": 7}, "sliding_window"),
    "window switched off": (
        {
            "model_type": "mistral",
            "architectures": None,
            "sliding_window": 7,
            "use_sliding_window": False,
        },
        "use_sliding_window",
    ),
    "heads that leave a rest": ({"num_attention_heads": 5}, "hidden_size"),
    "heads that leave a rest, with head_dim": (
        {"num_attention_heads": 5, "head_dim": 8},
        "hidden_size",
    ),
    "two classes": ({"architectures": ["MistralForCausalLM"]}, "architectures"),
    "type of a list": ({"model_type": ["llama"]}, "model_type"),
    "padding without a row": ({"pad_token_id": 61}, "pad_token_id"),
    "padding before the first row": ({"pad_token_id": -62}, "pad_token_id"),
    "precision unknown": ({"dtype": "float8_e4m3fn"}, "dtype"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_type_or_contradiction_is_refused(case, tmp_path):
    """A value of another type, or two keys that contradict each other, are refused by name."""
    change, named = WRONG[case]
    with_config(tmp_path, configs.PUBLISHED["Llama 3 8B"] | change)
    with pytest.raises(CheckpointError, match=f"config.json: .*{named}"):
        read_config(tmp_path)


# --------------------------------------------------------------------------------------------------
# Two statements about the weights


def set_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of model.safetensors; a dot in a name is written as two underscores."""
    tensors = load_file(folder / FILE)
    for name, tensor in changes.items():
        tensors[name.replace("__", ".")] = tensor
    save_file({name: x for name, x in tensors.items() if x is not None}, folder / FILE)


def split(folder: Path, change: dict[str, str | None] = {}, **metadata: int) -> None:
    """Split model.safetensors into two files with an index, whose map may be changed."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    weight_map = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        shard = dict(list(tensors.items())[number - 1 :: 2])
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    weight_map = {name: file for name, file in (weight_map | change).items() if file}
    index = {"metadata": {"total_size": 1} | metadata, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def split_but_keep(folder: Path) -> None:
    whole = (folder / FILE).read_bytes()
    split(folder)
    (folder / FILE).write_bytes(whole)


def index_of_whole(folder: Path) -> None:
    weight_map = dict.fromkeys(load_file(folder / FILE), FILE)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def index_with_another_file(folder: Path) -> None:
    """Name model.safetensors, which transformers would read alone, and a second file."""
    tensors = load_file(folder / FILE)
    norm = {"model.norm.weight": tensors.pop("model.norm.weight")}
    save_file(norm, folder / "model-2.safetensors")
    save_file(tensors, folder / FILE)
    weight_map = dict.fromkeys(tensors, FILE) | dict.fromkeys(norm, "model-2.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def leave_shard(folder: Path) -> None:
    split(folder)
    stray = "model-00003-of-00003.safetensors"
    save_file({"model.norm.weight": torch.ones(32)}, folder / stray)


def beside(name: str, content: str = "{}"):
    """Return an edit of a folder that adds a file."""
    return lambda folder: (folder / name).write_text(content)


def change_config(**changes):
    """Return an edit of a folder that changes config.json alone."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        with_config(folder, config | changes)

    return edit


NORM, SECOND = "model.norm.weight", "model-00002-of-00002.safetensors"
BUFFER = "model__layers__1__self_attn__rotary_emb__inv_freq"
FREQUENCIES = 5e5 ** -(torch.arange(0, 8, 2) / 8)
FOLDERS = {  # case: (edit, what the message names; None: the folder is read)
    "two files and their index": (split, None),
    "index of one file": (index_of_whole, None),
    "wrong total size": (lambda f: split(f, total_size=10**12), None),
    "one file and a stale index": (split_but_keep, FILE),
    "index with the file and another": (index_with_another_file, "model-2.safetensors"),
    "a shard that no index names": (leave_shard, "model-00003-of-00003.safetensors"),
    "a shard without an index": (lambda f: shutil.copy(f / FILE, f / SECOND), SECOND),
    "index names the other file": (lambda f: split(f, {NORM: SECOND}), NORM),
    "index without a tensor": (lambda f: split(f, {NORM: None}), NORM),
    "index with a tensor too many": (lambda f: split(f, {"lm_head.bias": SECOND}), "lm_head.bias"),
    "adapter": (beside("adapter_config.json"), "adapter_config.json"),
    "adapter without its config": (beside("adapter_model.bin"), "adapter_model.bin"),
    "other copies of the weights": (beside("pytorch_model.bin"), None),
    "Mistral's own copy": (beside("consolidated.safetensors"), None),
    "untied without a head": (lambda f: set_tensors(f, lm_head__weight=None), "lm_head.weight"),
    "tied with another head": (change_config(tie_word_embeddings=True), "tie_word_embeddings"),
    "more rows than vocab_size": (change_config(vocab_size=60), "embed_tokens.weight"),
    "fewer rows than vocab_size": (change_config(vocab_size=64), "embed_tokens.weight"),
    "quantised": (
        lambda f: set_tensors(f, model__norm__weight=torch.ones(32).to(torch.float8_e4m3fn)),
        "F8_E4M3",
    ),
    "frequencies": (lambda f: set_tensors(f, **{BUFFER: FREQUENCIES}), None),
    "rounded frequencies": (lambda f: set_tensors(f, **{BUFFER: FREQUENCIES.bfloat16()}), None),
    "frequencies of another theta": (
        lambda f: set_tensors(f, **{BUFFER: 1e4 ** -(torch.arange(0, 8, 2) / 8)}),
        "inv_freq",
    ),
    "frequencies of another size": (
        lambda f: set_tensors(f, **{BUFFER: torch.ones(16)}),
        "inv_freq",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_two_statements_about_the_weights(case, tmp_path):
    """Where index, files, flags and tensors contradict each other, the folder is refused."""
    edit, named = FOLDERS[case]
    folder = configs.write(tmp_path / "model", configs.PUBLISHED["Llama 3 8B"])
    expected = tiny.logits(checkpoint.load(folder), configs.TOKENS)
    edit(folder)
    if named is None:
        assert torch.equal(tiny.logits(checkpoint.load(folder), configs.TOKENS), expected)
    else:
        message = refusal(folder)
        assert str(folder) in message and named in message, message


def test_two_statements_against_transformers(tmp_path):
    """A folder that is read gives transformers' logits."""
    pytest.importorskip("transformers", minversion="5")
    for number, (edit, _) in enumerate(FOLDERS.values()):
        folder = configs.write(tmp_path / str(number), configs.PUBLISHED["Llama 3 8B"])
        edit(folder)
        configs.equal_or_refused(folder)


# --------------------------------------------------------------------------------------------------
# Precision


def test_training_at_no_rate_gives_the_source_back(monkeypatch, tmp_path):
    """Every tensor keeps its own dtype and, at a learning rate of 1e-12, its bits."""
    source = shutil.copytree(TOY / "checkpoint", tmp_path / "source")
    tensors = configs.mix_dtypes(load_file(source / FILE))
    save_file(tensors, source / FILE, metadata={"format": "pt"})
    assert len(set(Weights(source).dtypes.values())) == 3
    flags = few_pairs(tmp_path) | {"model": source, "max_steps": 1, "lr": 1e-12}
    run(monkeypatch, tmp_path / "run", **flags)
    saved = load_file(tmp_path / "run" / "model" / FILE)
    assert saved.keys() == tensors.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name]), name
    assert (tmp_path / "run" / "model" / "config.json").read_text() == (
        source / "config.json"
    ).read_text()
