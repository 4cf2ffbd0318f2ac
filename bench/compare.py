"""How fast and how lean, side by side: this project and TRL, or SimPO and DPO, on the same pairs in the same run.

    python bench/compare.py --model DIR --data FILE --objective simpo          this project and TRL's CPOTrainer
    python bench/compare.py --model DIR --data FILE --objective dpo            … and TRL's DPOTrainer
    python bench/compare.py --model DIR --shape capybara --max-length 2048     on made-up pairs of known lengths
    python bench/compare.py --random llama3-8b --shape ultrafeedback           on random weights of that shape, too
    python bench/compare.py --model DIR --data FILE --peer self                SimPO, DPO online, DPO cached (Fig. 4d)
    python bench/compare.py --model DIR --data FILE --switches                 what each design decision brings
    python bench/compare.py … --ours "" --ours "--keep-products all"           this project twice, with other flags

Every run is a process of its own, and runs alternate (A B A B …), so that a machine that slows down slows both sides.
The same on both sides: checkpoint, tokens, order, pairs per step, forward passes per step, dtype, activation
checkpointing, AdamW. Ours is `train.py` itself, timed by its own metrics.jsonl. The first step of a run warms up and is
not counted; nor are loading, tokenizing, saving, and a cached reference's pass before training. Memory is the most that
the process ever held until its last step: resident on a CPU, allocated on a GPU.

bf16 means float32 master weights and bfloat16 arithmetic on both sides: FSDP2's mixed precision here, autocast in TRL
(`bf16=True` on weights loaded in float32). `--trl-weights bf16` loads TRL's weights in bfloat16: leaner, but AdamW then
adds its small steps to bfloat16 weights, which is other mathematics.

"Of the ceiling": floating-point operations that the mathematics needs (each prompt once, no recomputation, the policy
alone; `train.train_flops`) per second, as a share of what one large matrix product reached between the runs; MFU: as a
share of what the GPU's data sheet promises.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import data  # noqa: E402
import workload  # noqa: E402
from model import Config  # noqa: E402
from plan import peak_flops, train_flops  # noqa: E402
from switches import VARIANTS  # noqa: E402
from tokenizing import cpu  # noqa: E402

LOSS = {"simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5}, "dpo": {"beta": 0.1}}
LR = 1e-6
MANY = 400  # pairs by which to judge how usual those of a comparison are
AGREEMENT = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of the first step's loss and log-probabilities: DPO's loss is ln 2
VERSIONS = ("torch", "transformers", "trl")

# seconds of every step; loss and logps (of chosen and rejected, in the mean; per token for SimPO) of the first;
# peak_gib. Or `unavailable`: why there is no run.
Run = dict


@dataclass
class Contender:
    name: str
    run: Callable[[Path], Run]  # in an empty folder


def our_run(flags: argparse.Namespace, pairs: Path, objective: str, reference: str, more: str, folder: Path) -> Run:
    """`train.py` on the pairs, with `more` flags, and what its metrics say."""
    settings = {
        "model": flags.model, "data": pairs, "objective": objective, "reference": reference, "out": folder / "run",
        "dtype": flags.dtype, "device": flags.device, "max-length": flags.max_length, "batch-size": flags.batch_size,
        "microbatch-tokens": flags.microbatch_tokens, "lr": LR, "lr-schedule": "constant", "warmup-ratio": 0.0,
    } | {name.replace("_", "-"): value for name, value in LOSS[objective].items()}  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    arguments += ["--no-shuffle"] + ["--chat-template=none"] * bool(flags.shape)
    arguments += ["--no-activation-checkpointing"] * (not flags.activation_checkpointing) + shlex.split(more)
    start(ROOT / "train.py", *arguments)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": [flags.batch_size / row["pairs_per_second"] for row in rows],
        "loss": rows[0]["loss"],
        "logps": [rows[0]["avg_" * (objective == "simpo") + f"logps/{name}"] for name in ("chosen", "rejected")],
        "peak_gib": rows[-1]["peak_memory_gib"],
    }


def trl_run(flags: argparse.Namespace, trees: list[data.Tree], padding_free: bool, folder: Path) -> Run:
    """TRL's trainer on the same tokens, see peer.py."""
    if padding_free and flags.device == "cpu":
        return {"unavailable": "it needs FlashAttention, which needs a GPU"}
    more = {"lr": LR, "loss": LOSS[flags.objective], "weights": flags.trl_weights, "padding_free": padding_free}
    start(ROOT / "bench" / "peer.py", write_job(flags, trees, folder, more), folder / "result.json")
    return json.loads((folder / "result.json").read_text())


