"""Read what a run is given, before anything is written: model files, tokenizer and pairs.

`open_inputs` reads them for training; `dry_run` reads as much as is on this machine and prints it.
Read formats/schemas.py and formats/tokenizer.py next: `load_pairs` spreads their work over ranks.
"""

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import Example, Pair, batches
from formats import hub, records, schemas
from formats.authors import Encoder, encoder
from formats.checkpoint import Weights, checkpoint_folder, content_files, read_config
from formats.errors import DataError, printable
from formats.files import stat_of
from formats.progress import Progress
from formats.tokenizer import Tokenizer, read_template
from methods.objectives import OBJECTIVES
from model import Config, Llama, flash_runs, flash_takes
from runtime.processes import agree, broadcast, multiplies_bf16, on_every_rank, on_rank_0, print0
from runtime.settings import Settings, of_old_gpu
from runtime.show import UNLIMITED, show_records
from runtime.tokens import Key, Pairs, Tokenized, find, key_of

MOST_STEPS = 10**7  # of a run, all of which are planned before the first


@dataclass
class Inputs:
    """Holds what a run trains, and on what; `pairs` and `held_out` are the same on every rank."""

    source: Path  # the checkpoint folder
    stats: dict[str, list[int]]  # of its files before they were read, by name
    config: Config
    weights: Weights
    tokenizer: Tokenizer
    pairs: Pairs
    held_out: Pairs
    counts: dict[str, dict[str, int]]  # records read, cut and dropped: of "data" and "eval_data"
    steps: list[np.ndarray]  # indices into `pairs` for every optimizer step
    tokens: dict[str, tuple[Tokenized, Key]]  # where the pairs came from, to be kept in OUT

    def batch(self, step: int) -> list[Pair]:
        """Return the pairs of one optimizer step (0-based)."""
        return [self.pairs[i] for i in self.steps[step]]


def open_inputs(settings: Settings, device: torch.device) -> Inputs:
    """Read everything that a run needs. Call it on all ranks.

    Raises:
        DataError, CheckpointError: something cannot be used; the same error on every rank.
    """
    source, stats, config, weights, tokenizer = agree(lambda: open_model(settings))
    settings.date = tokenizer.date  # part of what must match on resume, if the template asks for it
    if settings.dtype == "bf16" and not multiplies_bf16(device):
        faster = "--dtype fp32 is several times as fast"
        print0(f"warning: this CPU has no bfloat16 arithmetic; {faster}")
    warn_of_slow_attention(settings, config, device)
    tokens = {"data": open_pairs("data", tokenizer, settings)}
    if settings.eval_data:
        tokens["eval_data"] = open_pairs("eval_data", tokenizer, settings)
    counts = {name: found.counts for name, (found, _) in tokens.items()}
    pairs, *others = (found.pairs for found, _ in tokens.values())
    held_out = others[0] if others else pairs.none()
    held_out.first = len(pairs)
    lengths = np.concatenate([pairs.lengths, held_out.lengths])
    warn_of_long_pairs(lengths, config.max_position_embeddings)
    steps = list(all_steps(len(pairs), settings))
    counts = {"data": {}, "eval_data": {}} | counts
    return Inputs(source, stats, config, weights, tokenizer, pairs, held_out, counts, steps, tokens)


def warn_of_slow_attention(settings: Settings, config: Config, device: torch.device) -> None:
    """Say so if FlashAttention runs neither on this GPU nor with this model's heads.

    Say, too, if `--compile` will therefore be in vain: attention in PyTorch's own operations stays
    outside of the graph, and torch compiles nothing that is checkpointed and not one graph.
    """
    size, reason = config.head_dim, ""
    if device.type == "cuda" and not flash_runs(device):
        reason = of_old_gpu(torch.cuda.get_device_name(device))
    elif device.type == "cuda" and not flash_takes(size):
        reason = f"FlashAttention takes no heads of {size} features"
    if reason:
        print0(f"warning: {reason}; attention runs in PyTorch's own operations, more slowly")
    flash = device.type == "cuda" and settings.dtype == "bf16" and not reason
    if settings.compile and settings.activation_checkpointing and not flash:
        alone = "compiles nothing unless FlashAttention runs: add --no-activation-checkpointing"
        print0(f"warning: --compile with activation checkpointing {alone}")


def open_model(settings: Settings) -> tuple[Path, dict[str, list[int]], Config, Weights, Tokenizer]:
    """Return the checkpoint folder and what is read from it before any memory is spent."""
    source = checkpoint_folder(settings.model)
    stats = {path.name: stat_of(path) for path in content_files(source)}
    config, weights = read_config(source), Weights(source)
    tokenizer = Tokenizer(source, read_template(settings.chat_template), settings.date)
    tokenizer.check_fits(config.vocab_size)
    return source, stats, config, weights, tokenizer


