"""Predict what a run needs before it starts: memory of each GPU, micro-batches, time.

    python train.py --plan --gpus 8 --gpu H100 --config recipes/llama3-instruct-simpo.toml

The weights are not read: the shape comes from config.json, or from `SHAPES` for the models of
recipes/. Lengths come from the data if data and tokenizer are on this machine, else they are
assumed. With P parameters, `shards` GPUs that share one copy, c bytes per parameter to compute with
and m = max(c, 4) bytes per master weight:

    parameters   m · P / shards       master weights; these four are on the host with --offload
    gradients    m · P / shards       after reduction
    optimizer    2 m · P / shards     AdamW's two moments
    reference    c · P / shards       frozen, with --reference online
    the rest     temporary, in three phases of backward; the worst phase counts

Time is a roofline: runtime/gpus.py counts operations and bytes, its data sheets say how fast they
could be done, and `EFFICIENCY` how much of that is assumed to be reached. Launching kernels,
sharding and --offload go on beside the arithmetic; whichever takes longest counts. `--mfu` replaces
all of that by a share of the peak.

Read next: `data.micro_batches`, which spreads a step over ranks; runtime/settings.py has the flags.
"""

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import Pair, micro_batches
from formats.authors import encoder
from formats.checkpoint import read_config
from formats.errors import DataError, InputError, printable
from formats.hub import at_hand
from formats.progress import Progress
from formats.tokenizer import Tokenizer, read_template
from methods.objectives import OBJECTIVES
from model import LOGITS_TILE, MIN_TILE_WIDTH, QUERY_BLOCK, Config, train_flops
from runtime.gpus import GPUS, Items, Layout, Load, Machine, extra_passes, find_gpu, step_times
from runtime.inputs import BLOCK, Inputs, all_steps, encode_usable, join_blocks, read_blocks
from runtime.processes import free_memory, is_rank_0, print0
from runtime.settings import AUTO, PlanOptions, Settings

GIB = 2**30
SAMPLE, STEPS = 2000, 20  # pairs that are tokenized for their lengths, steps that are laid out
# Assumed without data: UltraFeedback's median tokens of a prompt and one response together, and
# its ratio prompt : response, from the README of github.com/frankxwang/dpo-prefix-sharing
PROMPT_AND_RESPONSE, PROMPT_TO_RESPONSE = 409, 0.42

# Memory that is not tensors. On CUDA: its context, NCCL's buffers, and the share of the tensors'
# bytes that the caching allocator holds without using it; all assumed, not measured. On a CPU: what
# Python, torch and a tokenizer take before the first tensor (0.28 to 0.34 GiB, torch 2.13 on
# Linux; 0.26 more for the libraries of a torch that knows CUDA, seen with 2.11), and the share of
# freed memory that glibc keeps (bench/plan_check.py).
RUNTIME = {"cuda": 1.5 * GIB, "cpu": (0.57 if torch.version.cuda else 0.31) * GIB}
SLACK = {"cuda": 0.05, "cpu": 0.03}
SHARE = 0.8  # of the free memory that `auto` plans with: no plan has been held to a GPU yet

PERSISTENT = "parameters", "gradients", "optimizer", "reference"  # through the whole step
TEMPORARY = "gathered weights", "unsharded gradients", "activations", "logits"

ASSUMED_MFU = 0.4  # where only the peak is known
# The models of recipes/, as their config.json on the hub describes them
LLAMA3 = Config(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 500000.0)
MISTRAL = replace(LLAMA3, vocab_size=32000, rope_theta=1e4, sliding_window=4096)
SHAPES = {
    "meta-llama/Meta-Llama-3-8B": LLAMA3,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA3,
    "princeton-nlp/Llama-3-Base-8B-SFT": LLAMA3,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": replace(LLAMA3, vocab_size=128264),
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "alignment-handbook/zephyr-7b-sft-full": MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.2": replace(MISTRAL, rope_theta=1e6, sliding_window=None),
}


