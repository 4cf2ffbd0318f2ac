"""Compare speed and memory: this project with TRL, or SimPO with DPO, on the same pairs.

    python bench/compare.py --model DIR --data FILE --objective simpo
        this project and TRL's CPOTrainer
    python bench/compare.py --model DIR --data FILE --objective dpo
        this project and TRL's DPOTrainer
    python bench/compare.py --model DIR --shape capybara --max-length 2048
        on made-up pairs of known lengths
    python bench/compare.py --random llama3-8b --shape ultrafeedback
        on random weights of that shape, too
    python bench/compare.py --model DIR --data FILE --peer self
        SimPO, DPO online and DPO cached (Fig. 4d)
    python bench/compare.py --model DIR --data FILE --switches
        what each design decision brings
    python bench/compare.py … --ours "" --ours "--keep-products all"
        this project twice, with other flags
    python bench/compare.py … --best
        each side with its own fastest settings

Every run is a process of its own. Runs alternate (A B A B …), so that a machine that slows down
slows both sides. Both sides share the checkpoint, tokens, their order, pairs per step, forward
passes per step, dtype, activation checkpointing and AdamW. Ours is `train.py` itself, timed by its
own metrics.jsonl. The first step of a run is a warm-up and not counted. Loading, tokenizing, saving
and the pass that fills a cached reference are not counted either. Memory is the most that the
process held until its last step: resident on a CPU, allocated on a GPU.

bf16 means float32 master weights and bfloat16 arithmetic on both sides. That is FSDP2's mixed
precision in this project and autocast in TRL (`bf16=True` on weights loaded in float32).
`--trl-weights bf16` loads TRL's weights in bfloat16. That takes less memory, but AdamW then adds
its small steps to bfloat16 weights, which is other mathematics.

`--best` compares what users of each side would choose. It searches both sides' settings for the
fastest: pairs or tokens per forward pass, activation checkpointing, and the products that it keeps.
Then the fastest of TRL runs in turns with our fastest within TRL's memory, and within any memory.
See best.py for the search, which starts at --microbatch and --microbatch-tokens with checkpointing.

"Of the ceiling" counts the floating-point operations that the mathematics needs (`train_flops` in
model.py): each prompt once, no recomputation, the policy alone. They are a share of what one large
matmul reached between the runs; MFU is a share of the GPU's data sheet.
"""

import argparse
import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from subprocess import PIPE

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from best import Search, Stopped, Watch
from switches import VARIANTS
from tokenizing import cpu

import workload
from data import Pair, assign
from formats.checkpoint import read_config
from formats.errors import InputError
from formats.tokenizer import Tokenizer
from methods.objectives import OBJECTIVES
from model import Config, train_flops
from runtime.gpus import peak_flops

