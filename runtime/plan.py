"""Predict what a run needs before it starts: memory of each GPU, micro-batches, time.

    python train.py --plan --gpus 8 --gpu-memory 80 --model FOLDER --data FILE [all other flags]

The weights are not read: the shape comes from FOLDER/config.json. Lengths come from the data if
data and tokenizer are on this machine, else they are assumed. With P parameters, `shards` GPUs that
share one copy, c bytes per parameter to compute with and m = max(c, 4) bytes per master weight:

    parameters   m · P / shards       master weights; these four are on the host with --offload
    gradients    m · P / shards       after reduction
    optimizer    2 m · P / shards     AdamW's two moments
    reference    c · P / shards       frozen, with --reference online
    the rest     temporary, in three phases of backward; the worst phase counts

Time is the FLOPs of `model.train_flops` divided by the peak of all GPUs times `--mfu`, a share that
covers communication and recomputation.

Read next: `data.micro_batches`, which spreads a step over ranks; runtime/settings.py has the flags.
"""

import itertools
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import Pair, micro_batches
from formats.authors import encoder
from formats.checkpoint import read_config
from formats.errors import DataError, InputError, printable
from formats.hub import at_hand
from formats.tokenizer import Tokenizer, read_template
from methods.objectives import OBJECTIVES
from model import LOGITS_TILE, MIN_TILE_WIDTH, Config, Llama, train_flops
from runtime.inputs import Inputs, all_steps, encode_usable, join_blocks, read_blocks
from runtime.processes import free_memory, print0
from runtime.settings import AUTO, PlanOptions, Settings

GIB = 2**30
SAMPLE, STEPS = 2000, 20  # pairs that are tokenized for their lengths, steps that are laid out
# Assumed without data: UltraFeedback's median tokens of a prompt and one response together, and
# its ratio prompt : response, from the README of github.com/frankxwang/dpo-prefix-sharing
PROMPT_AND_RESPONSE, PROMPT_TO_RESPONSE = 409, 0.42

# Memory that is not tensors. On CUDA: its context, NCCL's buffers, and the share of the tensors'
# bytes that the caching allocator holds without using it; all assumed, not measured. On a CPU: what
# Python, torch and a tokenizer take before the first tensor (0.28 to 0.34 GiB, torch 2.13 on
# Linux), and the share of freed memory that glibc keeps (bench/plan_check.py).
RUNTIME = {"cuda": 1.5 * GIB, "cpu": 0.31 * GIB}
SLACK = {"cuda": 0.05, "cpu": 0.03}
SHARE = 0.8  # of the free memory that `auto` plans with: no plan has been held to a GPU yet

PERSISTENT = "parameters", "gradients", "optimizer", "reference"  # through the whole step
TEMPORARY = "gathered weights", "unsharded gradients", "activations", "log-prob tile"
Items = dict[str, float]  # item: bytes on one GPU

# Peak dense bf16 FLOP/s, from NVIDIA's data sheets
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return peak dense bf16 FLOP/s from the data sheet; None for CPUs and unknown GPUs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)


@dataclass(frozen=True)
class Machine:
    """Describes the GPUs, or CPU ranks, that a plan is for."""

    kind: str  # "cuda" or "cpu"
    name: str
    gpus: int  # or CPU ranks
    memory: float  # bytes of each
    peak: float | None  # FLOP/s of each, if known


@dataclass(frozen=True)
class Load:
    """Counts what one GPU computes in its fullest micro-batch, in tokens."""

    tokens: float  # of the packed stream, with each prompt once
    keys: float  # gathered for attention, with each prompt once per response
    predicted: float  # response tokens

    @classmethod
    def of(cls, pairs: list[Pair]) -> "Load":
        """Return the load of a micro-batch."""
        responses = sum(len(r) for pair in pairs for r in pair.responses)
        keys = sum(len(pair.prompt) * len(pair.responses) for pair in pairs) + responses
        return cls(sum(pair.tokens for pair in pairs), keys, responses)

    def filled(self, tokens: int) -> "Load":
        """Return a load of `tokens` tokens in the same proportions."""
        return Load(tokens, self.keys * tokens / self.tokens, self.predicted * tokens / self.tokens)


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
    seconds: float | None  # per step, if the peak is known
    helps: list[str]  # what would save memory

    @property
    def total(self) -> float:
        """Return the bytes that one GPU needs in the worst phase."""
        return sum(self.items.values())


# --------------------------------------------------------------------------------------------------
# Memory