@dataclass(frozen=True)
class Plan:
    """Holds all that `--plan` prints: sizes in bytes, lengths in tokens, times in seconds."""

    machine: Machine
    settings: Settings  # without auto
    parameters: int
    pairs: str  # where the lengths come from
    phases: dict[str, Items]  # of backward
    items: Items  # of the worst phase
    on_host: float  # the persistent items, if --offload moves them to the host
    load: Load
    microbatches: int  # per step and GPU
    largest: int  # the largest --microbatch-tokens that fits; 0 if none does
    most: int  # the --microbatch-tokens that holds a whole step
    step_pairs: int
    step_tokens: float
    steps: int | None  # of the run, if known
    flops: float  # per step
    times: Items  # seconds of a step, by what takes them; empty if the GPU is not known
    seconds: float | None  # of a step, if that is known
    helps: Items  # what would save memory: the total with it

    @property
    def total(self) -> float:
        """Return the bytes that one GPU needs in the worst phase."""
        return total(self.items)


# --------------------------------------------------------------------------------------------------
# Memory


def memory(config: Config, settings: Settings, machine: Machine, load: Load) -> dict[str, Items]:
    """Return the bytes on one GPU, by phase of backward and by item.

    On a CPU the bytes are those of one rank's process, and there is only one phase.
    """
    layout = Layout.of(config, settings, machine)
    persistent = persistent_memory(layout)
    phases = temporary_memory(config, settings, layout, load)
    if machine.kind == "cpu":
        # glibc keeps much of what is freed, in pieces of the wrong size, so each item counts with
        # its own worst phase.
        phases = {"": {name: max(p.get(name, 0) for p in phases.values()) for name in TEMPORARY}}
    for phase, temporary in phases.items():
        items = persistent | {name: temporary.get(name, 0) for name in TEMPORARY}
        slack = RUNTIME[machine.kind] + SLACK[machine.kind] * total(items)
        phases[phase] = items | {"context, slack": slack}
    return phases


def worst(phases: dict[str, Items]) -> Items:
    """Return the items of the phase that needs most."""
    return max(phases.values(), key=total)


def total(items: Items) -> float:
    return sum(items.values())


def persistent_memory(layout: Layout) -> Items:
    """Return the bytes on one GPU that are needed through the whole step."""
    m, c = layout.master_bytes, layout.compute_bytes
    share = 0 if layout.offload else layout.whole / layout.shards  # parameters
    sizes = (m, m, 2 * m, c * layout.online)
    return {name: size * share for name, size in zip(PERSISTENT, sizes)}


def temporary_memory(
    config: Config, settings: Settings, layout: Layout, load: Load
) -> dict[str, Items]:
    """Return the bytes that backward needs on top, in three phases.

    log-probs: the gradient of the head, tile by tile, while all activations wait.
    blocks: the last block, while the inputs of all others are still saved.
    embedding: the end, where the gradients of embedding and head are reduced.

    FSDP keeps the buffer of a block's reduced gradient until the next one is reduced.
    """
    c, m, shards = layout.compute_bytes, layout.master_bytes, layout.shards
    root, block, matrix = layout.root, layout.block, layout.matrix
    gathered, fetched = gathered_weights(layout)
    # with --gather-once, gradients are whole; the local share is counted as gradients
    whole = m * layout.whole * (1 - 1 / shards) if layout.gather_once else 0
    reduced = m * (1 + 1 / shards)  # per parameter: the copy to reduce, and the share of the result
    tied = matrix if config.tie_word_embeddings else 0
    waiting, working = activations_in_backward(config, settings, layout, load)
    # A tile's logits, its probabilities and those of the tile before, upcast, and, where the model
    # computes in less, their gradient.
    narrowest, widest = (load.predicted * n for n in (MIN_TILE_WIDTH, config.vocab_size))
    tile = min(widest, max(narrowest, LOGITS_TILE[layout.kind]))
    return {
        "log-probs": {
            "gathered weights": gathered + fetched,
            "unsharded gradients": whole + c * matrix,  # the head's
            "activations": waiting,
            "logits": c * (widest if settings.keeps_logits else tile)
            + (2 * m + c * (c < m)) * tile,
        },
        "blocks": {
            "gathered weights": gathered + fetched,
            "unsharded gradients": whole + c * matrix + (c + reduced) * block,
            "activations": waiting + working,
        },
        "embedding": {
            "gathered weights": gathered if layout.gather_once else 0,
            "unsharded gradients": whole + c * tied + (c + reduced) * root + m * block,
        },
    }


