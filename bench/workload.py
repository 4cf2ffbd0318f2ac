"""What a comparison runs on: pairs drawn from a file, or made up with the lengths of a known set; random checkpoints.

Both sides of a comparison get the very same tokens: this project reads a .jsonl of records, and its peers are handed
the ids that `data.Tokenizer` makes of that file.
"""

import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import DataError, Dropped, Tokenizer, Tree, parse_record, read_records  # noqa: E402
from model import Config, Llama, save  # noqa: E402

# Median tokens of a prompt and one response together, and prompt : response; README of frankxwang/dpo-prefix-sharing
# (its "overall length" read as one path: only so do UltraFeedback's responses get the some 290 tokens that they have)
SHAPES = {"ultrafeedback": (409, 0.42), "hh-rlhf": (186, 2.15), "capybara": (1160, 1.59)}
SPREAD = 0.5  # lengths are lognormal around their medians: two thirds of them within a factor of e^0.5 = 1.65

# Checkpoints that need no download, in the words of their config.json
MODELS = {
    "llama3-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    },
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
}  # fmt: skip


def fill(model: Llama) -> None:
    """Weights as models begin; with PyTorch's N(0, 1) embeddings most probabilities would be denormal, and slow."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() == 2 else torch.nn.init.ones_(parameter)


def random_checkpoint(folder: Path, shape: dict) -> None:
    """Write the new `folder`: a checkpoint with random weights, in bfloat16, and the toy's tokenizer."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        shutil.copytree(ROOT / "toy" / "checkpoint", source, dirs_exist_ok=True)
        toy = json.loads((source / "config.json").read_text())
        ends = {key: value for key, value in toy.items() if key.endswith("_token_id")}
        (source / "config.json").write_text(json.dumps(shape | ends))
        with torch.device("meta"):
            model = Llama(Config.from_folder(source)).to(torch.bfloat16)
        fill(model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu"))
        save(model, source, folder, torch.bfloat16)
    del model
    torch.cuda.empty_cache()


def shape_lengths(shape: str, count: int, seed: int) -> np.ndarray:
    """Tokens of prompt, chosen and rejected of `count` made-up pairs, int [count, 3]."""
    path, ratio = SHAPES[shape]
    medians = np.array([path * ratio, path, path]) / (1 + ratio)
    draws = np.random.default_rng(seed).lognormal(np.log(medians), SPREAD, (count, 3))
    return np.maximum(2, draws.round().astype(int))


def shaped_records(tokenizer: Tokenizer, lengths: np.ndarray, seed: int) -> list[dict]:
    """Records of random words, each of which is one token behind a space; for `--chat-template none`."""
    vocabulary = sorted(text for text in tokenizer.backend.get_vocab() if text[1:].isascii() and text[1:].isalpha())
    spelled = [" " + text[1:] for text in vocabulary]
    words = [word for word, ids in zip(spelled, tokenizer.encode_responses(spelled)) if len(ids) == 2]  # it, and EOS
    if len(words) < 100:
        raise DataError(f"{tokenizer.folder}: too few words of one token to make up pairs from")
    rng = np.random.default_rng(seed)
    text = lambda count: "".join(rng.choice(words, count))
    return [{"prompt": text(p), "chosen": text(c - 1), "rejected": text(r - 1)} for p, c, r in lengths]


def drawn_records(name: str, seed: int) -> list[dict]:
    """All usable records of a file, in an order drawn from `seed`: files are often sorted, by prompt for instance."""
    records = []
    for where, record in read_records(name):
        try:
            parse_record(record, where)
            records.append(record)
        except Dropped:
            pass
    return [records[i] for i in np.random.default_rng(seed).permutation(len(records))]


def tokenized(
    records: list[dict], most: int, tokenizer: Tokenizer, max_length: int, max_prompt_length: int
) -> tuple[list[dict], list[Tree]]:
    """The first records that survive tokenizing, `most` or as many as there are, and what they became."""
    kept, trees = [], []
    for record in records:
        if len(trees) == most:
            break
        example = parse_record(record, "a record")[1]
        tree = tokenizer.encode([example], max_length, max_prompt_length, Counter())
        trees += tree
        kept += [record] * len(tree)
    return kept, trees


def write_pairs(records: list[dict], trees: list[Tree], count: int, path: Path) -> list[Tree]:
    """Write the first `count` of `tokenized` records to `path`; returns what they became, in that order."""
    if len(trees) < count:
        raise DataError(f"only {len(trees)} usable pairs, but steps × batch size = {count} are wanted")
    path.write_text("".join(json.dumps(record) + "\n" for record in records[:count]))
    return trees[:count]