@dataclass(frozen=True)
class Layout:
    """Counts the parameters of a model, and says how one GPU keeps them."""

    whole: int
    block: int
    root: int  # outside of the blocks: embedding, last norm, head
    matrix: int  # the embedding or the head
    kind: str  # "cuda" or "cpu"
    shards: int  # GPUs that share one copy
    compute_bytes: int  # per parameter, in what is computed with
    master_bytes: int  # per master weight
    online: bool  # whether a reference model stays in memory
    offload: bool
    gather_once: bool

    @classmethod
    def of(cls, config: Config, settings: Settings, machine: Machine) -> "Layout":
        """Return the layout of a run."""
        with torch.device("meta"):
            model = Llama(config)
        parts = (model, model.model.layers[0])
        whole, block = (sum(p.numel() for p in part.parameters()) for part in parts)
        compute_bytes = {"bf16": 2, "fp32": 4, "fp64": 8}[settings.dtype]
        return cls(
            whole=whole,
            block=block,
            root=whole - config.num_hidden_layers * block,
            matrix=config.vocab_size * config.hidden_size,
            kind=machine.kind,
            shards=machine.gpus // settings.replicate,
            compute_bytes=compute_bytes,
            master_bytes=max(compute_bytes, 4),
            online=has_online_reference(settings),
            offload=settings.offload and machine.kind == "cuda",
            gather_once=settings.gather_once,
        )


def has_online_reference(settings: Settings) -> bool:
    """Return True if a frozen reference model stays in memory."""
    return OBJECTIVES[settings.objective].needs_reference and settings.reference == "online"


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
        slack = RUNTIME[machine.kind] + SLACK[machine.kind] * sum(items.values())
        phases[phase] = items | {"context, slack": slack}
    return phases