def gathered_weights(layout: Layout) -> tuple[float, float]:
    """Return the bytes of weights that stay gathered, and of those fetched block by block.

    FSDP gathers a block into a flat buffer and copies it out, and in backward it fetches the next
    block ahead. A single rank gathers without buffers.
    """
    c, whole, root = layout.compute_bytes, layout.whole, layout.root
    gathered = c * (whole if layout.gather_once else root)
    fetched = 0 if layout.gather_once else c * layout.block * (1 if layout.shards == 1 else 2)
    if layout.kind == "cpu":
        # Saved activations land in the holes that glibc finds where a block's weights were, and the
        # next block's weights need new room. As measured, the heap grows as if the weights of all
        # blocks had stayed, and those of the reference, too.
        fetched = c * (whole - root) * ((not layout.gather_once) + layout.online)
    return gathered, fetched


@dataclass(frozen=True)
class Activations:
    """Holds the bytes of activations that a micro-batch leaves for backward."""

    saved: Items  # per block: "everything", or what checkpointing saves by --keep-products
    backward: float  # that the backward of a block needs on top
    head: float  # saved between the last block and the logits


def activations_in_backward(
    config: Config, settings: Settings, layout: Layout, load: Load
) -> tuple[float, float]:
    """Return the bytes that wait when backward begins, and those of the block it is working on."""
    found = activations(config, load, layout.compute_bytes, layout.kind)
    saved, working = found.saved, found.backward
    waiting = found.head + config.num_hidden_layers * saved[settings.kept]
    if settings.activation_checkpointing:
        # The block at work has everything; with "all", it has its MLP's part among the saved.
        mlp = saved["all"] - saved["attention"]
        working += saved["everything"] - mlp * (settings.kept == "all")
    return waiting, working


def activations(config: Config, load: Load, c: int, kind: str) -> Activations:
    """Count the activations of a micro-batch. c: bytes of a number that is computed with."""
    hidden, mlp, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    w = max(c, 4)  # of a number that is upcast
    by_matmuls = kind == "cpu" and c == 2  # how attention is computed; elsewhere by one kernel
    q, kv = (n * config.head_dim for n in (heads, config.num_key_value_heads))
    # a norm's input and result; a CPU also keeps the result without its gains, both upcast
    norm = hidden * (2 * w + c if kind == "cpu" else 2 * c)
    per_token = [  # features, bytes of each
        (2 * q, c),  # queries, and what attention returns
        (q * (kind == "cpu" and not by_matmuls), c),  # which a CPU's kernel returns in blocks
        (heads * (not by_matmuls), w),  # log of attention's normaliser
        (4 * mlp, c),  # gate, silu(gate), up, their product
    ]
    everything = load.tokens * sum(features * size for features, size in per_token)
    everything += load.tokens * 2 * norm + load.keys * 2 * kv * c
    # attention's probabilities, with those that the mask hides: half a block for the mean query
    shown = load.visible + load.tokens * (QUERY_BLOCK - 1) / 2
    everything += by_matmuls * heads * shown * c
    # the gradients of silu(gate) and up beside that of the product, and of the residual stream
    backward = load.tokens * (2 * mlp + 2 * hidden) * c
    # the last norm; the positions that predict, and their gradient
    head = load.tokens * norm + load.predicted * 2 * hidden * c
    # the block's input; attention's output and normaliser
    checkpointed = load.tokens * (hidden * c + q * c + heads * w * (not by_matmuls))
    attention_products = load.tokens * (q + 2 * kv + hidden) * c
    mlp_products = load.tokens * 2 * mlp * c
    saved = {
        "everything": everything,
        "none": checkpointed,
        "attention": checkpointed + attention_products,
        "all": checkpointed + attention_products + mlp_products,
    }
    return Activations(saved, backward, head)


