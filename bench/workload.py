"""Provide what a comparison runs on: pairs from a file or made up, and random checkpoints.

Both sides of a comparison get the same tokens. This project reads a .jsonl of records; its peers
are handed the ids that `formats.tokenizer.Tokenizer` makes of that file.

`bench/compare.py` uses all of it; `bench/limits.py` and `bench/plan_check.py` use parts.
"""

import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import tokenizers
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import Pair, encode
from formats.checkpoint import read_config, save
from formats.config import CLASSES
from formats.errors import DataError
from formats.records import read_records
from formats.schemas import Dropped, parse_record
from formats.tokenizer import Tokenizer
from model import Llama

# Median tokens of a prompt plus one response, and the ratio prompt : response. Both are from the
# README of frankxwang/dpo-prefix-sharing. Its "overall length" is read as that of one path: only so
# do UltraFeedback's responses have about 290 tokens, as they do.
SHAPES = {"ultrafeedback": (409, 0.42), "hh-rlhf": (186, 2.15), "capybara": (1160, 1.59)}
SPREAD = 0.5  # lengths are lognormal: two thirds are within a factor e^0.5 = 1.65 of their median

# Checkpoints that need no download, as their config.json describes them
MODELS = {
    "llama3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    },
    "llama3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama3.2-3b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}

# --------------------------------------------------------------------------------------------------
# Random checkpoints


def fill(model: Llama) -> None:
    """Initialise the weights as a new model's.

    With PyTorch's N(0, 1) embeddings most probabilities would be denormal, and slow.
    """
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.ones_(parameter)


def random_checkpoint(folder: Path, shape: dict) -> None:
    """Write the new `folder`: random weights in bfloat16, and the toy's tokenizer.

    shape: the architecture, in the keys of config.json.
    """
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        shutil.copytree(ROOT / "toy" / "checkpoint", source, dirs_exist_ok=True)
        toy = json.loads((source / "config.json").read_text())
        kept = {key: value for key, value in toy.items() if key.endswith("_token_id")}
        kept["architectures"] = [CLASSES[shape["model_type"]]]  # TRL's reference is made by it
        (source / "config.json").write_text(json.dumps(shape | kept))
        with torch.device("meta"):
            model = Llama(read_config(source)).to(torch.bfloat16)
        fill(model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu"))
        save(model, source, folder, torch.bfloat16)
    del model
    torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------
# Pairs


def shape_lengths(shape: str, count: int, seed: int) -> np.ndarray:
    """Return the tokens of prompt, chosen and rejected of `count` made-up pairs, int [count, 3]."""
    path, ratio = SHAPES[shape]
    medians = np.array([path * ratio, path, path]) / (1 + ratio)
    draws = np.random.default_rng(seed).lognormal(np.log(medians), SPREAD, (count, 3))
    return np.maximum(2, draws.round().astype(int))


def shaped_records(tokenizer: Tokenizer, lengths: np.ndarray, seed: int) -> list[dict]:
    """Return records of random words, for `--chat-template none`.

    lengths: tokens of prompt, chosen and rejected, int [records, 3]. Each word is one token, with
    the space before it; a response has one word less, since EOS counts as a token.

    Raises:
        DataError: the tokenizer has fewer than 100 such words.
    """
    tokens = tokenizers.Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json")).get_vocab()
    names = sorted(text for text in tokens if text[1:].isascii() and text[1:].isalpha())
    spelled = [" " + text[1:] for text in names]
    encoded = zip(spelled, tokenizer.encode_responses(spelled))
    words = [word for word, ids in encoded if len(ids) == 2]  # the word and EOS
    if len(words) < 100:
        raise DataError(f"{tokenizer.folder}: too few words of one token to make up pairs from")
    rng = np.random.default_rng(seed)

    def text(count: int) -> str:
        return "".join(rng.choice(words, count))

    return [
        {"prompt": text(p), "chosen": text(c - 1), "rejected": text(r - 1)} for p, c, r in lengths
    ]


def drawn_records(name: str, seed: int) -> list[dict]:
    """Return all usable records of a data set in a seeded order; files are often sorted."""
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
) -> tuple[list[dict], list[Pair]]:
    """Return the first records that survive tokenizing, at most `most`, and their pairs."""
    kept: list[dict] = []
    pairs: list[Pair] = []
    for record in records:
        if len(pairs) == most:
            break
        example = parse_record(record, "a record")[1]
        found = encode([example], tokenizer, max_length, max_prompt_length, Counter())
        pairs += found
        kept += [record] * len(found)
    return kept, pairs


def write_pairs(records: list[dict], pairs: list[Pair], count: int, path: Path) -> list[Pair]:
    """Write the first `count` of the `tokenized` records to `path`; return their pairs, in order.

    Raises:
        DataError: there are fewer.
    """
    if len(pairs) < count:
        needed = f"steps × batch size = {count} are needed"
        raise DataError(f"only {len(pairs)} usable pairs, but {needed}")
    path.write_text("".join(json.dumps(record) + "\n" for record in records[:count]))
    return pairs[:count]


if __name__ == "__main__":
    print(__doc__)