def worst(phases: dict[str, Items]) -> Items:
    """Return the items of the phase that needs most."""
    return max(phases.values(), key=lambda items: sum(items.values()))


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
    # logits are upcast; if the model computes in less, they exist in its dtype before and after
    narrowest, widest = (load.predicted * n for n in (MIN_TILE_WIDTH, config.vocab_size))
    tile = min(widest, max(narrowest, LOGITS_TILE[layout.kind]))
    return {
        "log-probs": {
            "gathered weights": gathered + fetched,
            "unsharded gradients": whole + c * matrix,  # the head's
            "activations": waiting,
            "log-prob tile": (m + (2 * c if c < m else 0)) * tile,
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
    checkpointing = settings.activation_checkpointing
    policy = settings.keep_products if checkpointing else "everything"
    waiting = found.head + config.num_hidden_layers * saved[policy]
    if checkpointing:
        # The block at work has everything; with "all", it has its MLP's part among the saved.
        mlp = saved["all"] - saved["attention"]
        working += saved["everything"] - mlp * (policy == "all")
    return waiting, working


def activations(config: Config, load: Load, c: int, kind: str) -> Activations:
    """Count the activations of a micro-batch. c: bytes of a number that is computed with."""
    hidden, mlp, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    w = max(c, 4)  # of a number that is upcast
    a = w if kind == "cpu" else c  # of a number in attention
    q, kv = (n * config.head_dim for n in (heads, config.num_key_value_heads))
    # a norm's input and result; a CPU also keeps the result without its gains, both upcast
    norm = hidden * (2 * w + c if kind == "cpu" else 2 * c)
    per_token = [  # features, bytes of each
        (2 * q, a),  # queries, and what attention returns
        (q * (kind == "cpu"), c),  # which on a CPU it returns segment by segment
        (heads, w),  # log of attention's normaliser
        (4 * mlp, c),  # gate, silu(gate), up, their product
    ]
    everything = load.tokens * sum(features * size for features, size in per_token)
    everything += load.tokens * 2 * norm + load.keys * 2 * kv * a
    # the gradients of silu(gate) and up beside that of the product, and of the residual stream
    backward = load.tokens * (2 * mlp + 2 * hidden) * c
    # the last norm; the positions that predict, and their gradient
    head = load.tokens * norm + load.predicted * 2 * hidden * c
    # the block's input; attention's output and normaliser
    checkpointed = load.tokens * (hidden * c + q * a + heads * w)
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
        phases = memory(config, settings, machine, load.filled(tokens))
        return sum(worst(phases).values()) <= machine.memory

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
    load = Load.of(max(steps, key=lambda step: sum(pair.tokens for pair in step)))
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
    sizes = np.array([pair.tokens for pair in inputs.pairs])
    largest = max(inputs.steps, key=lambda step: sizes[step].sum())
    steps = [[inputs.pairs[i] for i in indices] for indices in (largest, [sizes.argmax()])]
    fitting = resolve_auto(inputs.config, settings, machine, steps)
    for name in names:
        setattr(settings, name, getattr(fitting, name))
    chosen = ", ".join(f"--{name.replace('_', '-')} {getattr(settings, name)}" for name in names)
    print0(f"auto: {chosen}, which fits in {SHARE:.0%} of the {machine.memory / GIB:.1f} GiB free")


# --------------------------------------------------------------------------------------------------
# The run to plan: its model, pairs, machine and steps


def model_folder(name: str) -> Path:
    """Return the folder with config.json, on this machine or in the hub's cache.

    Nothing is downloaded.

    Raises:
        DataError: there is no such folder, and the hub's cache does not hold that model.
    """
    if at_hand(name):
        return Path(name).expanduser()
    from huggingface_hub import try_to_load_from_cache  # slow to import, and only needed for ids

    repository, _, revision = name.partition("@")
    cached = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    if not isinstance(cached, str):
        hint = "pass --model a folder that holds its config.json; the weights need not be there"
        raise DataError(f"{name}: not on this machine: {hint}")
    return Path(cached).parent


def pairs_to_plan_with(
    settings: Settings, tokens_per_pair: int | None, folder: Path
) -> tuple[list[Pair], int | None, str]:
    """Return pairs with the lengths to plan with, the number of pairs if known, and their origin.

    Raises:
        DataError: a record is malformed, or no pair can be used.
    """
    if not tokens_per_pair and at_hand(settings.data) and (folder / "tokenizer.json").exists():
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
    whole = join_blocks(settings.data, settings, read_blocks(settings.data, settings))
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
    """Return the machine that the options ask for; what they leave open is this machine's."""
    if settings.device == "cpu":
        gpus = options.gpus or 1
        memory_here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / gpus
        kind, name, peak = "cpu", "CPU process", None
    elif torch.cuda.is_available():
        gpus = options.gpus or torch.cuda.device_count()
        memory_here = torch.cuda.get_device_properties(0).total_memory
        kind, name = "cuda", torch.cuda.get_device_name(0)
        peak = peak_flops(torch.device("cuda"))
    else:
        gpus, memory_here = options.gpus or 1, 80 * GIB
        kind, name, peak = "cuda", "H100", PEAK_FLOPS["H100"]
    if options.gpu_memory is not None:
        memory_here = options.gpu_memory * GIB
    if options.gpu_tflops is not None:
        peak = options.gpu_tflops * 1e12
    return Machine(kind, name, gpus, memory_here, peak)


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
    """Return the mean FLOPs of a step.

    Forward and backward are three passes. An online reference is one more. So is the pass without
    gradients of an objective with a `step_baseline`, which the reference joins.
    """
    online = has_online_reference(settings)
    baseline_pass = OBJECTIVES[settings.objective].step_baseline is not None
    passes = 3 + online + baseline_pass * (1 + online)
    total = sum(sum(train_flops(config, pair) for pair in step) for step in steps)
    return total / len(steps) * passes / 3


# --------------------------------------------------------------------------------------------------
# The plan


def make_plan(settings: Settings, options: PlanOptions) -> Plan:
    """Predict memory, micro-batches and time of a run.

    Raises:
        InputError: model or data cannot be used, as in training, or --replicate does not divide
            the number of GPUs.
    """
    machine = machine_for(settings, options)
    gpus = machine.gpus
    if gpus % settings.replicate:
        raise InputError(f"--replicate {settings.replicate} does not divide --gpus {gpus}")
    settings = settings.resolved(machine.kind)
    folder = model_folder(settings.model)
    config = read_config(folder)
    pairs, count, origin = pairs_to_plan_with(settings, options.plan_tokens_per_pair, folder)
    steps, total_steps = first_steps(settings, pairs, count)
    longest = [max(pairs, key=lambda pair: pair.tokens)]
    settings = resolve_auto(config, settings, machine, [*steps, longest])
    cost = partial(train_flops, config)
    rounds = [micro_batches(step, gpus, settings.microbatch_tokens, cost) for step in steps]
    loads = [Load.of(share) for step in rounds for share in itertools.chain(*step)]
    # A run of more steps than were laid out may meet its longest pair alone in a micro-batch.
    candidates = loads + [Load.of(longest)] * (total_steps != len(steps))
    fullest = max(candidates, key=lambda load: load.tokens)

    phases = memory(config, settings, machine, fullest)
    on_gpu = worst(memory(config, replace(settings, offload=False), machine, fullest))
    sizes = [sum(pair.tokens for pair in step) for step in steps]
    most = max(math.ceil(max(sizes) / gpus), longest[0].tokens)
    largest = largest_microbatch(config, settings, machine, fullest, most)
    flops = step_flops(config, settings, steps)
    return Plan(
        machine=machine,
        settings=settings,
        parameters=Layout.of(config, settings, machine).whole,
        pairs=origin,
        phases=phases,
        items=worst(phases),
        on_host=sum(on_gpu[name] for name in PERSISTENT),
        load=fullest,
        microbatches=max(map(len, rounds)),
        largest=largest if largest >= longest[0].tokens else 0,
        most=most,
        step_pairs=len(steps[0]),
        step_tokens=sum(sizes) / len(sizes),
        steps=total_steps,
        flops=flops,
        seconds=flops / (gpus * machine.peak * options.mfu) if machine.peak else None,
        helps=memory_savers(settings),
    )


def memory_savers(settings: Settings) -> list[str]:
    """Return what would lower the memory per GPU and is not in use."""
    available = {
        "more GPUs": True,
        "--activation-checkpointing": not settings.activation_checkpointing,
        "--reference cached": has_online_reference(settings),
        "--offload": not settings.offload,
    }
    return [name for name, unused in available.items() if unused]


def print_plan(settings: Settings, options: PlanOptions) -> None:
    """Print the plan of a run. Raises InputError as `make_plan` does."""
    plan = make_plan(settings, options)
    machine, settings = plan.machine, plan.settings
    kind = f"{settings.objective}, {settings.dtype}"
    print(f"{settings.model}: {plan.parameters:,} parameters; {kind}")
    gpus = f"{machine.gpus} × {machine.name} of {machine.memory / GIB:.0f} GiB"
    print(f"{gpus}\npairs: {plan.pairs}\n")
    print("\n".join([*memory_lines(plan, settings), "", *step_lines(plan, settings, options)]))


def memory_lines(plan: Plan, settings: Settings) -> Iterable[str]:
    """Yield the table of memory, in GiB: a row per item, a column per phase."""

    def row(name: str, sizes: Iterable[float]) -> str:
        return f"  {name:22}" + "".join(f"{size / GIB:11.2f}" for size in sizes)

    phases, machine = plan.phases.values(), plan.machine
    yield f"GiB per {each(plan):15}" + " ".join(f"{phase:>11}" for phase in plan.phases).rstrip()
    for name in plan.items:
        yield row(name, [items[name] for items in phases])
    yield row("total", [sum(items.values()) for items in phases])
    verdict = "fits" if plan.total <= machine.memory else "does NOT fit"
    yield f"{row('the worst phase', [plan.total])}   {verdict} in {machine.memory / GIB:.2f}"
    if settings.offload and machine.kind == "cuda":
        yield f"{row('on the host', [plan.on_host])}   {', '.join(PERSISTENT)}"


def step_lines(plan: Plan, settings: Settings, options: PlanOptions) -> Iterable[str]:
    """Yield what a step takes: micro-batches, work and time."""
    machine, limit = plan.machine, f"--microbatch-tokens {settings.microbatch_tokens}"
    limit += f" --keep-products {settings.keep_products}" * (settings.keep_products != "none")
    fullest = f"{plan.microbatches}, the fullest of {plan.load.tokens:,.0f} tokens ({limit})"
    size = f"{plan.step_pairs} pairs, {plan.step_tokens:,.0f} tokens"
    yield f"step          {size}; micro-batches of each {each(plan)}: {fullest}"
    if plan.largest:
        whole = ": a whole step at once" if plan.largest == plan.most else ""
        yield f"largest       --microbatch-tokens {plan.largest:,}{whole}"
    else:
        helps = ", ".join(plan.helps)
        yield f"largest       --microbatch-tokens none is small enough; what helps: {helps}"
    yield f"work          {plan.flops:.3g} floating-point operations a step"
    if plan.seconds and machine.peak:
        share = f"{options.mfu:.0%} of {machine.gpus} × {machine.peak / 1e12:.0f} TFLOP/s"
        time = f"{duration(plan.seconds)} a step at {share} (--mfu, --gpu-tflops)"
        if plan.steps:
            time += f"; {plan.steps:,} steps in {duration(plan.steps * plan.seconds)}"
        yield f"time          {time}"
    else:
        yield f"time          unknown: pass --gpu-tflops, the peak of a {each(plan)}"


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
