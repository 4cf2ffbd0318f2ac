"""Check that `--like-authors` gives the tokens and losses of SimPO's authors' own code.

    git clone https://github.com/princeton-nlp/SimPO CHECKOUT
    pip install -r bench/requirements.txt
    python bench/like_authors.py --authors CHECKOUT
        encodes 512 made-up pairs with their functions and with ours, and prints how many are equal,
        per tokenizer, template and lengths; exits with status 1 if one differs
    python bench/like_authors.py --authors CHECKOUT --steps 8
        also trains that many steps on both sides; the losses must agree to 1e-4
    python bench/like_authors.py --authors CHECKOUT --tokenizer DIR
        also with the tokenizer and template of a real checkpoint
    python bench/like_authors.py --authors CHECKOUT --steps 8 --record
        also writes what theirs gave to tests/like_authors.json, which a test compares with ours

Their functions are taken out of CHECKOUT at run time and nothing else of their files runs, so trl,
peft and accelerate need not be installed. The tokenizers are small, learned here and built like the
real ones. They encode a pair with the template's text in CHECKOUT; we encode it with that text and
with the template in recipes/. In the table, "no tree" counts the pairs whose responses do not share
one prompt on their side, which `--like-authors` drops, and "cut" the pairs that were cut.
"""

import __future__

import argparse
import ast
import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny
from data import Example, batches
from formats.authors import encode_like_authors
from formats.tokenizer import Tokenizer
from runtime.settings import read_settings
from train import train

RECORD = ROOT / "tests" / "like_authors.json"
PAIRS = 512
# (max_length, max_prompt_length): never cut, the two of the recipes, and nearly always cut
LENGTHS = [(10**6, 10**5), (2048, 1800), (1024, 512), (96, 40)]
BLOCK = 64  # pairs per digest of the record
Ids = list[list[int]] | None  # of prompt, chosen and rejected; None: they share no prompt

# --------------------------------------------------------------------------------------------------
# Made-up pairs

WORDS = """
the of and to in that it is was for on are as with his they at be this from have or by one had
not but what all were when we there can an your which their said if do will each about how up
out them then she many some so these would other into has more her two like him see time could
no make than first been its who now people my made over did down only way find use may water
long little very after words called just where most know answer question because therefore
explain example step number list model response prompt helpful harmless honest sorry certainly
sure here please thank
""".split()
CODE = [
    "def add(a, b):\n    return a + b\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += x[i];\n}\n",
    "SELECT name, COUNT(*) FROM users WHERE age >= 21 GROUP BY name;\n",
    "```python\nprint(f\"{x:>8.3f}\")\n```\n",
    "<div class='a'>\n  <p>1 &lt; 2</p>\n</div>\n",
    "x = {'key': [1, 2.5, -3e-7], \"other\": None}\n",
]  # fmt: skip
UNICODE = [
    "Größe", "naïve", "café", "你好，世界", "こんにちは", "مرحبا", "Привет", "🙂", "👩‍👩‍👧",
    "e\u0301", "\u00a0", "½", "→", "\u2028", "ﬁ", "𝔘", "한국어", "¿qué?", "\ufeff", "x²",
]  # fmt: skip
EDGES = [
    "", " ", "\n", "a", "  two  spaces  ", "\n\nlines\n\n", "\ttab", "</s>", "<s>x", "<|eot_id|>",
    "<|assistant|>", "<|start_header_id|>user<|end_header_id|>", "[INST] x [/INST]", " .", "1",
    "<|begin_of_text|>x", "▁", "<0x0A>", "system", "x</s>",
]  # fmt: skip


def made_up(count: int = PAIRS, seed: int = 0) -> list[Example]:
    """Make up pairs of message lists: English, code, Unicode, edge cases, and very long ones."""
    rng = random.Random(seed)
    examples = []
    for i in range(count):
        longest = rng.randrange(3) if i % 16 == 5 else None  # which of prompt, chosen, rejected
        sizes = [round(math.exp(rng.gauss(mean, 0.8))) for mean in (3.0, 3.7, 3.7)]
        if longest is not None:
            sizes[longest] = rng.randrange(500, 1500)
        prompt = [{"role": "user", "content": _text(rng, sizes[0])}]
        for role in rng.choice([[], [], [], ["assistant", "user"], ["assistant", "user"] * 2]):
            prompt.append({"role": role, "content": _text(rng, rng.randrange(1, 30))})
        if rng.random() < 0.2:
            prompt.insert(0, {"role": "system", "content": _text(rng, rng.randrange(1, 12))})
        responses = tuple(_text(rng, size) for size in sizes[1:])
        examples.append(Example(prompt, responses, f"pair {i}"))
    return examples


