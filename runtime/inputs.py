"""Read what a run is given, before anything is written: model files, tokenizer and pairs.

`open_inputs` reads them for training; `dry_run` reads as much as is on this machine and prints it.
Read formats/schemas.py and formats/tokenizer.py next: `load_pairs` spreads their work over ranks.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

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
from runtime.processes import agree, is_rank_0, multiplies_bf16, on_every_rank, print0, slice_of
from runtime.settings import Settings
from runtime.show import UNLIMITED, show_records

MOST_STEPS = 10**7  # of a run, all of which are planned before the first


@dataclass
class Inputs:
    """Holds what a run trains, and on what; `pairs` and `held_out` are the same on every rank."""

    source: Path  # the checkpoint folder
    stats: dict[str, list[int]]  # of its files before they were read, by name
    config: Config
    weights: Weights
    tokenizer: Tokenizer
    pairs: list[Pair]
    held_out: list[Pair]
    counts: dict[str, dict[str, int]]  # records read, cut and dropped: of "data" and "eval_data"
    steps: list[np.ndarray]  # indices into `pairs` for every optimizer step

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
    warn_of_slow_attention(config, device)
    counts: dict[str, dict[str, int]] = {"data": {}, "eval_data": {}}
    held_out: list[Pair] = []
    pairs, counts["data"] = load_pairs(settings.data, tokenizer, settings)
    if settings.eval_data:
        held_out, counts["eval_data"] = load_pairs(settings.eval_data, tokenizer, settings)
    for index, pair in enumerate([*pairs, *held_out]):
        pair.index = index
    warn_of_long_pairs([*pairs, *held_out], config.max_position_embeddings)
    steps = list(all_steps(len(pairs), settings))
    return Inputs(source, stats, config, weights, tokenizer, pairs, held_out, counts, steps)


def warn_of_slow_attention(config: Config, device: torch.device) -> None:
    """Say so if FlashAttention runs neither on this GPU nor with this model's heads."""
    size, reason = config.head_dim, ""
    if device.type == "cuda" and not flash_runs(device):
        name = torch.cuda.get_device_name(device)
        reason = f"{name} is older than compute capability 8, so float32 is the default"
    elif device.type == "cuda" and not flash_takes(size):
        reason = f"FlashAttention takes no heads of {size} features"
    if reason:
        print0(f"warning: {reason}; attention runs in PyTorch's own operations, more slowly")


def open_model(settings: Settings) -> tuple[Path, dict[str, list[int]], Config, Weights, Tokenizer]:
    """Return the checkpoint folder and what is read from it before any memory is spent."""
    source = checkpoint_folder(settings.model)
    stats = {path.name: stat_of(path) for path in content_files(source)}
    config, weights = read_config(source), Weights(source)
    tokenizer = Tokenizer(source, read_template(settings.chat_template), settings.date)
    tokenizer.check_fits(config.vocab_size)
    return source, stats, config, weights, tokenizer


def load_pairs(
    name: str, tokenizer: Tokenizer, settings: Settings
) -> tuple[list[Pair], dict[str, int]]:
    """Read a data set on every rank, tokenize a slice on each, and gather the pairs.

    Returns the pairs and the number of records read, cut and dropped.

    Raises:
        DataError: a record is malformed, or no pair is left. Every rank raises the same error.
    """
    examples, counts, first_dropped, refused = agree(lambda: read_examples(name, settings))
    limits = settings.max_length, settings.max_prompt_length
    encode = partial(encode_usable, encoder(settings.like_authors), tokenizer, limits)

    def encode_slice() -> tuple[list[Pair], Counter, list[str]]:
        mine, cut, skipped = slice_of(examples), Counter[str](), list[str]()
        pairs: list[Pair] = []
        starts, options = range(0, len(mine), 256), {"total": len(mine), "each": 256}
        for i in Progress(f"tokenizing {name}", starts, **options):
            pairs += encode(mine[i : i + 256], cut, skipped if settings.skip_unusable else None)
        return pairs, cut, skipped

    pairs: list[Pair] = []
    for part, cut, skipped in on_every_rank(encode_slice):
        pairs += part
        counts += cut
        refused += skipped
    if refused:
        counts["dropped: unusable"] = len(refused)
        first_dropped += f"; the first unusable, {refused[0]}"
    if len(refused) > settings.skip_unusable * counts["records"]:
        share = f"--skip-unusable {settings.skip_unusable:g}"
        many = f"{len(refused)} of {counts['records']} records cannot be used"
        raise DataError(f"{name}: {many}, more than {share}: the first, {refused[0]}")
    # "12 records", but "format: messages (12)": a key with a colon names one kind of several
    parts = [f"{what} ({n})" if ":" in what else f"{n} {what}" for what, n in counts.items()]
    summary = ", ".join(parts)
    if not pairs:
        raise DataError(f"{name}: nothing to learn from: {summary or 'it is empty'}{first_dropped}")
    print0(printable(f"{name}: {summary}{first_dropped}"))
    if is_rank_0():  # it tokenizes a sample, and no other rank would print what it finds
        warn_of_large_shares(name, examples, counts, tokenizer, settings)
    return pairs, dict(counts) | {"used": len(pairs)}


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


