"""What a run would take, before it takes it: memory of each GPU item by item, micro-batches, time. `train.py --plan`.

    python train.py --plan --gpus 8 --gpu-memory 80 --model DIR_WITH_CONFIG_JSON --data FILE [all other flags]

Weights are neither needed nor read: the shape is that of config.json; lengths are those of the data where data and
tokenizer are here, else assumed. For P parameters, `shards` GPUs that share one copy, c bytes of what is computed with and
m = max(c, 4) of master weights:

    parameters   m · P / shards       master weights; these four on the host with --offload
    gradients    m · P / shards       reduced
    optimizer    2 m · P / shards     AdamW's two moments
    reference    c · P / shards       frozen, online
    the rest     what a step has for a while, in three moments of backward; the worst one counts

Time is `train_flops` over the peak of all GPUs times `--mfu`: communication and recomputation are in that share.
"""

import itertools
import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import data
from data import DataError, Tokenizer, Tree
from model import LEAST_WORDS, LOGITS_TILE, Config, Llama
from settings import NEEDS_REFERENCE, Settings

GIB = 2**30
SAMPLE, STEPS = 2000, 20  # pairs that are tokenized for their lengths, steps that are laid out in micro-batches
# Where no pairs are at hand: UltraFeedback's median of a prompt and one response together, and prompt : response;
# README of github.com/frankxwang/dpo-prefix-sharing
PATH_TOKENS, PROMPT_TO_RESPONSE = 409, 0.42

# What is neither a tensor nor ours. CUDA: its context and NCCL's buffers, and the share of tensors' bytes that the
# caching allocator holds without using it; both assumed, not measured. CPU: what Python, torch and a tokenizer have
# resident before the first tensor (0.28 to 0.34 GiB, torch 2.13 on Linux), and what else glibc keeps of what is freed
# (bench/plan_check.py).
RUNTIME = {"cuda": 1.5 * GIB, "cpu": 0.31 * GIB}
STAYS = "parameters", "gradients", "optimizer", "reference"  # through the whole step; on the host with --offload
SLACK = {"cuda": 0.05, "cpu": 0.03}


# dense bfloat16 matrix products per second, from NVIDIA's data sheets
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device: torch.device) -> float | None:
    """By the data sheet, a second; None for a CPU and for a GPU that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)


def train_flops(config: Config, trees: list[Tree]) -> float:
    """Floating-point operations of forward and backward that the mathematics needs: 6 per weight and token, 12 per
    feature of a visible query-key pair; recomputation does not count, nor positions that meet no vocabulary."""
    c = config
    attention = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim  # rows of q, k, v, o
    block = c.hidden_size * (attention + 3 * c.intermediate_size)
    predicted, visible = 0, 0.0
    for tree in trees:
        p = len(tree.prompt)
        visible += p * (p + 1) / 2
        for r in map(len, tree.responses):
            visible += r * (p + (r + 1) / 2)
            predicted += r
    blocks = 6 * block * sum(map(len, trees)) + 12 * c.num_attention_heads * c.head_dim * visible
    return c.num_hidden_layers * blocks + 6 * c.vocab_size * c.hidden_size * predicted


def micro_batches(config: Config, trees: list[Tree], ranks: int, budget: int) -> list[list[list[int]]]:
    """Which process computes which of a step's trees, and when (`data.plan`): bounded by `budget` tokens, even in work."""
    return data.plan([len(tree) for tree in trees], ranks, budget, [train_flops(config, [tree]) for tree in trees])


@dataclass(frozen=True)
class Load:
    """The fullest micro-batch of one GPU."""

    tokens: float  # of the stream, each prompt once
    keys: float  # positions gathered for attention, a prompt once per response
    predicted: float  # response tokens

    @classmethod
    def of(cls, trees: list[Tree]) -> "Load":
        responses = sum(len(r) for tree in trees for r in tree.responses)
        keys = sum(len(tree.prompt) * len(tree.responses) for tree in trees) + responses
        return cls(sum(map(len, trees)), keys, responses)

    def filled(self, tokens: int) -> "Load":
        """With so many tokens, in the same proportions."""
        return Load(tokens, self.keys * tokens / self.tokens, self.predicted * tokens / self.tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def parameter_counts(config: Config) -> tuple[int, int]:
    """(of the whole model, of one block)."""
    with torch.device("meta"):
        model = Llama(config)
    whole, block = (sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers[0]))
    return whole, block