def _text(rng: random.Random, size: int) -> str:
    """Make up a text of about `size` words."""
    kind = rng.choice(["english", "english", "english", "code", "unicode", "edge"])
    if kind == "edge" and size < 200:
        return rng.choice(EDGES)
    parts: list[str] = []
    while len(parts) < size:
        if kind == "code" and rng.random() < 0.2:
            parts.append("\n" + rng.choice(CODE))
        elif kind == "unicode" and rng.random() < 0.4:
            parts.append(rng.choice(UNICODE))
        else:
            words = rng.choices(WORDS, k=rng.randrange(3, 12))
            parts += [words[0].capitalize(), *words[1:-1], words[-1] + rng.choice(".,?!:;\n")]
    return " ".join(parts)


# --------------------------------------------------------------------------------------------------
# Small tokenizers, built like the real ones

LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>",
]  # fmt: skip
MISTRAL_SPECIAL = ["<unk>", "<s>", "</s>"]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ROLES = ["user assistant system [INST] [/INST] <|user|> <|assistant|> <|system|>"] * 9
MERGES = 300


def learn_merges(words: Counter[str], count: int) -> list[tuple[str, str]]:
    """Learn byte-pair merges from words; among equally frequent ones the alphabet decides.

    The library's trainer may learn others in another release, and the record would be lost.
    """
    spelled = {word: list(word) for word in words}
    merges = []
    for _ in range(count):
        frequency: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in zip(parts, parts[1:]):
                frequency[pair] += words[word]
        best = min(frequency, key=lambda pair: (-frequency[pair], pair))
        merges.append(best)
        for parts in spelled.values():
            for i in range(len(parts) - 2, -1, -1):
                if tuple(parts[i : i + 2]) == best:
                    parts[i : i + 2] = ["".join(best)]
    return merges


def _corpus() -> list[str]:
    rng = random.Random(1)
    return [*ROLES, *CODE, *UNICODE, *(" ".join(rng.choices(WORDS, k=12)) for _ in range(99))]


def _bos_first(special: list[str], bos: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, special.index(bos))]
    )


@functools.cache
def llama3() -> str:
    """Return the file of a tokenizer like Llama 3's: BPE on bytes after a split by a pattern."""
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    before = pre_tokenizers.Sequence([split, to_bytes])
    words = Counter(word for text in _corpus() for word, _ in before.pre_tokenize_str(text))
    merges = learn_merges(words, MERGES)
    pieces = [*LLAMA3_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = before
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(LLAMA3_SPECIAL)
    tokenizer.post_processor = _bos_first(LLAMA3_SPECIAL, LLAMA3_SPECIAL[0])
    return tokenizer.to_str()


@functools.cache
def sentencepiece(form: str) -> str:
    """Return the file of a tokenizer like Mistral's: BPE with byte fallback, a space put first.

    form: "prepend" puts a space before every stretch of text between special tokens, as the files
    of 2023 do; "first" puts one before the whole text, as those with `legacy: false` do.
    """
    words = Counter("▁" + word for text in _corpus() for word in text.split() if word.isascii())
    spaces = [("▁" * n, "▁" * n) for n in (1, 2, 4)]
    merges = learn_merges(words, MERGES) + spaces
    characters = sorted(set("".join(words)) | set("äé世界→"))
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*MISTRAL_SPECIAL, *byte_pieces, *map("".join, merges), *characters]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
    tokenizer.add_special_tokens(MISTRAL_SPECIAL)
    if form == "prepend":
        parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(parts)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = _bos_first(MISTRAL_SPECIAL, "<s>")
    return tokenizer.to_str()


class Family(NamedTuple):
    """Holds a tokenizer, its special tokens, and the template on either side."""

    backend: Callable[[], str]
    bos: str
    eos: str
    theirs: str  # in CHECKOUT: a key of chat_templates.json, "MISTRAL" of run_simpo.py, "": none
    ours: str  # a file in recipes/, "": none
    always_prompts: bool = False  # the template writes the generation prompt even when not asked