def read_examples(name: str, settings: Settings) -> tuple[list[Example], Counter, str, list[str]]:
    """Parse all records; count formats and dropped records, and quote the first dropped one.

    The last value lists the errors of the records that `--skip-unusable` leaves out. A line that is
    no JSON object is none of them: the file is damaged.

    Raises:
        DataError: a record is malformed, and `--skip-unusable` is 0.
    """
    counts: Counter = Counter()
    examples, first_dropped, refused = [], "", []
    paired = OBJECTIVES[settings.objective].responses == 2
    columns = settings.named_columns
    for where, record in Progress(f"reading {name}", records.read_records(name)):
        counts["records"] += 1
        try:
            kind, example = schemas.parse_record(record, where, paired, columns)
            counts[f"format: {kind}"] += 1
            examples.append(example)
        except schemas.Dropped as e:
            counts[f"dropped: {e}"] += 1
            first_dropped = first_dropped or f"; the first, {where}: {e}"
        except DataError as e:
            if not settings.skip_unusable:
                raise
            refused.append(str(e))
    if name == settings.data and (missing := columns.missing()):
        raise DataError(f"{name}: --columns or --ignore-columns: no record has {missing}")
    if columns.unknown:
        print0(f"{name}: ignored without knowing what it is: column {', '.join(columns.unknown)}")
    return examples, counts, first_dropped, refused


LARGE = 0.1  # share of records, prompts or responses that is worth a warning
LOOK_AT = 2000  # examples that a recommended limit is measured on


def warn_of_large_shares(
    name: str, examples: list[Example], counts: Counter, tokenizer: Tokenizer, settings: Settings
) -> None:
    """Warn if a tenth of the responses or prompts was cut, or of the records was dropped."""
    dropped = Counter({what: n for what, n in counts.items() if what.startswith("dropped: ")})
    if (many := dropped.total()) >= LARGE * counts["records"] > 0:
        reason = dropped.most_common(1)[0][0].removeprefix("dropped: ")
        share = f"{many / counts['records']:.0%} of the records are dropped"
        print0(f"warning: {name}: {share}, most of them for this reason: {reason}")
    responses = sum(len(example.responses) for example in examples)
    answers_cut = counts["responses cut at their end"] / max(1, responses)
    prompts_cut = counts["prompts cut at their start"] / max(1, len(examples))
    if max(answers_cut, prompts_cut) < LARGE:
        return
    sample = examples[:: math.ceil(len(examples) / LOOK_AT)]
    encode, unlimited = encoder(settings.like_authors), (UNLIMITED, UNLIMITED - 1)
    whole = encode_usable(encode, tokenizer, unlimited, sample, Counter(), [])
    if not whole:
        return
    prompt = percentile([len(pair.prompt) for pair in whole])
    if prompts_cut >= LARGE:
        lost = f"{prompts_cut:.0%} of the prompts are cut at their start, the system message first"
        print0(f"warning: {name}: {lost}; --max-prompt-length {prompt} would keep 95 % whole")
    if answers_cut >= LARGE:
        most = prompt if prompts_cut >= LARGE else settings.max_prompt_length
        lengths = [min(len(p.prompt), most) + len(r) for p in whole for r in p.responses]
        flags = f"--max-length {percentile(lengths)} --max-prompt-length {most}"
        lost = f"{answers_cut:.0%} of the responses are cut at their end, which leaves them without"
        print0(f"warning: {name}: {lost} an end of turn to learn; {flags} would keep 95 % whole")


def percentile(lengths: list[int], share: float = 0.95) -> int:
    """Return the smallest of the lengths that at least this share of them do not exceed."""
    return sorted(lengths)[math.ceil(share * len(lengths)) - 1]


def warn_of_long_pairs(pairs: list[Pair], positions: int) -> None:
    """Warn if pairs are longer than the context that the model was trained for."""
    longest = [len(pair.prompt) + max(map(len, pair.responses)) for pair in pairs]
    if count := sum(length > positions for length in longest):
        print0(
            f"warning: {count} pairs are longer than the model's {positions} positions "
            f"(the longest: {max(longest)} tokens); --max-length {positions} would cut them"
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
        count, what = len(load_pairs(path, tokenizer, settings)[0]), "used"
    else:
        found = Progress(f"reading {path}", records.read_records(path))
        count, what = sum(1 for _ in found), "records"
    note = f"{count:,} {what}"
    if name == "data":
        note += f", {sum(1 for _ in all_steps(count, settings)):,} steps"
    return note