def open_pairs(which: str, tokenizer: Tokenizer, settings: Settings) -> tuple[Tokenized, Key]:
    """Return the pairs of "data" or "eval_data": from OUT/tokens, or from the data set itself."""
    key = on_rank_0(lambda: key_of(which, tokenizer, settings))
    if found := find(which, key, settings):
        for message in found.messages:
            print0(message)
    return found or load_pairs(getattr(settings, which), tokenizer, settings), key


def load_pairs(name: str, tokenizer: Tokenizer, settings: Settings) -> Tokenized:
    """Read and tokenize a share of a data set on every rank, and give all pairs to all ranks.

    Ranks take turns, block by block, so any number of them makes the same pairs in the same order.

    Raises:
        DataError: a record is malformed, or no pair is left. Every rank raises the error of the
            first block that has one.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    limits = settings.max_length, settings.max_prompt_length
    encode = partial(encode_usable, encoder(settings.like_authors), tokenizer, limits)
    tokens: dict[int, np.ndarray] = {}

    def tokenize_share() -> list[Block]:
        blocks = []
        mine = read_blocks(name, settings, lambda number: number // BLOCK % world == rank)
        for block in Progress(f"tokenizing {name}", mine, each=BLOCK * world):
            try:
                refused = block.refused if settings.skip_unusable else None
                pairs = encode(block.examples, block.cut, refused)
            except DataError as e:
                e.record = block.number * BLOCK
                raise
            block.examples, block.where = [], [pair.where for pair in pairs]
            rows = [[len(pair.prompt), *map(len, pair.responses), 0][:3] for pair in pairs]
            block.lengths = np.array(rows, np.int32).reshape(-1, 3)
            arrays = [array for pair in pairs for array in (pair.prompt, *pair.responses)]
            tokens[block.number] = np.concatenate([np.empty(0, np.int32), *arrays])
            blocks.append(block)
        return blocks

    blocks = sorted(itertools.chain(*on_every_rank(tokenize_share)), key=lambda b: b.number)
    whole = join_blocks(name, settings, blocks)
    counts, dropped = whole.counts + whole.cut, whole.first_dropped
    if refused := whole.refused:
        counts["dropped: unusable"] = len(refused)
        dropped += f"; the first unusable, {refused[0]}"
    if len(refused) > settings.skip_unusable * counts["records"]:
        share = f"--skip-unusable {settings.skip_unusable:g}"
        many = f"{len(refused)} of {counts['records']} records cannot be used"
        raise DataError(f"{name}: {many}, more than {share}: the first, {refused[0]}")
    # "12 records", but "format: messages (12)": a key with a colon names one kind of several
    parts = [f"{what} ({n})" if ":" in what else f"{n} {what}" for what, n in counts.items()]
    summary = ", ".join(parts)
    if not whole.where:
        raise DataError(f"{name}: nothing to learn from: {summary or 'it is empty'}{dropped}")
    messages = [*whole.notes, printable(f"{name}: {summary}{dropped}")]
    messages += on_rank_0(lambda: large_shares(name, counts, tokenizer, settings))
    for message in messages:
        print0(message)
    flat, start = np.empty(whole.lengths.sum(dtype=np.int64), np.int32), 0
    for block in blocks:
        part = flat[start : start + block.lengths.sum()]
        start += len(part)
        if block.number in tokens:
            part[:] = tokens.pop(block.number)
        broadcast(part, block.number % world)
    pairs = Pairs(flat, whole.lengths, np.array([os.fsencode(where) for where in whole.where]))
    return Tokenized(pairs, dict(counts) | {"used": len(pairs)}, messages)


def encode_usable(
    encode: Encoder,
    tokenizer: Tokenizer,
    limits: tuple[int, int],
    examples: list[Example],
    counts: Counter,
    refused: list[str] | None,
) -> list[Pair]:
    """Encode examples together, or one by one if some cannot be used.

    Their errors are added to `refused`, so that one refused conversation takes no other with it.

    Raises:
        DataError: an example cannot be used, and `refused` is None.
    """
    try:
        return encode(examples, tokenizer, *limits, counts)
    except DataError as e:
        if refused is None:
            raise
        if len(examples) == 1:
            refused.append(str(e))
            return []
    alone = partial(encode_usable, encode, tokenizer, limits)
    return [pair for example in examples for pair in alone([example], counts, refused)]


BLOCK = 256  # consecutive records that one rank reads and tokenizes


@dataclass
class Block:
    """Holds what consecutive records have become: examples, and after that pairs.

    number: of the block, 0-based in the data set.
    counts: records, formats and dropped records; `cut`: what was cut or dropped as tokens.
    first_dropped: quotes the first dropped record.
    refused: the errors of the records that `--skip-unusable` leaves out.
    notes: messages about columns.
    lengths, where: of the pairs, as in `Pairs`.
    """

    number: int
    columns: schemas.Columns
    examples: list[Example] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    cut: Counter = field(default_factory=Counter)
    first_dropped: str = ""
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lengths: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int32))
    where: list[str] = field(default_factory=list)


def read_blocks(
    name: str, settings: Settings, wanted: Callable[[int], bool] = lambda number: True
) -> Iterator[Block]:
    """Parse the wanted records, see `read_records`, and yield them in blocks.

    Raises:
        DataError: a record is malformed, and `--skip-unusable` is 0. A line that is no JSON object
            is an error all the same: the file is damaged.
    """
    block, number = Block(0, settings.named_columns), 0
    paired = OBJECTIVES[settings.objective].responses == 2
    try:
        for where, record in records.read_records(name, wanted):
            if record is not None:
                block.counts["records"] += 1
                try:
                    kind, example = schemas.parse_record(record, where, paired, block.columns)
                    block.counts[f"format: {kind}"] += 1
                    block.examples.append(example)
                except schemas.Dropped as e:
                    block.counts[f"dropped: {e}"] += 1
                    block.first_dropped = block.first_dropped or f"; the first, {where}: {e}"
                except DataError as e:
                    if not settings.skip_unusable:
                        raise
                    block.refused.append(str(e))
            number += 1
            if number % BLOCK == 0:
                if block.counts:
                    yield block
                block = Block(number // BLOCK, settings.named_columns)
    except DataError as e:
        e.record = number
        raise
    if block.counts:
        yield block


def join_blocks(name: str, settings: Settings, blocks: Iterable[Block]) -> Block:
    """Join blocks, which are in file order, to one.

    Raises:
        DataError: no record has a column that `--columns` or `--ignore-columns` names.
    """
    whole = Block(0, settings.named_columns)
    lengths = [whole.lengths]
    for block in blocks:
        whole.examples += block.examples
        whole.counts += block.counts
        whole.cut += block.cut
        whole.first_dropped = whole.first_dropped or block.first_dropped
        whole.refused += block.refused
        whole.where += block.where
        whole.columns.seen |= block.columns.seen
        whole.columns.unknown |= block.columns.unknown
        lengths.append(block.lengths)
    whole.lengths = np.concatenate(lengths)
    if name == settings.data and (missing := whole.columns.missing()):
        raise DataError(f"{name}: --columns or --ignore-columns: no record has {missing}")
    if unknown := ", ".join(whole.columns.unknown):
        whole.notes = [f"{name}: ignored without knowing what it is: column {unknown}"]
    return whole


LARGE = 0.1  # share of records, prompts or responses that is worth a warning
LOOK_AT = 2000  # records that a recommended limit is measured on


def large_shares(name: str, counts: Counter, tokenizer: Tokenizer, settings: Settings) -> list[str]:
    """Return warnings if a tenth of the responses or prompts was cut, or of the records dropped."""
    warnings = []
    dropped = Counter({what: n for what, n in counts.items() if what.startswith("dropped: ")})
    if (many := dropped.total()) >= LARGE * counts["records"] > 0:
        reason = dropped.most_common(1)[0][0].removeprefix("dropped: ")
        share = f"{many / counts['records']:.0%} of the records are dropped"
        warnings.append(f"warning: {name}: {share}, most of them for this reason: {reason}")
    examples = max(1, sum(n for what, n in counts.items() if what.startswith("format: ")))
    responses = examples * OBJECTIVES[settings.objective].responses
    answers_cut = counts["responses cut at their end"] / responses
    prompts_cut = counts["prompts cut at their start"] / examples
    if max(answers_cut, prompts_cut) < LARGE:
        return warnings
    step = math.ceil(counts["records"] / LOOK_AT)
    sample = [block.examples for block in read_blocks(name, settings, lambda n: n % step == 0)]
    encode, unlimited = encoder(settings.like_authors), (UNLIMITED, UNLIMITED - 1)
    whole = encode_usable(encode, tokenizer, unlimited, sum(sample, []), Counter(), [])
    if not whole:
        return warnings
    prompt = percentile([len(pair.prompt) for pair in whole])
    if prompts_cut >= LARGE:
        lost = f"{prompts_cut:.0%} of the prompts are cut at their start, the system message first"
        keep = f"--max-prompt-length {prompt} would keep 95 % whole"
        warnings.append(f"warning: {name}: {lost}; {keep}")
    if answers_cut >= LARGE:
        most = prompt if prompts_cut >= LARGE else settings.max_prompt_length
        lengths = [min(len(p.prompt), most) + len(r) for p in whole for r in p.responses]
        flags = f"--max-length {percentile(lengths)} --max-prompt-length {most}"
        lost = f"{answers_cut:.0%} of the responses are cut at their end, which leaves them without"
        end = f"an end of turn to learn; {flags} would keep 95 % whole"
        warnings.append(f"warning: {name}: {lost} {end}")
    return warnings


def percentile(lengths: list[int], share: float = 0.95) -> int:
    """Return the smallest of the lengths that at least this share of them do not exceed."""
    return sorted(lengths)[math.ceil(share * len(lengths)) - 1]


def warn_of_long_pairs(lengths: np.ndarray, positions: int) -> None:
    """Warn if pairs are longer than the context that the model was trained for.

    lengths: [pairs, 3], of prompt and responses, as in `Pairs`.
    """
    longest = lengths[:, 0] + lengths[:, 1:].max(1)
    if count := (longest > positions).sum():
        print0(
            f"warning: {count} pairs are longer than the model's {positions} positions "
            f"(the longest: {longest.max()} tokens); --max-length {positions} would cut them"
        )


def all_steps(count: int, settings: Settings) -> Iterator[np.ndarray]:
    """Return an iterator over the pair indices of every step of a run.

    Raises:
        DataError: there are more than MOST_STEPS.
    """
    s = settings
    total = s.epochs * math.ceil(count / s.batch_size)
    if min(total, s.max_steps or total) > MOST_STEPS:
        what = f"--epochs {s.epochs} of {count:,} pairs are {total:,} steps"
        raise DataError(f"{what}, more than {MOST_STEPS:,}: lower it, or set --max-steps")
    steps = batches(count, s.batch_size, s.epochs, s.seed, s.shuffle)
    return itertools.islice(steps, s.max_steps)


# --------------------------------------------------------------------------------------------------
# --dry-run


def dry_run(settings: Settings) -> None:
    """Print every setting that has a value, what this machine knows of model and data, and a pair.

    Nothing is downloaded.

    Raises:
        DataError, CheckpointError: something on this machine cannot be used.
    """
    notes = {name: "" for name in ("model", "data", "eval_data") if getattr(settings, name)}
    missing = [name for name in notes if not hub.at_hand(getattr(settings, name))]
    notes |= dict.fromkeys(missing, "hub id; downloaded unless cached")
    template, tokenizer = read_template(settings.chat_template), None
    if "model" not in missing:
        source = Path(settings.model).expanduser()
        config, tokenizer = read_config(source), Tokenizer(source, template, settings.date)
        tokenizer.check_fits(config.vocab_size)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Llama(config).parameters())
        notes["model"] = f"{parameters:,} parameters"
    for name in notes:  # in the same order on every rank
        if name != "model" and name not in missing:
            notes[name] = _note_of_data(name, tokenizer, settings)
    tokens = "of the authors' trainer" if settings.like_authors else "by the rules in data.py"
    notes["like_authors"] = f"tokens {tokens}"
    if settings.gamma is not None:
        notes["gamma_beta_ratio"] = f"γ = {settings.gamma:g}"
    values = asdict(settings)
    for f in fields(settings):
        if f.metadata["section"]:
            print0(f"\n{f.metadata['section']}")
        if values[f.name] is not None:
            flag, note = f.name.replace("_", "-"), notes.get(f.name, "")
            print0(f"  {flag:26}{values[f.name]}", *([f"\n{'':27} {note}"] if note else []))
    if tokenizer and "data" not in missing:
        print0("\nthe first record, as the model will see it")
        show_records(settings, tokenizer, 1)


def _note_of_data(name: str, tokenizer: Tokenizer | None, settings: Settings) -> str:
    """Count what can be counted: usable pairs and steps with a tokenizer, else records."""
    path = getattr(settings, name)
    if tokenizer:
        count, what = len(load_pairs(path, tokenizer, settings).pairs), "used"
    else:
        found = Progress(f"reading {path}", records.read_records(path))
        count, what = sum(1 for _ in found), "records"
    note = f"{count:,} {what}"
    if name == "data":
        note += f", {sum(1 for _ in all_steps(count, settings)):,} steps"
    return note