BOS3, EOT, EOS3 = "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"
PREPEND, FIRST = (functools.partial(sentencepiece, form) for form in ("prepend", "first"))
FAMILIES = {
    "Llama 3, EOS <|eot_id|>": Family(llama3, BOS3, EOT, "llama3", "llama3.jinja"),
    "Llama 3, EOS <|end_of_text|>": Family(llama3, BOS3, EOS3, "llama3", "llama3.jinja"),
    # princeton-nlp/SimPO#8, meta-llama/llama3#104: how Llama 3 Instruct was first published
    "Llama 3, April 2024": Family(llama3, BOS3, EOS3, "llama3", "llama3.jinja", True),
    "Zephyr": Family(PREPEND, "<s>", "</s>", "mistral-base", "zephyr.jinja"),
    "Zephyr, space first only": Family(FIRST, "<s>", "</s>", "mistral-base", "zephyr.jinja"),
    "Mistral": Family(PREPEND, "<s>", "</s>", "MISTRAL", "mistral.jinja"),
    "Mistral, space first only": Family(FIRST, "<s>", "</s>", "MISTRAL", "mistral.jinja"),
    "text without a template": Family(llama3, BOS3, EOT, "", ""),
}


def always_prompt(template: str) -> str:
    """Return a template that writes the generation prompt whether it is asked to or not."""
    pattern = r"{%-? if add_generation_prompt -?%}(.*?){%-? endif -?%}"
    return re.sub(pattern, r"\1", template, flags=re.S)


def pairs_of(family: Family) -> list[Example]:
    """Return the made-up pairs, as texts if the family has no template.

    Of three texts, one ends within a word that both responses continue, and one within a word that
    only the chosen one continues, so that tokens merge across the boundary.
    """
    examples = made_up()
    if family.ours:
        return examples
    texts = []
    for i, (messages, (chosen, rejected), where, _) in enumerate(examples):
        prompt = " ".join(message["content"] for message in messages).strip()
        if i % 3:
            word = " " + WORDS[i % len(WORDS)]
            cut = len(word) - 1 - i % 2
            prompt, chosen = prompt + word[:cut], word[cut:] + chosen
            rejected = word[cut:] + rejected if i % 3 == 1 else rejected
        texts.append(Example(prompt, (chosen, rejected), where))
    return texts


def our_tokenizer(folder: Path, family: Family, template: str | None = None) -> Tokenizer:
    """Write the files of a family's tokenizer and read them; template: default: of recipes/."""
    if template is None:
        template = family.ours and (ROOT / "recipes" / family.ours).read_text()
    if family.always_prompts:
        template = always_prompt(template)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(family.backend())
    special = {"bos_token": family.bos, "eos_token": family.eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return Tokenizer(folder, template)


def our_ids(tokenizer: Tokenizer, examples: list[Example], lengths: tuple[int, int]) -> list[Ids]:
    """Return our ids of every example, None for one that is dropped; each has its own `where`."""
    assert len({example.where for example in examples}) == len(examples)
    pairs = encode_like_authors(examples, tokenizer, *lengths, Counter())
    found = {p.where: [p.prompt.tolist(), *(r.tolist() for r in p.responses)] for p in pairs}
    return [found.get(example.where) for example in examples]


def digests(ids: list[Ids]) -> list[str]:
    """Return a digest of each block of pairs."""
    blocks = [ids[i : i + BLOCK] for i in range(0, len(ids), BLOCK)]
    return [hashlib.sha256(json.dumps(block).encode()).hexdigest()[:12] for block in blocks]


# --------------------------------------------------------------------------------------------------
# Their side


def take(path: Path, names: list[str], **globals_: Any) -> SimpleNamespace:
    """Define the functions and constants called `names` of a file, and run nothing else of it."""
    wanted = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if getattr(node, "name", None) in names
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names)
    ]
    flags = __future__.annotations.compiler_flag  # so that no annotation needs an import
    code = compile(ast.Module(wanted, []), str(path), "exec", flags=flags, dont_inherit=True)
    exec(code, globals_)
    missing = [name for name in names if name not in globals_]
    if missing:
        sys.exit(f"like_authors.py: error: {path}: no {', '.join(missing)}")
    return SimpleNamespace(**{name: globals_[name] for name in names})