def switch_run(flags: argparse.Namespace, trees: list[data.Tree], variant: str, folder: Path) -> Run:
    """Forward and backward in one of the layouts of switches.py."""
    return json.loads(start(ROOT / "bench" / "switches.py", variant, write_job(flags, trees, folder)).splitlines()[-1])


def write_job(flags: argparse.Namespace, trees: list[data.Tree], folder: Path, more: dict | None = None) -> Path:
    """What a process of ours or a peer's is to do, on which token ids."""
    job = vars(flags) | {"model": str(flags.model), "folder": str(folder), "out": None}
    job["pairs"] = [[t.prompt.tolist(), *(r.tolist() for r in t.responses)] for t in trees]
    (folder / "job.json").write_text(json.dumps(job | (more or {})))
    return folder / "job.json"


def start(script: Path, *arguments) -> str:
    """What a Python script prints; where it fails, so does the comparison."""
    process = subprocess.run([sys.executable, script, *arguments], check=False, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"compare.py: {script} failed:\n{process.stderr[-2000:]}")
    return process.stdout


def gemm_flops(device: str, dtype: str) -> float:
    """Floating-point operations a second of one large matrix product: the best of a few."""
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def microbatch_tokens(trees: list[data.Tree], batch_size: int, microbatch: int) -> int:
    """The least budget with which no step takes more forward passes than a peer's, of `microbatch` pairs each."""
    sizes = [len(tree) for tree in trees]
    steps = [sizes[i : i + batch_size] for i in range(0, len(sizes), batch_size)]
    budget = 64
    while any(len(data.plan(step, 1, budget)) > batch_size // microbatch for step in steps):
        budget += 64
    return budget


def padded(trees: list[data.Tree], microbatch: int) -> list[data.Tree]:
    """What a peer computes: a row for every response, behind its prompt, and a pass's rows as long as the longest."""
    rows = []
    for i in range(0, len(trees), microbatch):
        share = trees[i : i + microbatch]
        lengths = [len(tree.prompt) + len(response) for tree in share for response in tree.responses]
        rows += [data.Tree(np.zeros(0, int), (np.zeros(max(lengths), int),), "")] * len(lengths)
    return rows


def spread(values: list[float], digits: str) -> str:
    """Median (least–most)."""
    if len(values) == 1:
        return f"{values[0]:{digits}}"
    return f"{statistics.median(values):{digits}} ({min(values):{digits}}–{max(values):{digits}})"


def compare(
    flags: argparse.Namespace, trees: list[data.Tree], contenders: list[Contender], comparisons: list[tuple[int, int]]
) -> str:
    """Run all in turns; the table, and how the contenders of each of `comparisons` relate, as Markdown."""
    steady = trees[flags.batch_size :]
    flops = train_flops(Config.from_folder(flags.model), steady)
    answers = sum(len(r) for tree in steady for r in tree.responses)
    runs: list[list[Run]] = [[] for _ in contenders]
    ceilings = []
    for round in range(flags.rounds):
        ceilings.append(gemm_flops(flags.device, flags.dtype))
        for contender, mine in zip(contenders, runs):
            if mine and "unavailable" in mine[-1]:
                continue
            with tempfile.TemporaryDirectory() as folder:
                mine.append(contender.run(Path(folder)))
            if "unavailable" not in mine[-1]:
                mine[-1]["pairs"] = len(steady) / sum(mine[-1]["seconds"][1:])
                print(f"round {round + 1}: {contender.name}: {mine[-1]['pairs']:.4f} pairs/s", file=sys.stderr)
    ceiling = max(ceilings)
    promised = peak_flops(torch.device(flags.device))
    mfu = " | MFU" if promised else ""
    lines = [f"| | pairs/s | response tokens/s | peak GiB | of the ceiling{mfu} | loss of step 1 |"]
    lines += ["|---" * (7 if promised else 6) + "|"]
    for contender, mine in zip(contenders, runs):
        if "unavailable" in mine[-1]:
            lines.append(f"| {contender.name} | – not run: {mine[-1]['unavailable']} | | | | |")
            continue
        rate = [run["pairs"] for run in mine]
        tokens = statistics.median(rate) * answers / len(steady)
        reached = statistics.median(rate) * flops / len(steady)
        shares = " | ".join(f"{reached / most:.0%}" for most in (ceiling, promised) if most)
        loss = mine[0]["loss"]
        peaks = spread([run["peak_gib"] for run in mine], ".2f")
        numbers = f"{spread(rate, '.4f')} | {tokens:.0f} | {peaks} | {shares} | {loss:.6f}"
        lines.append(f"| {contender.name} | {numbers} |")
    lines += ["", f"Ceiling: {ceiling / 1e9:.0f} GFLOP/s in {flags.dtype}. {flags.rounds} rounds: median (least–most)."]
    for a, b in comparisons:
        if any("unavailable" in runs[i][-1] for i in (a, b)):
            continue
        both = list(zip(runs[a], runs[b]))
        speed = spread([x["pairs"] / y["pairs"] for x, y in both], ".2f")
        clock = spread([y["pairs"] / x["pairs"] for x, y in both], ".2f")
        memory = spread([x["peak_gib"] / y["peak_gib"] for x, y in both], ".2f")
        text = f"- {contenders[a].name} : {contenders[b].name}: pairs/s × {speed}, time × {clock}, memory × {memory}"
        if all("logps" in runs[i][0] for i in (a, b)) and flags.peer == "trl":
            x, y = (runs[i][0] for i in (a, b))
            loss, *logps = (abs(p / q - 1) for p, q in zip((x["loss"], *x["logps"]), (y["loss"], *y["logps"])))
            text += f"; at step 1 losses differ by {loss:.0e}, log-probabilities by {max(logps):.0e}"
            text += " – THE SIDES DO NOT COMPUTE THE SAME" * (max(loss, *logps) > AGREEMENT[flags.dtype])
        lines.append(text)
    return "\n".join(lines)


def describe(flags: argparse.Namespace, trees: list[data.Tree], many: list[data.Tree]) -> str:
    """What was compared, on what, where: the paragraphs above a table. many: a larger sample of the same kind."""
    device = torch.cuda.get_device_name() if flags.device == "cuda" else f"{cpu()}, {os.cpu_count()} cores"
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS if installed(name))
    prompt = statistics.median(len(t.prompt) for t in trees)
    chosen, rejected = (statistics.median(len(t.responses[i]) for t in trees) for i in (0, 1))
    passes = -(-flags.batch_size // flags.microbatch)
    config = Config.from_folder(flags.model)
    more = lambda trees: train_flops(config, padded(trees, flags.microbatch)) / train_flops(config, trees)
    return f"""{date.today()}; {device}, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f} before; \
Python {platform.python_version()}, {versions}.

    python bench/compare.py {shlex.join(sys.argv[1:])}

{flags.steps} steps of {flags.batch_size} pairs, the first not counted, {passes} forward passes each (here of \
{flags.microbatch_tokens} tokens at most); medians of {prompt:.0f} tokens a prompt, {chosen:.0f} chosen, \
{rejected:.0f} rejected, {sum(map(len, trees)) / len(trees):.0f} a pair in the mean. Padded to rows, what is counted takes \
{more(trees[flags.batch_size :]):.2f} times the floating-point operations ({more(many):.2f} in {len(many)} pairs of this kind).

"""


def installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:
        return False


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder")
    model.add_argument("--random", choices=workload.MODELS, help="random weights of this shape; goes with --shape")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="FILE", help="pairs, in any format that train.py reads, in a seeded order")
    source.add_argument("--shape", choices=workload.SHAPES, help="made-up pairs with this set's lengths")
    add("--objective", choices=("simpo", "dpo"), default="simpo")
    add("--reference", choices=("online", "cached"), default="online", help="DPO's, on both sides (default: online)")
    add("--peer", choices=("trl", "self"), default="trl", help="self: SimPO and DPO, both ours (default: trl)")
    add("--switches", action="store_true", help="instead: from a padded rectangle to this project, switch by switch")
    add("--dtype", choices=("fp32", "bf16"), default="fp32")
    add("--trl-weights", choices=("fp32", "bf16"), default="fp32", help="what TRL keeps its weights in (default: fp32)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--max-length", type=int, default=1024, metavar="N", help="tokens of prompt and response (default: 1024)")
    add("--batch-size", type=int, default=8, metavar="N", help="pairs a step (default: 8)")
    add("--microbatch", type=int, default=2, metavar="N", help="pairs a forward pass of the peer (default: 2)")
    add("--microbatch-tokens", type=int, metavar="N", help="ours; default: the least that takes no more passes a step")
    add("--activation-checkpointing", action=argparse.BooleanOptionalAction, default=True, help="on both sides")
    add("--steps", type=int, default=4, metavar="N", help="steps a run, of which the first warms up (default: 4)")
    add("--rounds", type=int, default=3, metavar="N", help="runs of each side, in turns (default: 3)")
    add("--seed", type=int, default=0, help="which pairs (default: 0)")
    add("--out", type=Path, metavar="FILE", help="also append the result to this file, e.g. bench/RESULTS.md")
    add("--ours", action="append", metavar="FLAGS", help="run train.py with these flags; each --ours is a run of its own")
    flags = parser.parse_args()
    flags.ours = flags.ours or [""]
    if flags.random and not flags.shape:
        parser.error("--random: its tokenizer is the toy's, whose words only --shape knows")
    if flags.batch_size % flags.microbatch:
        parser.error("--batch-size: not a multiple of --microbatch")
    if flags.steps < 2:
        parser.error("--steps: the first step warms up, so at least 2")
    return flags