def memory(config: Config, settings: Settings, kind: str, gpus: int, load: Load) -> dict[str, dict[str, float]]:
    """Bytes on one GPU, moment by moment of a backward pass, item by item. kind: "cuda", or "cpu": of the process,
    which has but one moment."""
    c = {"bf16": 2, "fp32": 4, "fp64": 8}[settings.dtype]
    m = max(c, 4)
    shards = gpus // settings.replicate
    whole, block = parameter_counts(config)
    root = whole - config.num_hidden_layers * block
    matrix = config.vocab_size * config.hidden_size  # the head's, or the embedding's
    offload, gather_once = settings.offload and kind == "cuda", settings.gather_once
    online = settings.objective in NEEDS_REFERENCE and settings.reference == "online"

    sizes = (m, m, 2 * m, c * online)  # bytes a parameter
    stays = {name: 0 if offload else size * whole / shards for name, size in zip(STAYS, sizes)}

    # FSDP gathers a block into a flat buffer and copies it out, and in backward it fetches the next one ahead; the
    # buffer of a block's reduced gradient waits until the next block's is reduced. One process gathers without buffers.
    gathered = c * (whole if gather_once else root)
    fetched = 0 if gather_once else c * block * (1 if shards == 1 else 2)
    if kind == "cpu":  # what is kept lands in the holes that glibc finds where a block's weights were, and the next
        # block's need new room: measured, the heap grows as if all blocks' had stayed, and so with the reference's
        fetched = c * (whole - root) * ((not gather_once) + online)
    unsharded = m * whole * (1 - 1 / shards) if gather_once else 0  # beyond the share that is counted as gradients
    reduced = m * block * (1 + 1 / shards)

    keeps, one, head = activations(config, load, c, kind)
    kept = settings.keep_products if settings.activation_checkpointing else "everything"
    waiting = head + config.num_hidden_layers * keeps[kept]
    if settings.activation_checkpointing:  # the block at work has all of it, of which it may have kept the MLP's part
        one += keeps["everything"] - (keeps["all"] - keeps["attention"]) * (kept == "all")
    tile = min(load.predicted * config.vocab_size, max(load.predicted * LEAST_WORDS, LOGITS_TILE[kind]))
    moments = {
        "log-probs": {
            "gathered weights": gathered + fetched,
            "unsharded gradients": unsharded + c * matrix,  # the head's
            "activations": waiting,
            "log-prob tile": (m + (2 * c if c < m else 0)) * tile,  # logits, wide; where that is not all, before and after
        },
        "blocks": {  # the last one, when all others' inputs are still kept
            "gathered weights": gathered + fetched,
            "unsharded gradients": unsharded + c * matrix + c * block + reduced,
            "activations": waiting + one,
        },
        "embedding": {  # at the end, its gradient and the head's are reduced
            "gathered weights": gathered if gather_once else 0,
            "unsharded gradients": unsharded
            + c * (root + (matrix if config.tie_word_embeddings else 0))
            + m * root * (1 + 1 / shards)
            + m * block,
        },
    }
    names = "gathered weights", "unsharded gradients", "activations", "log-prob tile"
    if kind == "cpu":  # glibc keeps much of what is freed, in pieces of the wrong size: each item at its own worst
        moments = {"": {name: max(moment.get(name, 0) for moment in moments.values()) for name in names}}
    for moment, items in moments.items():
        items = stays | {name: items.get(name, 0) for name in names}
        moments[moment] = items | {"context, slack": RUNTIME[kind] + SLACK[kind] * sum(items.values())}
    return moments


def worst(moments: dict[str, dict[str, float]]) -> dict[str, float]:
    """The items of the moment that counts."""
    return max(moments.values(), key=lambda items: sum(items.values()))


def activations(config: Config, load: Load, c: int, kind: str) -> tuple[dict[str, float], float, float]:
    """Bytes that autograd keeps of one block (everything, or with activation checkpointing, by `--keep-products`), that
    the block's backward needs on top, and that are kept between the last block and the logits."""
    d, i, w = config.hidden_size, config.intermediate_size, max(c, 4)
    a = w if kind == "cpu" else c  # what attention computes in
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    # features a token, and their bytes
    per_token = [
        (2 * d, w),  # inputs of the two norms, wide
        (4 * d, c),  # of each norm: before and after its weight
        (2 * q, a),  # queries, what attention returns
        (q * (kind == "cpu"), c),  # which on a CPU it returns segment by segment
        (config.num_attention_heads, w),  # log of attention's normaliser
        (4 * i, c),  # gate, silu(gate), up, their product
    ]
    everything = load.tokens * sum(features * size for features, size in per_token) + load.keys * 2 * kv * a
    backward = load.tokens * (2 * i + 2 * d) * c  # gradients of silu(gate) and up beside the product's; of the stream
    head = load.tokens * d * (w + 2 * c) + load.predicted * 2 * d * c  # the last norm; what it predicts from, gradient
    kept = load.tokens * (d * c + q * a + config.num_attention_heads * w)  # the block's input, attention's output and normaliser
    attention, mlp = load.tokens * (q + 2 * kv + d) * c, load.tokens * 2 * i * c  # what their products return
    by_products = {"none": kept, "attention": kept + attention, "all": kept + attention + mlp}
    return {"everything": everything, **by_products}, backward, head