def defaults_of(path: Path, name: str) -> dict:
    """Return the constant defaults of a dataclass."""
    [table] = [n for n in ast.walk(ast.parse(path.read_text())) if getattr(n, "name", "") == name]
    fields = [node for node in table.body if isinstance(node, ast.AnnAssign)]
    return {field.target.id: ast.literal_eval(field.value) for field in fields}


METHODS = ["build_tokenized_answer", "tokenize_row", "concatenated_inputs", "concatenated_forward",
           "get_batch_logps", "get_batch_loss_metrics", "simpo_loss"]  # fmt: skip


def pad_to_length(tensor: torch.Tensor, length: int, pad_value: int) -> torch.Tensor:
    missing = length - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (0, missing), value=pad_value)


class Authors:
    """Holds the authors' functions, and a trainer of theirs without its constructor."""

    def __init__(self, checkout: Path):
        insert = take(
            checkout / "alignment" / "data.py", ["maybe_insert_system_message", "is_openai_format"]
        )
        names = ["apply_chat_template", "MISTRAL_CHAT_TEMPLATE"]
        self.script = take(checkout / "scripts" / "run_simpo.py", names, **vars(insert))
        modules = {"np": np, "torch": torch, "nn": torch.nn, "F": torch.nn.functional}
        trainer = checkout / "scripts" / "simpo_trainer.py"
        methods = take(trainer, METHODS, pad_to_length=pad_to_length, **modules)
        self.config = defaults_of(checkout / "scripts" / "simpo_config.py", "SimPOConfig")
        self.trainer = type("Trainer", (), vars(methods))
        scripts = sorted((checkout / "scripts").glob("*.py"))
        self.sources = {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:12] for p in scripts}
        self.templates = json.loads((checkout / "chat_templates.json").read_text())

    def template(self, family: Family) -> str:
        """Return a family's template in their words."""
        if family.theirs == "MISTRAL":
            return self.script.MISTRAL_CHAT_TEMPLATE
        template = self.templates.get(family.theirs, "")
        return always_prompt(template) if family.always_prompts else template

    def make_trainer(self, tokenizer: Any, lengths: tuple[int, int], **settings: Any) -> Any:
        """Return a trainer with the attributes that their constructor sets."""
        trainer = self.trainer()
        vars(trainer).update(self.config | settings)
        trainer.tokenizer, trainer.is_encoder_decoder = tokenizer, False
        trainer.padding_value = tokenizer.pad_token_id or tokenizer.eos_token_id
        trainer.max_length, trainer.max_prompt_length = lengths
        trainer.accelerator = SimpleNamespace(device="cpu")
        return trainer

    def row(self, trainer: Any, example: Example, mistral: bool = False) -> dict:
        """Return their tokens and labels of an example."""
        chosen, rejected = example.responses
        row: dict = {"prompt": example.prompt, "chosen": chosen, "rejected": rejected}
        if not isinstance(example.prompt, str):
            for key, text in (("chosen", chosen), ("rejected", rejected)):
                row[key] = [*copy.deepcopy(example.prompt), {"role": "assistant", "content": text}]
            del row["prompt"]
            change = "mistral" if mistral else None
            row = self.script.apply_chat_template(row, trainer.tokenizer, "simpo", True, change)
            row = {key: row[f"text_{key}"] for key in ("prompt", "chosen", "rejected")}
        return trainer.tokenize_row(row)

    def ids(self, trainer: Any, example: Example, mistral: bool = False) -> Ids:
        """Return their ids of an example; None if it has no prompt common to both responses."""
        try:
            row = self.row(trainer, example, mistral)
        except ValueError:  # their trainer stops: too much merges across the boundary
            return None
        found = []
        for key in ("chosen", "rejected"):
            ids, masked = row[f"{key}_input_ids"], row[f"{key}_labels"].count(-100)
            assert row[f"{key}_labels"] == [-100] * masked + ids[masked:]
            found.append((ids[:masked], ids[masked:]))
        (prompt, chosen), (other, rejected) = found
        return [prompt, chosen, rejected] if prompt == other else None

    def all_ids(
        self,
        tokenizer: Any,
        examples: list[Example],
        lengths: tuple[int, int],
        mistral: bool = False,
    ) -> list[Ids]:
        """Return their ids of all examples."""
        trainer = self.make_trainer(tokenizer, lengths)
        return [self.ids(trainer, example, mistral) for example in examples]