def largest_microbatch(
    config: Config, settings: Settings, machine: Machine, load: Load, most: int
) -> int:
    """Return the most tokens of a micro-batch, up to `most`, that fit on a GPU; 0 if none do.

    load: a micro-batch whose proportions are kept.
    """

    def fits(tokens: int) -> bool:
        phases = memory(config, settings, machine, load.times(tokens / load.tokens))
        return total(worst(phases)) <= machine.memory

    low, high = 0, most + 1  # by bisection: `low` fits or is 0, `high` does not or is too many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def resolve_auto(
    config: Config, settings: Settings, machine: Machine, steps: list[list[Pair]]
) -> Settings:
    """Return a copy with what auto means for `--microbatch-tokens` and `--keep-products`.

    That is what fits in `SHARE` of the machine's memory. Kept products, which spare recomputation,
    come before micro-batches that are larger than usual. Where nothing fits, it is the least.

    steps: the pairs of some steps, with the largest step and the longest pair among them.
    """
    tokens, kept = settings.microbatch_tokens, settings.keep_products
    if "auto" not in (tokens, kept):
        return settings
    load = Load.of(config, max(steps, key=lambda step: sum(pair.tokens for pair in step)))
    longest = max(pair.tokens for step in steps for pair in step)
    # What holds a whole step: shares of GPUs are equal to within a pair.
    most = math.ceil(load.tokens / machine.gpus) + longest * (machine.gpus > 1)
    usual = Settings.microbatch_tokens if tokens == "auto" else tokens
    room = replace(machine, memory=SHARE * machine.memory)
    for policy in ("all", "attention", "none") if kept == "auto" else (kept,):
        settings = replace(settings, keep_products=policy)
        largest = largest_microbatch(config, settings, room, load, most)
        if largest >= min(most, max(longest, usual)):
            break
    return replace(
        settings, microbatch_tokens=max(largest, longest) if tokens == "auto" else tokens
    )


def fit_to_memory(settings: Settings, inputs: Inputs, device: torch.device) -> None:
    """Replace auto in the settings by what should fit on every rank, and print it.

    Call it on all ranks, before the model takes memory.
    """
    names = [name for name in AUTO if getattr(settings, name) == "auto"]
    if not names:
        return
    machine = Machine(device.type, "", dist.get_world_size(), free_memory(device), None)
    sizes = inputs.pairs.lengths.sum(1)
    largest = max(inputs.steps, key=lambda step: sizes[step].sum())
    steps = [[inputs.pairs[i] for i in indices] for indices in (largest, [sizes.argmax()])]
    fitting = resolve_auto(inputs.config, settings, machine, steps)
    for name in names:
        setattr(settings, name, getattr(fitting, name))
    chosen = ", ".join(f"--{name.replace('_', '-')} {getattr(settings, name)}" for name in names)
    print0(f"auto: {chosen}, which fits in {SHARE:.0%} of the {machine.memory / GIB:.1f} GiB free")


# --------------------------------------------------------------------------------------------------
# The run to plan: its model, pairs, machine and steps