def largest_microbatch(
    config: Config, settings: Settings, kind: str, gpus: int, load: Load, most: int, room: float
) -> int:
    """The most tokens of a micro-batch, up to `most`, with which a GPU needs at most `room` bytes; 0 if none."""
    fits = lambda tokens: sum(worst(memory(config, settings, kind, gpus, load.filled(tokens))).values()) <= room
    low, high = 0, most + 1  # low fits or is 0, high does not or is out of the question
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---------------------------------------------------------------------------------------------------------------------
# What is known of the run


def model_folder(settings: Settings) -> Path:
    """Where config.json is: a folder, or the hub's cache. Nothing is fetched."""
    if data.at_hand(settings.model):
        return Path(settings.model).expanduser()
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = settings.model.partition("@")
    cached = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    if not isinstance(cached, str):
        hint = "pass --model a folder that holds its config.json; the weights need not be there"
        raise DataError(f"{settings.model}: not on this machine: {hint}")
    return Path(cached).parent


def pairs(settings: Settings, folder: Path) -> tuple[list[Tree], int | None, str]:
    """Pairs with the lengths to plan with, how many the run has if that is known, and where these come from."""
    answers = 1 if settings.objective == "sft" else 2
    told = settings.plan_tokens_per_pair
    if told or not (data.at_hand(settings.data) and (folder / "tokenizer.json").exists()):
        path = min(PATH_TOKENS, settings.max_length)
        length = told / (answers + PROMPT_TO_RESPONSE) if told else path / (1 + PROMPT_TO_RESPONSE)  # of a response
        prompt, response = (np.zeros(max(1, round(n)), np.int32) for n in (PROMPT_TO_RESPONSE * length, length))
        tree = Tree(prompt, (response,) * answers, "")
        why = "as told" if told else "assumed: UltraFeedback's median"
        return [tree] * settings.batch_size, None, f"{why}; {len(tree)} tokens a pair"
    tokenizer, examples, count = Tokenizer(folder, data.read_template(settings.chat_template)), [], 0
    for where, record in data.read_records(settings.data):
        try:
            example = data.parse_record(record, where, paired=settings.objective != "sft")[1]
        except data.Dropped:
            continue
        count += 1
        if count <= SAMPLE:
            examples.append(example)
    trees = tokenizer.encode(examples, settings.max_length, settings.max_prompt_length, Counter())
    if not trees:
        raise DataError(f"{settings.data}: nothing to learn from")
    seen = f"the first {len(examples):,} of {count:,}" if count > len(examples) else f"all {count:,}"
    mean = sum(map(len, trees)) / len(trees)
    return trees, count, f"{seen} of {settings.data}; {mean:.0f} tokens a pair, {max(map(len, trees))} the longest"


def machine(settings: Settings) -> tuple[str, int, float, float | None, str]:
    """(kind, GPUs or processes, bytes of each, FLOP/s of each if known, its name), of what is asked for or here."""
    if settings.device == "cpu":
        gpus = settings.gpus or 1
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / gpus
        name, peak, kind = "CPU process", None, "cpu"
    elif torch.cuda.is_available():
        gpus, kind = settings.gpus or torch.cuda.device_count(), "cuda"
        here, name = torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
        peak = peak_flops(torch.device("cuda"))
    else:
        gpus, here, name, peak, kind = settings.gpus or 1, 80 * GIB, "H100", PEAK_FLOPS["H100"], "cuda"
    room = here if settings.gpu_memory is None else settings.gpu_memory * GIB
    return kind, gpus, room, peak if settings.gpu_tflops is None else settings.gpu_tflops * 1e12, name


def duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


# ---------------------------------------------------------------------------------------------------------------------
# The answer