def their_tokenizer(folder: Path, family: Family, template: str) -> Any:
    """Return transformers' tokenizer of the files that `our_tokenizer` wrote."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=template or None,
    )


# --------------------------------------------------------------------------------------------------
# Comparisons

ROW = "{:50} {:>11} {:>6} {:>9} {:>7} {:>4}"


def compare(
    title: str, lengths: tuple[int, int], ours: list[Ids], theirs: list[Ids], cut: int
) -> int:
    """Print a row of the table; return the number of pairs that differ."""
    differ = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    no_tree = sum(ids is None for ids in theirs)
    equal = len(theirs) - no_tree - sum(theirs[i] is not None for i in differ)
    shown = "not cut" if lengths == LENGTHS[0] else "{} / {}".format(*lengths)
    print(ROW.format(title, shown, equal, len(differ), no_tree, cut), flush=True)
    for i in differ[:1]:
        print(f"  pair {i}\n    ours   {str(ours[i])[:300]}\n    theirs {str(theirs[i])[:300]}")
    return len(differ)


def compare_at_all_lengths(
    tokenizers_: dict[str, Tokenizer], their_ids: Callable[..., list[Ids]], examples: list[Example]
) -> tuple[int, list[list[Ids]]]:
    """Compare our tokenizers, by title, with theirs.

    Returns the number of differences, and their ids at all of LENGTHS.
    """
    found = [their_ids(lengths) for lengths in LENGTHS]
    differences = 0
    for title, tokenizer in tokenizers_.items():
        for lengths, theirs in zip(LENGTHS, found):
            cut = sum(ids != whole for ids, whole in zip(theirs, found[0]))
            ours = our_ids(tokenizer, examples, lengths)
            differences += compare(title, lengths, ours, theirs, cut)
    return differences, found


def compare_families(authors: Authors, work: Path) -> tuple[int, dict]:
    """Compare every family; return the number of differences, and what to record."""
    differences, record = 0, {}
    for name, family in FAMILIES.items():
        examples, text = pairs_of(family), authors.template(family)
        ours = {
            f"{name}: recipes/{family.ours}" if family.ours else name: our_tokenizer(work, family)
        }
        if family.ours:
            ours[f"{name}: their text"] = our_tokenizer(work, family, text)
        their = their_tokenizer(work, family, text)
        mistral = family.theirs == "MISTRAL"
        their_ids = functools.partial(authors.all_ids, their, examples, mistral=mistral)
        more, found = compare_at_all_lengths(ours, their_ids, examples)
        short = [[i, ids] for i, ids in enumerate(found[-1]) if ids and len(sum(ids, [])) < 70]
        record[name] = {"digests": list(map(digests, found)), "ids": short[:2]}
        differences += more
    return differences, record


def compare_checkpoint(authors: Authors, folder: Path) -> tuple[int, list[list[str]]]:
    """Compare with the tokenizer and template of a real checkpoint, as `compare_families` does."""
    from transformers import AutoTokenizer

    examples, ours = made_up(), {str(folder): Tokenizer(folder)}
    their_ids = functools.partial(authors.all_ids, AutoTokenizer.from_pretrained(folder), examples)
    differences, found = compare_at_all_lengths(ours, their_ids, examples)
    return differences, list(map(digests, found))


# --------------------------------------------------------------------------------------------------
# Steps

BATCH = 8
TRAINED = "Zephyr"
SIMPO = {"beta": 2.5, "gamma_beta_ratio": 0.55}
LR, WARMUP, CUT = 2e-3, 0.25, (160, 64)


def write_training(folder: Path, steps: int) -> list[str]:
    """Write a tiny checkpoint and made-up pairs; return the flags that train it their way."""
    tokenizer = our_tokenizer(folder / "checkpoint", FAMILIES[TRAINED])
    config = tiny.FAMILIES["mistral-0.3"] | {"vocab_size": tokenizer.size}
    tiny.write(folder / "checkpoint", config | {"max_position_embeddings": 4096})
    rows = []
    for example in made_up():
        if all(response.strip() for response in example.responses):
            answers = [{"role": "assistant", "content": text} for text in example.responses]
            chosen, rejected = ([*example.prompt, answer] for answer in answers)
            rows.append({"chosen": chosen, "rejected": rejected} if chosen != rejected else None)
    lines = [json.dumps(row) + "\n" for row in rows if row][: steps * BATCH]
    (folder / "pairs.jsonl").write_text("".join(lines))
    flags = {"model": folder / "checkpoint", "data": folder / "pairs.jsonl", "device": "cpu"}
    flags |= {"chat-template": ROOT / "recipes" / FAMILIES[TRAINED].ours, "out": folder / "out"}
    flags |= SIMPO | {"lr": LR, "warmup-ratio": WARMUP, "batch-size": BATCH, "dtype": "fp32"}
    flags |= {"max-length": CUT[0], "max-prompt-length": CUT[1]}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return ["--like-authors", *words]


def our_losses(folder: Path, flags: list[str]) -> list[float]:
    """Return the losses of `train.train`, step by step."""
    with contextlib.redirect_stdout(io.StringIO()):
        train(read_settings(flags))
    rows = map(json.loads, (folder / "out" / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def their_losses(authors: Authors, folder: Path, steps: int) -> list[float]:
    """Return the losses of their functions with transformers' model, AdamW and schedule."""
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    family = FAMILIES[TRAINED]
    tokenizer = their_tokenizer(folder / "checkpoint", family, authors.template(family))
    trainer = authors.make_trainer(tokenizer, CUT, **SIMPO)
    trainer.store_metrics = lambda *args, **options: None
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", **options)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(WARMUP * steps), steps)
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    rows = []
    for record in map(json.loads, lines):
        responses = record["chosen"][-1]["content"], record["rejected"][-1]["content"]
        rows.append(authors.row(trainer, Example(record["chosen"][:-1], responses, "")))
    losses = []
    for step in batches(len(rows), BATCH, epochs=1, seed=42):
        batch = collate([rows[i] for i in step], trainer.padding_value)
        loss, _ = trainer.get_batch_loss_metrics(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def collate(rows: list[dict], pad: int) -> dict[str, torch.Tensor]:
    """Pad rows at their end, as the collator does that their trainer takes from trl."""
    batch = {}
    for key in (key for key in rows[0] if key.startswith(("chosen", "rejected"))):
        value = -100 if key.endswith("labels") else pad if key.endswith("input_ids") else 0
        lists = [torch.tensor(row[key]) for row in rows]
        batch[key] = torch.nn.utils.rnn.pad_sequence(lists, True, value)
    return batch


def compare_steps(authors: Authors, work: Path, steps: int) -> tuple[float, list[float]]:
    """Print the losses of both sides; return the largest relative difference, and theirs."""
    ours = our_losses(work, write_training(work, steps))
    theirs = their_losses(authors, work, steps)
    print(f"\n{TRAINED}, {BATCH} pairs a step: step, train.py, the authors, relative difference")
    relative = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    for step, (a, b, difference) in enumerate(zip(ours, theirs, relative), 1):
        print(f"  {step}  {a:.7f}  {b:.7f}  {difference:.1e}")
    return max(relative), theirs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--authors", type=Path, required=True, metavar="CHECKOUT", help="princeton-nlp/SimPO")
    add("--tokenizer", type=Path, metavar="DIR", help="a checkpoint folder to compare with, too")
    add("--steps", type=int, default=0, metavar="N", help="also train N steps on both sides")
    add("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    flags = parser.parse_args()
    if not (flags.authors / "scripts" / "simpo_trainer.py").exists():
        sys.exit(f"like_authors.py: error: {flags.authors}: no checkout of princeton-nlp/SimPO")
    authors = Authors(flags.authors)
    worst = 0.0
    columns = "tokenizer: our template", "lengths", "equal", "different", "no tree", "cut"
    print(ROW.format(*columns))
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        differences, families = compare_families(authors, work)
        record: dict[str, Any] = {"sources": authors.sources, "families": families}
        if flags.tokenizer:
            more, recorded = compare_checkpoint(authors, flags.tokenizer)
            differences += more
            record["checkpoint"] = {"name": flags.tokenizer.name, "digests": recorded}
        if flags.steps:
            worst, record["losses"] = compare_steps(authors, work, flags.steps)
    print(f"\npairs that differ: {differences}; largest relative difference of a loss: {worst:.1e}")
    if flags.record:
        RECORD.write_text(json.dumps(record) + "\n")
    sys.exit(differences > 0 or worst > 1e-4)


if __name__ == "__main__":
    main()