def find_model(name: str) -> tuple[Config, Path | None]:
    """Return a model's shape, and the folder that may hold its tokenizer.

    Looks on this machine, in the hub's cache and in `SHAPES`. Nothing is downloaded.

    Raises:
        DataError: none of them holds that model.
    """
    if at_hand(name):
        return read_config(folder := Path(name).expanduser()), folder
    from huggingface_hub import try_to_load_from_cache  # slow to import, and only needed for ids

    repository, _, revision = name.partition("@")
    cached = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    if isinstance(cached, str):
        return read_config(folder := Path(cached).parent), folder
    if repository in SHAPES:
        return SHAPES[repository], None
    hint = "pass --model a folder that holds its config.json; the weights need not be there"
    raise DataError(f"{name}: not on this machine: {hint}")


def pairs_to_plan_with(
    settings: Settings, tokens_per_pair: int | None, folder: Path | None
) -> tuple[list[Pair], int | None, str]:
    """Return pairs with the lengths to plan with, the number of pairs if known, and their origin.

    Raises:
        DataError: a record is malformed, or no pair can be used.
    """
    if not tokens_per_pair and folder and at_hand(settings.data):
        if (folder / "tokenizer.json").exists():
            return sampled_pairs(settings, folder)
    return assumed_pairs(settings, tokens_per_pair)


def assumed_pairs(
    settings: Settings, tokens_per_pair: int | None
) -> tuple[list[Pair], int | None, str]:
    """Return one step of equal pairs, with `tokens_per_pair` tokens or with an assumed length."""
    responses = OBJECTIVES[settings.objective].responses
    if tokens_per_pair:
        why, length = "as told", tokens_per_pair / (responses + PROMPT_TO_RESPONSE)
    else:
        why = "assumed: UltraFeedback's median"
        length = min(PROMPT_AND_RESPONSE, settings.max_length) / (1 + PROMPT_TO_RESPONSE)
    lengths = PROMPT_TO_RESPONSE * length, length
    prompt, response = (np.zeros(max(1, round(n)), np.int32) for n in lengths)
    pair = Pair(prompt, (response,) * responses, "")
    return [pair] * settings.batch_size, None, f"{why}; {pair.tokens} tokens a pair"


def sampled_pairs(settings: Settings, folder: Path) -> tuple[list[Pair], int | None, str]:
    """Read the data, count its pairs and tokenize the first ones."""
    tokenizer = Tokenizer(folder, read_template(settings.chat_template), settings.date)
    blocks = Progress(f"reading {settings.data}", read_blocks(settings.data, settings), each=BLOCK)
    whole = join_blocks(settings.data, settings, blocks)
    examples = whole.examples
    for note in whole.notes:
        print(printable(note))
    limits = settings.max_length, settings.max_prompt_length
    encode, count = encoder(settings.like_authors), len(examples)
    refused: list[str] | None = [] if settings.skip_unusable else None
    pairs = encode_usable(encode, tokenizer, limits, examples[:SAMPLE], Counter(), refused)
    if not pairs:
        raise DataError(f"{settings.data}: holds nothing to train on")
    seen = f"the first {SAMPLE:,} of {count:,}" if count > SAMPLE else f"all {count:,}"
    lengths = [pair.tokens for pair in pairs]
    mean = sum(lengths) / len(lengths)
    measured = f"{mean:.0f} tokens a pair, {max(lengths)} the longest"
    return pairs, count, f"{seen} of {settings.data}; {measured}"