def plan(settings: Settings) -> dict:
    """All that is printed, as numbers (bytes, tokens, seconds). Raises DataError and CheckpointError as training does."""
    kind, gpus, room, peak, name = machine(settings)
    if gpus % settings.replicate:
        raise DataError(f"--replicate {settings.replicate} does not divide --gpus {gpus}")
    if settings.dtype == "auto":
        settings.dtype = "bf16" if kind == "cuda" else "fp32"
    folder = model_folder(settings)
    config = Config.from_folder(folder)
    trees, count, source = pairs(settings, folder)

    # the micro-batches of the first steps, and the longest pair, which may travel alone in others
    epochs = data.batches(count or len(trees), settings.batch_size, settings.epochs, settings.seed, settings.shuffle)
    total_steps = sum(1 for _ in itertools.islice(epochs, settings.max_steps)) if count else settings.max_steps
    order = data.batches(len(trees), settings.batch_size, settings.epochs, settings.seed, settings.shuffle)
    steps = [[trees[n] for n in step] for step in itertools.islice(order, min(settings.max_steps or STEPS, STEPS))]
    steps = [step for step in steps if len(step) == len(steps[0])]  # an epoch's last one may be short
    shares = [micro_batches(config, step, gpus, settings.microbatch_tokens) for step in steps]
    loads = [
        Load.of([step[i] for i in numbers])
        for step, rounds in zip(steps, shares)
        for numbers in itertools.chain(*rounds)
    ]
    longest = Load.of([max(trees, key=len)])
    fullest = max(loads + [longest] * (total_steps != len(steps)), key=lambda load: load.tokens)
    moments = memory(config, settings, kind, gpus, fullest)
    whole = worst(memory(config, replace(settings, offload=False), kind, gpus, fullest))
    host = sum(whole[name] for name in STAYS)  # with --offload
    items = worst(moments)
    sizes = [sum(map(len, step)) for step in steps]
    step_tokens, most = sum(sizes) / len(sizes), max(math.ceil(max(sizes) / gpus), longest.tokens)
    largest = largest_microbatch(config, settings, kind, gpus, fullest, most, room)

    # forward and backward are three passes; a reference that is asked at every step is one more, KTO's mean reward too
    online = settings.objective in NEEDS_REFERENCE and settings.reference == "online"
    passes = 3 + online + (settings.objective == "kto") * (1 + online)
    flops = sum(train_flops(config, step) for step in steps) / len(steps) * passes / 3
    seconds = flops / (gpus * peak * settings.mfu) if peak else None
    helps = {"more GPUs": True, "--activation-checkpointing": not settings.activation_checkpointing,
             "--reference cached": online, "--offload": not settings.offload}  # fmt: skip
    return {
        "machine": name, "kind": kind, "gpus": gpus, "room": room, "parameters": parameter_counts(config)[0],
        "pairs": source, "moments": moments, "items": items, "host": host, "total": sum(items.values()),
        "load": fullest, "microbatches": max(map(len, shares)), "largest": largest if largest >= longest.tokens else 0, "most": most,
        "step_tokens": step_tokens, "step_pairs": len(steps[0]), "flops": flops, "peak": peak, "seconds": seconds,
        "steps": total_steps, "helps": [what for what, applies in helps.items() if applies],
    }  # fmt: skip


def print_plan(settings: Settings) -> None:
    p = plan(settings)
    each = "process" if p["kind"] == "cpu" else "GPU"
    print(f"{settings.model}: {p['parameters']:,} parameters; {settings.objective}, {settings.dtype}")
    print(f"{p['gpus']} × {p['machine']} of {p['room'] / GIB:.0f} GiB; pairs: {p['pairs']}\n")
    row = lambda name, sizes: print(f"  {name:22}" + "".join(f"{size / GIB:11.2f}" for size in sizes))
    print(f"GiB per {each:15}" + " ".join(f"{moment:>11}" for moment in p["moments"]).rstrip())
    for name in p["items"]:
        row(name, [items[name] for items in p["moments"].values()])
    row("total", [sum(items.values()) for items in p["moments"].values()])
    verdict = "fits" if p["total"] <= p["room"] else "does NOT fit"
    print(f"  {'the worst moment':22}{p['total'] / GIB:11.2f}   {verdict} in {p['room'] / GIB:.2f}")
    if settings.offload and p["kind"] == "cuda":
        print(f"  {'on the host':22}{p['host'] / GIB:11.2f}   {', '.join(STAYS)}")
    print(
        f"\nstep          {p['step_pairs']} pairs, {p['step_tokens']:,.0f} tokens; "
        f"micro-batches of each {each}: {p['microbatches']}, the fullest of {p['load'].tokens:,.0f} tokens (--microbatch-tokens {settings.microbatch_tokens})"
    )
    if p["largest"]:
        largest = f"{p['largest']:,}" + (": a whole step at once" if p["largest"] == p["most"] else "")
    else:
        largest = f"none is small enough; what helps: {', '.join(p['helps'])}"
    print(f"largest       --microbatch-tokens {largest}")
    print(f"work          {p['flops']:.3g} floating-point operations a step")
    if p["seconds"]:
        steps = p["steps"]
        run = f"; {steps:,} steps in {duration(steps * p['seconds'])}" if steps else ""
        share = f"{settings.mfu:.0%} of {p['gpus']} × {p['peak'] / 1e12:.0f} TFLOP/s (--mfu, --gpu-tflops)"
        print(f"time          {duration(p['seconds'])} a step at {share}{run}")
    else:
        print(f"time          unknown: pass --gpu-tflops, what a {each} does at its best")