LOSS = {"simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5}, "dpo": {"beta": 0.1}}
LR = 1e-6
MANY = 400  # pairs that show how usual those of a comparison are
# Relative difference of the first step's loss and log-probabilities; DPO's loss is ln 2 there.
AGREEMENT = {"fp32": 1e-4, "bf16": 2e-2}
VERSIONS = ("torch", "transformers", "trl")

# A dict with `seconds` of every step, `loss` and `logps` of the first, and `peak_gib`; or with
# `unavailable`, the reason why there is no run. logps: mean chosen and rejected log-probabilities,
# per token for SimPO.
Run = dict


@dataclass
class Contender:
    name: str
    run: Callable[[Path], Run]  # in an empty folder


# --------------------------------------------------------------------------------------------------
# One run


def our_run(
    flags: argparse.Namespace,
    pairs_file: Path,
    objective: str,
    reference: str,
    more: str,
    folder: Path,
    watch: Watch | None = None,
) -> Run:
    """Run `train.py` on the pairs, with `more` flags, and read its metrics."""
    settings = {
        "model": flags.model,
        "data": pairs_file,
        "objective": objective,
        "out": folder / "run",
        "dtype": flags.dtype,
        "device": flags.device,
        "max_length": flags.max_length,
        "batch_size": flags.batch_size,
        "microbatch_tokens": flags.microbatch_tokens,
        "lr": LR,
        "lr_schedule": "constant",
        "warmup_ratio": 0.0,
        **LOSS[objective],
    }
    if OBJECTIVES[objective].needs_reference:
        settings["reference"] = reference
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    arguments += ["--no-shuffle"] + ["--chat-template=none"] * bool(flags.shape)
    arguments += ["--no-activation-checkpointing"] * (not flags.activation_checkpointing)
    metrics = folder / "run" / "metrics.jsonl"
    start(ROOT / "train.py", *arguments, *shlex.split(more), watch=watch, steps=metrics)
    lines = metrics.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    logps = "avg_logps" if objective == "simpo" else "logps"
    return {
        "seconds": [flags.batch_size / row["pairs_per_second"] for row in rows],
        "loss": rows[0]["loss"],
        "logps": [rows[0][f"{logps}/{name}"] for name in ("chosen", "rejected")],
        "peak_gib": rows[-1]["peak_memory_gib"],
    }


def trl_run(
    flags: argparse.Namespace,
    pairs: list[Pair],
    padding_free: bool,
    folder: Path,
    watch: Watch | None = None,
) -> Run:
    """Run TRL's trainer on the same tokens, see peer.py."""
    if padding_free and flags.device == "cpu":
        return {"unavailable": "it needs FlashAttention, which needs a GPU"}
    more = {"lr": LR, "loss": LOSS[flags.objective], "weights": flags.trl_weights}
    job = write_job(flags, pairs, folder, more | {"padding_free": padding_free})
    result, steps = folder / "result.json", folder / "steps"
    start(ROOT / "bench" / "peer.py", job, result, watch=watch, steps=steps)
    return json.loads(result.read_text())


def switch_run(flags: argparse.Namespace, pairs: list[Pair], variant: str, folder: Path) -> Run:
    """Run forward and backward in one of the variants of switches.py."""
    job = write_job(flags, pairs, folder)
    return json.loads(start(ROOT / "bench" / "switches.py", variant, job).splitlines()[-1])


def write_job(
    flags: argparse.Namespace, pairs: list[Pair], folder: Path, more: dict | None = None
) -> Path:
    """Write what another process must do, on which token ids; return the file."""
    job = vars(flags) | {"model": str(flags.model), "folder": str(folder), "out": None}
    job["pairs"] = [[p.prompt.tolist(), *(r.tolist() for r in p.responses)] for p in pairs]
    (folder / "job.json").write_text(json.dumps(job | (more or {})))
    return folder / "job.json"


def start(
    script: Path, *arguments: str | Path, watch: Watch | None = None, steps: Path | None = None
) -> str:
    """Return what a Python script prints; exit if it fails.

    watch: looks at the process, which adds a line to the file `steps` at the end of every step.

    Raises:
        Stopped: the watch stopped it, or it ran out of memory under a watch.
    """
    command = [sys.executable, script, *arguments]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) as process:
        while True:
            try:
                printed, errors = process.communicate(timeout=0.2 if watch else None)
                break
            except subprocess.TimeoutExpired:
                try:
                    watch.look(process.pid, steps)
                except Stopped:
                    process.kill()
                    raise
    if watch and (process.returncode == -signal.SIGKILL or "OutOfMemoryError" in errors):
        watch.peak_gib = math.inf
        raise Stopped("it ran out of memory")
    if process.returncode:
        sys.exit(f"compare.py: {script} failed:\n{errors[-2000:]}")
    return printed


# --------------------------------------------------------------------------------------------------
# What both sides compute