def machine_for(settings: Settings, options: PlanOptions) -> Machine:
    """Return the machine that the options ask for; what they leave open is this machine's.

    Raises:
        InputError: --gpu names none that the table of data sheets holds, or there are none.
    """
    # torchrun --nproc-per-node 8 train.py --plan: of 8
    asked = options.gpus or int(os.environ.get("WORLD_SIZE", 0))
    gpu, gpus, host = None, asked or 1, math.inf
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if settings.device == "cpu" and options.gpu:
        raise InputError(f"--gpu {options.gpu}: --device cpu uses no GPU")
    if settings.device == "cpu":
        kind, name = "cpu", "CPU process"
        memory_here = ram / gpus
    elif options.gpu is None and torch.cuda.is_available():
        kind, name = "cuda", torch.cuda.get_device_name()
        gpus = asked or torch.cuda.device_count()
        memory_here = torch.cuda.get_device_properties(0).total_memory
        gpu, host = find_gpu(name), ram / min(gpus, torch.cuda.device_count())
    else:
        kind, name = "cuda", options.gpu or "H100"
        if (gpu := find_gpu(name)) is None:
            known = f"known are {', '.join(GPUS)}; --gpus is the number"
            raise InputError(f"--gpu {name}: no data sheet is known by that name; {known}")
        memory_here = gpu.memory * GIB
    if options.gpu_memory is not None:
        memory_here = options.gpu_memory * GIB
    if gpu and options.gpu_tflops is not None:
        gpu = replace(gpu, tflops=options.gpu_tflops)
    tflops = gpu.tflops if gpu else options.gpu_tflops
    return Machine(kind, name, gpus, memory_here, tflops and tflops * 1e12, gpu, host)


def first_steps(
    settings: Settings, pairs: list[Pair], count: int | None
) -> tuple[list[list[Pair]], int | None]:
    """Return the pairs of the first full steps, and the number of steps of the run if known."""
    total = sum(1 for _ in all_steps(count, settings)) if count else settings.max_steps
    laid_out = itertools.islice(all_steps(len(pairs), settings), STEPS)
    steps = [[pairs[i] for i in indices] for indices in laid_out]
    # the last step of an epoch may be short
    return [step for step in steps if len(step) == len(steps[0])], total


def step_flops(config: Config, settings: Settings, steps: list[list[Pair]]) -> float:
    """Return the mean FLOPs of a step, of which forward and backward are three passes."""
    total = sum(sum(train_flops(config, pair) for pair in step) for step in steps)
    return total / len(steps) * (3 + extra_passes(settings)) / 3


# --------------------------------------------------------------------------------------------------
# The plan


def make_plan(settings: Settings, options: PlanOptions) -> Plan:
    """Predict memory, micro-batches and time of a run.

    Raises:
        InputError: model or data cannot be used, as in training, or --replicate does not divide
            the number of GPUs.
    """
    machine = machine_for(settings, options)
    if machine.gpus % settings.replicate:
        raise InputError(f"--replicate {settings.replicate} does not divide --gpus {machine.gpus}")
    if options.gpu and settings.dtype == "auto":  # not this machine's, which may be older
        settings = replace(settings, dtype="bf16")
    settings = settings.resolved(machine.kind)
    config, folder = find_model(settings.model)
    pairs, count, origin = pairs_to_plan_with(settings, options.plan_tokens_per_pair, folder)
    steps, total_steps = first_steps(settings, pairs, count)
    alone = [max(pairs, key=lambda pair: pair.tokens)]
    settings = resolve_auto(config, settings, machine, [*steps, alone])
    longest = Load.of(config, alone)
    # A run of more steps than were laid out may meet its longest pair alone in a micro-batch.
    least = longest if total_steps != len(steps) else Load(0, 0, 0)

    def lay_out(settings: Settings, machine: Machine) -> tuple[dict[str, Items], Load, int]:
        load, rounds = fullest_microbatch(config, settings, machine, steps, least)
        return memory(config, settings, machine, load), load, rounds

    phases, fullest, rounds = lay_out(settings, machine)
    on_gpu = worst(lay_out(replace(settings, offload=False), machine)[0])
    of_step = Load.of(config, list(itertools.chain(*steps))).times(1 / len(steps))
    largest_step = max(sum(pair.tokens for pair in step) for step in steps)
    at_once = replace(settings, microbatch_tokens=largest_step)
    most = int(fullest_microbatch(config, at_once, machine, steps, longest)[0].tokens)
    largest = largest_microbatch(config, settings, machine, fullest, most)
    flops, share = step_flops(config, settings, steps), options.mfu
    times = step_times(config, settings, machine, of_step.times(1 / machine.gpus), rounds)
    if options.gpu_tflops and not times:
        share = share or ASSUMED_MFU
    seconds = None
    if share and machine.peak:
        times, seconds = {}, flops / (machine.gpus * machine.peak * share)
    elif times:
        seconds = max(time for name, time in times.items() if name != "optimizer")
        seconds += times["optimizer"]
    return Plan(
        machine=machine,
        settings=settings,
        parameters=Layout.of(config, settings, machine).whole,
        pairs=origin,
        phases=phases,
        items=worst(phases),
        on_host=sum(on_gpu[name] for name in PERSISTENT),
        load=fullest,
        microbatches=rounds,
        largest=largest if largest >= longest.tokens else 0,
        most=most,
        step_pairs=len(steps[0]),
        step_tokens=of_step.tokens,
        steps=total_steps,
        flops=flops,
        times=times,
        seconds=seconds,
        helps=memory_savers(settings, machine, lambda *run: total(worst(lay_out(*run)[0]))),
    )