def main() -> None:
    flags = read_flags()
    try:
        with tempfile.TemporaryDirectory() as folder:
            if flags.random:
                flags.model = Path(folder) / flags.random
                workload.random_checkpoint(flags.model, workload.MODELS[flags.random])
            tokenizer = data.Tokenizer(flags.model, "" if flags.shape else None)
            count = flags.steps * flags.batch_size
            if flags.shape:
                lengths = workload.shape_lengths(flags.shape, max(2 * count, MANY), flags.seed)
                records = workload.shaped_records(tokenizer, lengths, flags.seed)
            else:
                records = workload.drawn_records(flags.data, flags.seed)
            pairs, longest_prompt = Path(folder) / "pairs.jsonl", min(1800, flags.max_length * 1800 // 2048)
            kept, many = workload.tokenized(records, max(count, MANY), tokenizer, flags.max_length, longest_prompt)
            trees = workload.write_pairs(kept, many, count, pairs)
            flags.microbatch_tokens = flags.microbatch_tokens or microbatch_tokens(
                trees, flags.batch_size, flags.microbatch
            )
            head = describe(flags, trees, many)
            table = compare(flags, trees, *field(flags, pairs, trees))
    except data.DataError as e:
        sys.exit(f"compare.py: error: {e}")
    print(head + table)
    if flags.out:
        what = f"{flags.objective}, this project and TRL" if flags.peer == "trl" else "SimPO and DPO"
        what = "Switch by switch" if flags.switches else what
        on = flags.shape or Path(flags.data).name
        title = f"## {what}, {flags.model.name}, {on}, {flags.dtype}\n\n"
        with open(flags.out, "a") as file:
            file.write(("\n" if file.tell() else "") + title + head + table + "\n")


def field(
    flags: argparse.Namespace, pairs: Path, trees: list[data.Tree]
) -> tuple[list[Contender], list[tuple[int, int]]]:
    """Who runs, and who is compared with whom."""
    if flags.switches:
        layout = lambda variant: lambda folder: switch_run(flags, trees, variant, folder)
        return [Contender(name, layout(name)) for name in VARIANTS], [(i, 0) for i in range(1, len(VARIANTS))]

    def ours(name: str, more: str, *kind: str) -> Contender:
        return Contender(f"{name} {more}".rstrip(), lambda folder: our_run(flags, pairs, *kind, more, folder))

    if flags.peer == "self":
        kinds = {"SimPO": ("simpo", "online"), "DPO online": ("dpo", "online"), "DPO cached": ("dpo", "cached")}
        contenders = [ours(name, more, *kind) for more in flags.ours for name, kind in kinds.items()]
        return contenders, [pair for i in range(0, len(contenders), 3) for pair in ((i, i + 1), (i + 2, i))]
    theirs = lambda padding_free: lambda folder: trl_run(flags, trees, padding_free, folder)
    contenders = [ours("this project", more, flags.objective, flags.reference) for more in flags.ours]
    contenders += [Contender("TRL", theirs(False))]
    if flags.objective == "dpo":
        contenders.append(Contender("TRL, padding_free", theirs(True)))
    count = len(flags.ours)
    return contenders, [(i, j) for i in range(count) for j in range(count, len(contenders))]


if __name__ == "__main__":
    main()