def gemm_flops(device: str, dtype: str) -> float:
    """Return the floating-point operations per second of one large matmul, the best of a few."""
    size = 8192 if device == "cuda" else 2048
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=kind)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def microbatch_tokens(pairs: list[Pair], batch_size: int, microbatch: int) -> int:
    """Return the smallest budget with which no step takes more forward passes than a peer's.

    microbatch: pairs per forward pass of the peer. Budgets are multiples of 64 tokens.
    """
    sizes = [pair.tokens for pair in pairs]
    steps = [sizes[i : i + batch_size] for i in range(0, len(sizes), batch_size)]
    budget = 64
    while any(len(assign(step, 1, budget)) > batch_size // microbatch for step in steps):
        budget += 64
    return budget


def padded(pairs: list[Pair], microbatch: int) -> list[Pair]:
    """Return what a peer computes: a row per response, as long as the longest of its pass.

    Each row is a pair without a prompt. microbatch: pairs per forward pass.
    """
    rows = []
    for i in range(0, len(pairs), microbatch):
        share = pairs[i : i + microbatch]
        lengths = [len(pair.prompt) + len(r) for pair in share for r in pair.responses]
        row = Pair(np.zeros(0, int), (np.zeros(max(lengths), int),))
        rows += [row] * len(lengths)
    return rows


def flops(config: Config, pairs: list[Pair]) -> float:
    return sum(train_flops(config, pair) for pair in pairs)


# --------------------------------------------------------------------------------------------------
# The comparison


def compare(
    flags: argparse.Namespace,
    pairs: list[Pair],
    contenders: list[Contender],
    comparisons: list[tuple[int, int]],
) -> str:
    """Run all contenders in turns; return a table and their ratios, as Markdown.

    comparisons: indices of the contenders that are compared with each other.
    """
    steady = pairs[flags.batch_size :]
    runs: list[list[Run]] = [[] for _ in contenders]
    ceilings = []
    for n in range(1, flags.rounds + 1):
        ceilings.append(gemm_flops(flags.device, flags.dtype))
        for contender, own in zip(contenders, runs):
            if own and "unavailable" in own[-1]:
                continue
            with tempfile.TemporaryDirectory() as folder:
                own.append(contender.run(Path(folder)))
            if "unavailable" not in own[-1]:
                rate = own[-1]["pairs"] = len(steady) / sum(own[-1]["seconds"][1:])
                print(f"round {n}: {contender.name}: {rate:.4f} pairs/s", file=sys.stderr)
    ceiling = max(ceilings)
    names = [contender.name for contender in contenders]
    lines = table(flags, steady, names, runs, ceiling)
    rounds = f"{flags.rounds} rounds: median (least–most)."
    lines += ["", f"Ceiling: {ceiling / 1e9:.0f} GFLOP/s in {flags.dtype}. {rounds}"]
    for a, b in comparisons:
        if not any("unavailable" in runs[i][-1] for i in (a, b)):
            agreement = AGREEMENT[flags.dtype] if flags.peer == "trl" else None
            lines.append(f"- {names[a]} : {names[b]}: {ratios(runs[a], runs[b], agreement)}")
    return "\n".join(lines)


def table(
    flags: argparse.Namespace,
    steady: list[Pair],
    names: list[str],
    runs: list[list[Run]],
    ceiling: float,
) -> list[str]:
    """Return the lines of a table with a row per contender. steady: the pairs that are counted."""
    promised = peak_flops(torch.device(flags.device))
    mfu = " | MFU" if promised else ""
    lines = [f"| | pairs/s | response tokens/s | peak GiB | of the ceiling{mfu} | loss of step 1 |"]
    lines += ["|---" * (7 if promised else 6) + "|"]
    flops_per_pair = flops(read_config(flags.model), steady) / len(steady)
    tokens_per_pair = sum(len(r) for pair in steady for r in pair.responses) / len(steady)
    for name, own in zip(names, runs):
        if "unavailable" in own[-1]:
            lines.append(f"| {name} | – not run: {own[-1]['unavailable']} | | | | |")
            continue
        rates = [run["pairs"] for run in own]
        reached = statistics.median(rates) * flops_per_pair
        columns = [
            spread(rates, ".4f"),
            f"{statistics.median(rates) * tokens_per_pair:.0f}",
            spread([run["peak_gib"] for run in own], ".2f"),
            *(f"{reached / most:.0%}" for most in (ceiling, promised) if most),
            f"{own[0]['loss']:.6f}",
        ]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return lines


def ratios(a: list[Run], b: list[Run], agreement: float | None) -> str:
    """Return the ratios of speed and memory, and whether both sides compute the same.

    agreement: the largest relative difference that rounding explains; None: do not compare.
    """
    both = list(zip(a, b))
    speed = spread([x["pairs"] / y["pairs"] for x, y in both], ".2f")
    clock = spread([y["pairs"] / x["pairs"] for x, y in both], ".2f")
    memory = spread([x["peak_gib"] / y["peak_gib"] for x, y in both], ".2f")
    text = f"pairs/s × {speed}, time × {clock}, memory × {memory}"
    x, y = a[0], b[0]
    if agreement and "logps" in x and "logps" in y:
        numbers = zip((x["loss"], *x["logps"]), (y["loss"], *y["logps"]))
        loss, *logps = (abs(p / q - 1) for p, q in numbers)
        text += f"; at step 1 losses differ by {loss:.0e}, log-probabilities by {max(logps):.0e}"
        if max(loss, *logps) > agreement:
            text += " – THE SIDES DO NOT COMPUTE THE SAME"
    return text


def spread(values: list[float], digits: str) -> str:
    """Return median (least–most)."""
    if len(values) == 1:
        return f"{values[0]:{digits}}"
    return f"{statistics.median(values):{digits}} ({min(values):{digits}}–{max(values):{digits}})"


def describe(flags: argparse.Namespace, pairs: list[Pair], many: list[Pair]) -> str:
    """Return the paragraphs above a table: what was compared, on what, and where.

    many: a larger sample of the same kind of pairs.
    """
    device = f"{cpu()}, {os.cpu_count()} cores"
    if flags.device == "cuda":
        device = torch.cuda.get_device_name()
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS if installed(name))
    prompt = statistics.median(len(pair.prompt) for pair in pairs)
    chosen, rejected = (statistics.median(len(pair.responses[i]) for pair in pairs) for i in (0, 1))
    mean = sum(pair.tokens for pair in pairs) / len(pairs)
    n = -(-flags.batch_size // flags.microbatch)
    passes = f"{n} forward pass{'es' * (n != 1)} per step (ours: at most "
    passes += f"{flags.microbatch_tokens} tokens each)"
    if flags.best:
        passes = f"at most {flags.memory_cap:.2f} GiB"
    config = read_config(flags.model)

    def padding(pairs: list[Pair]) -> float:
        return flops(config, padded(pairs, flags.microbatch)) / flops(config, pairs)

    return f"""{date.today()}; {device}, {torch.get_num_threads()} thread(s), load \
{os.getloadavg()[0]:.1f} before; Python {platform.python_version()}, {versions}.

    python bench/compare.py {shlex.join(sys.argv[1:])}

{flags.steps} steps of {flags.batch_size} pairs, the first not counted; {passes}. Median tokens: \
{prompt:.0f} per prompt, {chosen:.0f} chosen, {rejected:.0f} rejected; mean per pair: {mean:.0f}. \
Padding to rows takes {padding(pairs[flags.batch_size :]):.2f} times the \
floating-point operations in the counted steps ({padding(many):.2f} over {len(many)} pairs of \
this kind).

"""


def installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:
        return False


def field(
    flags: argparse.Namespace, pairs_file: Path, pairs: list[Pair]
) -> tuple[list[Contender], list[tuple[int, int]]]:
    """Return who runs, and the indices of those that are compared with each other."""
    if flags.switches:
        variants = [Contender(name, partial(switch_run, flags, pairs, name)) for name in VARIANTS]
        return variants, [(i, 0) for i in range(1, len(VARIANTS))]

    def ours(name: str, more: str, objective: str, reference: str) -> Contender:
        work = partial(our_run, flags, pairs_file, objective, reference, more)
        return Contender(f"{name} {more}".rstrip(), work)

    if flags.peer == "self":
        kinds = {
            "SimPO": ("simpo", "online"),
            "DPO online": ("dpo", "online"),
            "DPO cached": ("dpo", "cached"),
        }
        contenders = [
            ours(name, more, *kind) for more in flags.ours for name, kind in kinds.items()
        ]
        starts = range(0, len(contenders), 3)
        return contenders, [pair for i in starts for pair in ((i, i + 1), (i + 2, i))]
    kind = flags.objective, flags.reference
    contenders = [ours("this project", more, *kind) for more in flags.ours]
    contenders += [Contender("TRL", partial(trl_run, flags, pairs, False))]
    if flags.objective == "dpo":
        contenders += [Contender("TRL, padding_free", partial(trl_run, flags, pairs, True))]
    count = len(flags.ours)
    return contenders, [(i, j) for i in range(count) for j in range(count, len(contenders))]


# --------------------------------------------------------------------------------------------------
# Each side at its best

KEPT = {  # what backward reads instead of computing it again, from the least memory to the most
    "attention kept": "--keep-products none",
    "attention's products kept": "--keep-products attention",
    "all products kept": "--keep-products all",
    "no checkpointing": "--no-activation-checkpointing",
}


def ours_with(flags: argparse.Namespace, pairs_file: Path, kept: str, tokens: int) -> Contender:
    more = f"--microbatch-tokens {tokens} {KEPT[kept]} {flags.ours[0]}"
    work = partial(our_run, flags, pairs_file, flags.objective, flags.reference, more)
    return Contender(f"this project, {tokens:,} tokens per pass, {kept}", work)


def trl_with(
    flags: argparse.Namespace, pairs: list[Pair], checkpointing: bool, padding: bool, count: int
) -> Contender:
    changes = {"activation_checkpointing": checkpointing, "microbatch": count}
    changed = argparse.Namespace(**vars(flags) | changes)
    name = f"TRL, {count} pair{'s' * (count > 1)} per pass"
    name += ", padding_free" * (not padding) + ", no checkpointing" * (not checkpointing)
    return Contender(name, partial(trl_run, changed, pairs, not padding))


def searched_run(
    flags: argparse.Namespace,
    counted: int,
    side: Callable[..., Contender],
    tried: list[str],
    settings: tuple,
    rival: list[float],
) -> Run:
    """Run a side with these settings for its `Search`; add a line on the outcome to `tried`.

    counted: pairs of the steps after the warm-up.
    """
    contender = side(*settings)
    watch = Watch(math.inf if flags.device == "cuda" else flags.memory_cap, rival)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = contender.run(Path(folder), watch=watch)
    except Stopped as e:
        run = {"unavailable": str(e), "peak_gib": watch.peak_gib}
    if "unavailable" in run:
        run, outcome = {"peak_gib": 0.0} | run, f"stopped, {run['unavailable']}"
    else:
        run |= {"pairs": counted / sum(run["seconds"][1:]), "ends": watch.ends}
        outcome = f"{run['pairs']:.4f} pairs/s, {run['peak_gib']:.2f} GiB"
    tried.append(f"- {contender.name}: {outcome}")
    print(tried[-1], file=sys.stderr)
    return run


def best_of_each(
    flags: argparse.Namespace, pairs_file: Path, pairs: list[Pair]
) -> tuple[list[Contender], list[tuple[int, int]], list[str]]:
    """Search both sides; return the fastest of each, who is compared, and a line for every run.

    Ours are the fastest within the memory that the fastest of TRL takes, and within any memory.
    """
    sizes = [pair.tokens for pair in pairs]
    steps = [sum(sizes[i : i + flags.batch_size]) for i in range(0, len(sizes), flags.batch_size)]
    budgets = [2048]
    while budgets[-1] < max(steps):
        budgets.append(2 * budgets[-1])
    counts = [n for n in range(1, flags.batch_size + 1) if flags.batch_size % n == 0]
    paddings = [False, True] if flags.objective == "dpo" and flags.device == "cuda" else [True]
    tried: list[str] = []

    def search(side: Callable[..., Contender], *axes: list) -> Search:
        counted = len(pairs) - flags.batch_size
        return Search([*axes], partial(searched_run, flags, counted, side, tried))

    trl_side, our_side = partial(trl_with, flags, pairs), partial(ours_with, flags, pairs_file)
    trl = search(trl_side, [True, False], paddings, counts)
    ours = search(our_side, list(KEPT), budgets)
    trl_best = trl.fastest((0, len(paddings) - 1, counts.index(flags.microbatch)), flags.memory_cap)
    if trl_best is None:
        sys.exit(
            f"compare.py: TRL does not run in --memory-cap {flags.memory_cap:.2f} GiB:\n{tried[-1]}"
        )
    start = 0, sum(budget < flags.microbatch_tokens for budget in budgets[:-1])
    theirs = trl.runs[trl_best]["peak_gib"]
    limits = theirs, flags.memory_cap, theirs  # what a search within more memory finds may fit
    _, anywhere, within = (ours.fastest(start, limit) for limit in limits)
    points = dict.fromkeys(point for point in (within, anywhere) if point)
    contenders = [our_side(*ours.settings(point)) for point in points]
    contenders += [trl_side(*trl.settings(trl_best))]
    return contenders, [(i, len(points)) for i in range(len(points))], tried


# --------------------------------------------------------------------------------------------------
# The command


def read_flags() -> argparse.Namespace:
    """Parse the command line; exit with status 2 and one line on a usage error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder")
    text = "random weights of this shape; needs --shape"
    model.add_argument("--random", choices=workload.MODELS, help=text)
    source = parser.add_mutually_exclusive_group(required=True)
    text = "pairs, in any format that train.py reads; their order is seeded"
    source.add_argument("--data", metavar="FILE", help=text)
    text = "made-up pairs with this set's lengths"
    source.add_argument("--shape", choices=workload.SHAPES, help=text)

    def add(flag: str, text: str, **options) -> None:
        parser.add_argument(flag, help=text, **options)

    cuda, both = torch.cuda.is_available(), argparse.BooleanOptionalAction
    dtypes, number = ("fp32", "bf16"), {"type": int, "metavar": "N"}
    add("--objective", "default: simpo", choices=("simpo", "dpo"), default="simpo")
    text = "DPO's, on both sides (default: online)"
    add("--reference", text, choices=("online", "cached"), default="online")
    text = "self: SimPO and DPO, both ours (default: trl)"
    add("--peer", text, choices=("trl", "self"), default="trl")
    text = "instead: from a padded rectangle to this project, switch by switch"
    add("--switches", text, action="store_true")
    text = "instead: the fastest settings of each side, searched for"
    add("--best", text, action="store_true")
    text = "most memory of a run in --best (default: four fifths of the device's)"
    add("--memory-cap", text, type=float, metavar="GIB")
    add("--dtype", "default: fp32", choices=dtypes, default="fp32")
    text = "dtype of TRL's weights (default: fp32)"
    add("--trl-weights", text, choices=dtypes, default="fp32")
    text = "default: cuda if available, else cpu"
    add("--device", text, choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--max-length", "tokens of prompt plus response (default: 1024)", default=1024, **number)
    add("--batch-size", "pairs per step (default: 8)", default=8, **number)
    add("--microbatch", "pairs per forward pass of the peer (default: 2; --best: 1)", **number)
    text = "ours; default: the smallest that takes no more passes per step (--best: 8192)"
    add("--microbatch-tokens", text, **number)
    add("--activation-checkpointing", "on both sides", action=both, default=True)
    add("--steps", "steps per run; the first is a warm-up (default: 4)", default=4, **number)
    add("--rounds", "runs of each side, in turns (default: 3)", default=3, **number)
    add("--seed", "which pairs (default: 0)", type=int, default=0)
    text = "also append the result to this file, such as bench/RESULTS.md"
    add("--out", text, type=Path, metavar="FILE")
    text = "run train.py with these flags; each --ours is a run of its own"
    add("--ours", text, action="append", metavar="FLAGS")
    flags = parser.parse_args()
    flags.ours = flags.ours or [""]
    flags.microbatch = flags.microbatch or (1 if flags.best else 2)
    flags.memory_cap = flags.memory_cap or 0.8 * memory_gib(flags.device)
    if flags.best:
        flags.microbatch_tokens = flags.microbatch_tokens or 8192
    if flags.random and not flags.shape:
        parser.error("--random needs --shape: it has the toy's tokenizer, made for no data set")
    if flags.batch_size % flags.microbatch:
        parser.error("--batch-size: not a multiple of --microbatch")
    if flags.steps < 2:
        parser.error("--steps: the first step is a warm-up, so at least 2 are needed")
    return flags


def memory_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def write_pairs(flags: argparse.Namespace, pairs_file: Path) -> tuple[list[Pair], list[Pair]]:
    """Write the pairs to compare on; return them, and a larger sample of the same kind."""
    tokenizer = Tokenizer(flags.model, "" if flags.shape else None)
    count = flags.steps * flags.batch_size
    if flags.shape:
        lengths = workload.shape_lengths(flags.shape, max(2 * count, MANY), flags.seed)
        records = workload.shaped_records(tokenizer, lengths, flags.seed)
    else:
        records = workload.drawn_records(flags.data, flags.seed)
    longest = flags.max_length, min(1800, flags.max_length * 1800 // 2048)  # as in train.py
    kept, many = workload.tokenized(records, max(count, MANY), tokenizer, *longest)
    return workload.write_pairs(kept, many, count, pairs_file), many


def main() -> None:
    flags = read_flags()
    try:
        with tempfile.TemporaryDirectory() as folder:
            if flags.random:
                flags.model = Path(folder) / flags.random
                workload.random_checkpoint(flags.model, workload.MODELS[flags.random])
            pairs_file = Path(folder) / "pairs.jsonl"
            pairs, many = write_pairs(flags, pairs_file)
            flags.microbatch_tokens = flags.microbatch_tokens or microbatch_tokens(
                pairs, flags.batch_size, flags.microbatch
            )
            head, tried = describe(flags, pairs, many), []
            if flags.best:
                *who, tried = best_of_each(flags, pairs_file, pairs)
            else:
                who = field(flags, pairs_file, pairs)
            result = compare(flags, pairs, *who)
    except InputError as e:
        sys.exit(f"compare.py: error: {e}")
    if tried:
        result += "\n\nThe search ran:\n\n" + "\n".join(tried)
    print(head + result)
    if flags.out:
        what = "SimPO and DPO"
        if flags.peer == "trl":
            what = f"{flags.objective}, this project and TRL" + ", each at its best" * flags.best
        if flags.switches:
            what = "Switch by switch"
        on = flags.shape or Path(flags.data).name
        title = f"## {what}, {flags.model.name}, {on}, {flags.dtype}\n\n"
        with open(flags.out, "a") as file:
            file.write(("\n" if file.tell() else "") + title + head + result + "\n")


if __name__ == "__main__":
    main()