def fullest_microbatch(
    config: Config, settings: Settings, machine: Machine, steps: list[list[Pair]], least: Load
) -> tuple[Load, int]:
    """Return the fullest micro-batch, at least `least`, and the most that a GPU has in a step.

    It has the most of each that any has: of tokens, and of predicted tokens, which take logits.
    """
    budget, cost = settings.microbatch_tokens, partial(train_flops, config)
    rounds = [micro_batches(step, machine.gpus, budget, cost) for step in steps]
    loads = [Load.of(config, share) for step in rounds for share in itertools.chain(*step)]
    counts = zip(*(vars(load).values() for load in [*loads, least]))
    return Load(*map(max, counts)), max(map(len, rounds))


def memory_savers(
    settings: Settings, machine: Machine, total_of: Callable[[Settings, Machine], float]
) -> Items:
    """Return the flags that would lower the memory per GPU, and the total with each of them."""
    fewer = max(1, settings.microbatch_tokens // 2)
    changes = {
        "--activation-checkpointing": replace(settings, activation_checkpointing=True),
        "--keep-products none": replace(settings, keep_products="none"),
        "--reference cached": replace(settings, reference="cached"),
        "--no-gather-once": replace(settings, gather_once=False),
        f"--microbatch-tokens {fewer}": replace(settings, microbatch_tokens=fewer),
        "--offload": replace(settings, offload=True),
    }
    totals = {flags: total_of(changed, machine) for flags, changed in changes.items()}
    if machine.kind == "cuda":
        more = replace(machine, gpus=2 * machine.gpus)
        totals[f"--gpus {more.gpus}"] = total_of(settings, more)
    now = total_of(settings, machine)
    return {flags: size for flags, size in sorted(totals.items(), key=itemgetter(1)) if size < now}


def print_plan(settings: Settings, options: PlanOptions) -> None:
    """Print the plan of a run; under torchrun, rank 0 does.

    Raises:
        InputError: the run does not fit, or as `make_plan` does.
    """
    if not is_rank_0():
        return
    plan = make_plan(settings, options)
    machine, settings = plan.machine, plan.settings
    kind = f"{settings.objective}, {settings.dtype}"
    print(f"{settings.model}: {plan.parameters:,} parameters; {kind}")
    gpus = f"{machine.gpus} × {machine.name} of {machine.memory / GIB:.0f} GiB"
    print(f"{gpus}\npairs: {plan.pairs}\n")
    print("\n".join([*memory_lines(plan, settings), "", *step_lines(plan, settings)]))
    if plan.total > machine.memory:
        needed, there = (f"{size / GIB:.2f} GiB" for size in (plan.total, machine.memory))
        raise InputError(f"--plan: a {each(plan)} needs {needed} and has {there}")
    if settings.offload and plan.on_host > machine.host:
        there = f"this machine has {machine.host / GIB:.2f} GiB for each"
        raise InputError(f"--plan: --offload needs {on_host(plan)} on the host, and {there}")


def memory_lines(plan: Plan, settings: Settings) -> Iterable[str]:
    """Yield the table of memory, in GiB: a row per item, a column per phase."""

    def row(name: str, sizes: Iterable[float]) -> str:
        return f"  {name:22}" + "".join(f"{size / GIB:11.2f}" for size in sizes)

    phases, machine = plan.phases.values(), plan.machine
    yield f"GiB per {each(plan):15}" + " ".join(f"{phase:>11}" for phase in plan.phases).rstrip()
    for name in plan.items:
        yield row(name, [items[name] for items in phases])
    yield row("total", map(total, phases))
    if plan.total <= machine.memory:
        verdict, helps = "fits", {}
    else:
        verdict, helps = "does NOT fit", plan.helps
    yield f"{row('the worst phase', [plan.total])}   {verdict} in {machine.memory / GIB:.2f}"
    for flags, size in helps.items():
        host = f", and {on_host(plan)} on the host" if flags == "--offload" else ""
        still = "" if size <= machine.memory else "still too much: "
        yield f"{row('  with', [size])}   {still}{flags}{host}"
    if settings.offload and machine.kind == "cuda":
        yield f"  on the host             {on_host(plan)}: {', '.join(PERSISTENT)}"


def on_host(plan: Plan) -> str:
    """Return the memory that --offload needs on the host."""
    each_gpu, all_gpus = plan.on_host / GIB, plan.machine.gpus * plan.on_host / GIB
    return f"{each_gpu:.2f} GiB per GPU ({all_gpus:.0f} for all)"


def step_lines(plan: Plan, settings: Settings) -> Iterable[str]:
    """Yield what a step takes: micro-batches, work and time."""
    machine, limit = plan.machine, f"--microbatch-tokens {settings.microbatch_tokens}"
    limit += f" --keep-products {settings.keep_products}" * (settings.keep_products != "none")
    fullest = f"{plan.microbatches}, the fullest of {plan.load.tokens:,.0f} tokens"
    yield f"step          {plan.step_pairs} pairs, {plan.step_tokens:,.0f} tokens"
    yield f"              micro-batches of each {each(plan)}: {fullest}"
    yield f"              with {limit}"
    whole = ": a whole step at once" if plan.largest == plan.most else ""
    largest = (
        f"--microbatch-tokens {plan.largest:,}{whole}" if plan.largest else "no micro-batch fits"
    )
    yield f"largest       {largest}"
    yield f"work          {plan.flops:.3g} floating-point operations a step"
    if plan.seconds and machine.peak:
        share = plan.flops / (plan.seconds * machine.gpus * machine.peak)
        peak = f"{machine.gpus} × {machine.peak / 1e12:.0f} TFLOP/s"
        how = "modelled" if plan.times else "--mfu"
        yield f"time          {duration(plan.seconds)} a step at {share:.0%} of {peak} ({how})"
        if plan.times:
            *beside, last = (f"{name} {duration(t)}" for name, t in plan.times.items() if t)
            yield f"              the longest of {', '.join(beside)};\n{'':14}then {last}"
        faster = [f"--flash {settings.flash}"] * (settings.flash != 2)
        faster += ["--compile"] * settings.compile
        if plan.times and faster:
            yield f"              without what {' and '.join(faster)} would save"
        if plan.steps:
            yield f"              {plan.steps:,} steps in {duration(plan.steps * plan.seconds)}"
    else:
        yield f"time          unknown: pass --gpu-tflops, the peak of a {each(plan)}, or --mfu"


def each(plan: Plan) -> str:
    """Return what the memory is counted per: a GPU, or a process on a CPU."""
    return "process" if plan.machine.kind == "cpu" else "GPU"


def duration(seconds: float) -> str:
    """Return a time in the largest unit of which there are two.

    >>> duration(5), duration(90), duration(10_000)
    ('5 s', '90 s', '2.8 h')
    """
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
