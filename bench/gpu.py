"""Measure on a GPU what no CPU can tell, part by part; on several GPUs, with torchrun.

    python bench/gpu.py all             every part, each below 8 minutes and in its own process
    python bench/gpu.py shapes          one part
    python bench/gpu.py summary         what has been measured so far, as a table
    python bench/gpu.py all --tiny      the same on a CPU with a tiny model, to test this script

    tests      tests/test_gpu.py, and the first steps of the toy
    shapes     SimPO, DPO online and DPO cached on 3 (or 1) billion parameters: pairs/s, MFU, and
               peak memory beside the prediction of --plan
    8b         the same on Llama 3 8B, where it fits
    switches   one billion parameters, one flag at a time
    trl        beside TRL, where it is installed
    decoding   sample.py: does cuDNN plan anew for every length? Beside transformers, if installed
    killed     a worker that dies, raises an error, or runs out of memory: when do the others end?

Weights are random and pairs are made up, with UltraFeedback's lengths: nothing is downloaded. Every
measurement appends a line to OUT, by default bench/gpu-results.jsonl, or gpu-results-tiny.jsonl
there with --tiny. A part that fails, or a package that is absent, is a line, too; the other parts
go on.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import decoding
from faults import status_within

import sample
import train
import workload
from formats.checkpoint import load
from formats.tokenizer import Tokenizer
from runtime.plan import GIB, make_plan
from runtime.settings import auto_dtype, read_command

LIMIT = 8 * 60  # seconds of a part
TINY = workload.MODELS["llama3.2-1b"] | {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,  # so train.py's report decodes few tokens
}
OBJECTIVES = {
    "SimPO": ["--objective=simpo"],
    "DPO online": ["--objective=dpo", "--beta=0.1", "--reference=online"],
    "DPO cached": ["--objective=dpo", "--beta=0.1", "--reference=cached"],
}
FITTED = ["--microbatch-tokens=auto", "--keep-products=auto"]
SWITCHES = [
    [],
    ["--compile"],
    ["--keep-products=attention"],
    ["--keep-products=all"],
    ["--keep-products=all", "--compile"],
    ["--no-activation-checkpointing"],
    ["--microbatch-tokens=2048"],
    ["--microbatch-tokens=16384"],
    FITTED,
    ["--gather-once"],
    ["--offload"],
    ["--flash=3"],
    ["--flash=4"],
]
FAULTS = ("killed", "with an error", "without memory")
GRACE = 35  # seconds for a process that is told to end


class Failed(Exception):
    """Reports that a measurement could not be made; the message says why."""

    @property
    def row(self) -> dict[str, str]:
        """Return what the file of results says of it."""
        return {type(self).__name__.lower(): str(self)}


class Skipped(Failed):
    """Reports that a measurement was not tried: something that it needs is not here."""


# --------------------------------------------------------------------------------------------------
# Processes


@dataclass
class Bench:
    """Runs the scripts of one part, and writes down what they measured."""

    part: str
    out: Path
    folder: Path  # for checkpoints and outputs
    tiny: bool
    began: float

    @property
    def left(self) -> float:
        """Return the seconds that this part still has."""
        return LIMIT - (time.time() - self.began)

    def note(self, name: str, **numbers: object) -> None:
        """Print a measurement, and append it to the file of results."""
        row = {"part": self.part, "name": name, "date": str(date.today()), **numbers}
        print(line_of(row), flush=True)
        with open(self.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def measure(self, name: str, work: Callable[[], dict]) -> dict:
        """Note what `work` measures, or why it could not; return its numbers, or {}."""
        try:
            if self.left < LIMIT / 8:
                raise Failed(f"not started: this part has {self.left:.0f} s left")
            numbers = work()
        except Failed as e:
            self.note(name, **e.row)
            return {}
        self.note(name, **numbers)
        return numbers

    def run(self, script: Path, *arguments: str, ranks: int = 1) -> str:
        """Return what a script prints in a process of its own, on as many ranks as asked.

        Raises:
            Failed: its status is not 0, or it takes longer than this part may.
        """
        log = self.folder / "log"
        began = time.time()
        if self.tiny:
            status = wait(fork(script, arguments, log), self.left)
        else:
            status = wait(launch(script, arguments, log, ranks), self.left)
        said = log.read_text(errors="replace")
        if status:
            error = next((x for x in reversed(said.splitlines()) if "rror" in x), said[-300:])
            raise Failed(f"status {status} after {time.time() - began:.0f} s: {error.strip()}")
        return said

    def tool(self, name: str, *arguments: object) -> dict:
        """Return what a function of TOOLS returns in a process of its own; ours leaves GPUs alone.

        Two processes on one GPU would share its memory.
        """
        said = self.run(Path(__file__), name, json.dumps(arguments, default=str))
        return json.loads(said.splitlines()[-1])


def launch(script: Path, arguments: tuple[str, ...], log: Path, ranks: int) -> int:
    """Start a script with Python, or on several ranks with torchrun; return its process id."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), str(script), *arguments]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    return process.pid


def fork(script: Path, arguments: tuple[str, ...], log: Path, **environment: str) -> int:
    """Start a script in a copy of this process, which has imported torch; return its id.

    A tiny run takes less time than importing torch. On a GPU, nothing is forked.
    """
    if pid := os.fork():
        return pid
    status: object = 1
    try:
        with open(log, "ab" if environment else "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= environment
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as e:
        status = e.code or 0
    finally:
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1)


def wait(pid: int, seconds: float) -> int:
    """Return a child's exit status, negative for a signal; end it and its own after `seconds`.

    torchrun's workers have sessions of their own. Told to end, it kills them after 30 seconds.
    """
    for patience, number in ((seconds, signal.SIGTERM), (GRACE, signal.SIGKILL)):
        if (status := status_within(pid, patience)) is not None:
            return status
        for end in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                end(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --------------------------------------------------------------------------------------------------
# Tools: what needs a GPU's memory, or may fail, runs in a process of its own


def about() -> dict:
    """Describe the machine."""
    gpus = torch.cuda.device_count()
    facts = {"torch": torch.__version__, "gpus": gpus, "device": "cpu", "memory_gib": 0.0}
    if gpus:
        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": properties.name, "memory_gib": properties.total_memory / GIB}
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(0)))
    return facts


def inputs(folder: str, shape: dict, count: int, shrink: int) -> dict:
    """Write a random checkpoint and pairs with UltraFeedback's lengths, divided by `shrink`."""
    model, pairs = Path(folder) / "model", Path(folder) / "pairs.jsonl"
    workload.random_checkpoint(model, shape)
    lengths = workload.shape_lengths("ultrafeedback", count, seed=0) // shrink + 2
    records = workload.shaped_records(Tokenizer(model, ""), lengths.clip(max=900), seed=0)
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"flags": [f"--model={model}", f"--data={pairs}", "--chat-template=none"]}


def planned(*flags: str) -> dict:
    """Return what --plan says of a run with these flags."""
    plan = make_plan(*read_command([*flags, "--plan"]))
    return {"planned_gib": plan.total / GIB, "of_gib": plan.machine.memory / GIB}


def decode(folder: str, tokens: int, transformers: bool) -> dict:
    """Return seconds per token of 16 sequences: the first time, and again; see `decoding_part`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if auto_dtype(device) == "bf16" else torch.float32
    model = load(Path(folder) / "model", device, dtype)
    prompts = [[5 + i] * (7 + 3 * i) for i in range(16)]
    found = {}
    for name, cudnn in (("as it is", False), ("with cuDNN", True)):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        if cudnn:
            torch.backends.cuda.enable_cudnn_sdp = lambda enabled: None  # `decode` would end it
        work = partial(sample.generate, model, prompts, set(), tokens)
        _, seconds = decoding.run_in_turns({name: work}, 3)
        per_token = [1000 * elapsed / tokens for elapsed, _ in seconds[name]]
        found[f"ms per step, {name}"] = [round(ms, 2) for ms in per_token]
    if transformers:
        from transformers import AutoModelForCausalLM

        peer = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype)
        work = partial(decoding.theirs, peer.to(device), prompts, 16, set(), tokens)
        _, seconds = decoding.run_in_turns({"theirs": work}, 3)
        found["ms per step, transformers"] = [
            round(1000 * elapsed / tokens, 2) for elapsed, _ in seconds["theirs"]
        ]
    return found


def worker(fault: str, rank: str, sign: str, *flags: str) -> dict:
    """Train, and meet a fault in the second backward pass of one rank; note when it came."""
    original, calls = train.backward, []

    def backward(loss: torch.Tensor) -> None:
        calls.append(1)
        if os.environ.get("RANK", "0") == rank and len(calls) == 2 and not Path(sign).exists():
            Path(sign).write_text(str(time.time()))
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            error = torch.OutOfMemoryError if fault == "without memory" else RuntimeError
            raise error("only here")
        original(loss)

    train.backward = backward
    train.runtime.signals.listen("train.py")
    sys.argv = ["train.py", *flags]
    train.main()
    return {}


TOOLS: dict[str, Callable[..., dict]] = {
    tool.__name__: tool for tool in (about, inputs, planned, decode, worker)
}

# --------------------------------------------------------------------------------------------------
# The parts


def tests_part(bench: Bench) -> None:
    """Run the tests that need a GPU, and the toy: on one GPU without torchrun, too."""

    def tests() -> dict:
        script = bench.folder / "tests.py"
        script.write_text("import pytest, sys\nsys.exit(pytest.main(sys.argv[1:]))\n")
        if not torch.cuda.device_count():
            raise Skipped("no GPU")
        said = bench.run(script, "-q", str(ROOT / "tests" / "test_gpu.py"))
        return {"said": said.splitlines()[-1]}

    bench.measure("tests/test_gpu.py", tests)
    flags = prepared(bench, "", 4, 2) if bench.tiny else ["--max-steps=4"]  # of the toy
    for ranks in sorted({1, torch.cuda.device_count() or 1}):
        first = partial(trained, bench, flags, ranks)
        bench.measure(f"first steps on {ranks}", first)


def trained(bench: Bench, flags: list[str], ranks: int | None = None) -> dict:
    """Return the speed and memory of a run of train.py; its first step is a warm-up."""
    out = Path(tempfile.mkdtemp(dir=bench.folder))
    ranks = ranks or torch.cuda.device_count() or 1
    said = bench.run(ROOT / "train.py", *flags, f"--out={out}/run", ranks=ranks)
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "pairs_per_second" in row]
    seconds = median(1 / row["pairs_per_second"] for row in steps[1:])
    numbers = {"pairs_per_second": 1 / seconds, "loss": steps[0]["loss"]}
    if "mfu" in steps[-1]:
        numbers["mfu"] = median(row["mfu"] for row in steps[1:])
    memory = {name: steps[-1][name] for name in steps[-1] if name.endswith("memory_gib")}
    auto = [line.partition(", which")[0] for line in said.splitlines() if line.startswith("auto:")]
    subprocess.run(["rm", "-r", out], check=True)  # a model of some gigabytes
    return numbers | memory | ({"auto": auto[0][6:]} if auto else {})


def beside_the_plan(bench: Bench, flags: list[str]) -> dict:
    """Return `trained`, with the memory that --plan predicts."""
    ranks = torch.cuda.device_count() or 1
    plan = {}
    if "--microbatch-tokens=auto" not in flags:
        plan = bench.tool("planned", *flags, f"--gpus={ranks}")
        if plan["planned_gib"] > plan["of_gib"]:
            need = f"{plan['planned_gib']:.1f} GiB of {plan['of_gib']:.1f}"
            raise Skipped(f"--plan says that it needs {need}")
    return trained(bench, flags) | plan


def prepared(bench: Bench, shape: str, batch: int, steps: int) -> list[str]:
    """Write a model of this shape and its pairs; return the flags of a run of a few steps."""
    shape_, shrink = (TINY, 16) if bench.tiny else (workload.MODELS[shape], 1)
    batch = 4 if bench.tiny else batch
    made = bench.tool("inputs", bench.folder, shape_, batch * steps, shrink)
    device = "cuda" if torch.cuda.device_count() and not bench.tiny else "cpu"
    common = [f"--device={device}", f"--batch-size={batch}", f"--max-steps={steps}"]
    return [*made["flags"], *common, "--lr-schedule=constant"]


def objectives(bench: Bench, shape: str, batch: int) -> None:
    """Train SimPO, DPO online and DPO cached; then SimPO with what fits."""
    flags = prepared(bench, shape, batch, steps=2 if bench.tiny else 5)
    for name, more in list(OBJECTIVES.items())[:: 2 if bench.tiny else 1]:
        bench.measure(f"{shape}, {name}", partial(beside_the_plan, bench, flags + more))
    more = OBJECTIVES["SimPO"] + FITTED
    bench.measure(f"{shape}, SimPO, auto", partial(beside_the_plan, bench, flags + more))


def shapes_part(bench: Bench) -> None:
    """Measure three billion parameters, or one on a small GPU: they take 16 bytes each."""
    facts = bench.tool("about")
    large = facts["memory_gib"] * max(1, facts["gpus"]) > 70
    objectives(bench, "llama3.2-3b" if large else "llama3.2-1b", batch=64)


def eight_part(bench: Bench) -> None:
    """Measure Llama 3 8B, of which --plan says whether it fits."""
    facts = bench.tool("about")
    if (total := facts["memory_gib"] * facts["gpus"]) < 130:
        raise Skipped(f"it takes about 130 GiB, and the GPUs have {total:.0f} together")
    objectives(bench, "llama3-8b", batch=32)


def switches_part(bench: Bench) -> None:
    """Change one flag at a time."""
    flags = prepared(bench, "llama3.2-1b", batch=64, steps=2 if bench.tiny else 5)
    for more in SWITCHES[3:4] if bench.tiny else SWITCHES:
        name = " ".join(more).replace("=", " ") or "as it is"
        bench.measure(f"llama3.2-1b, SimPO, {name}", partial(trained, bench, flags + more))


def trl_part(bench: Bench) -> None:
    """Run bench/compare.py on one GPU."""
    if not find_spec("trl"):
        raise Skipped("TRL is not installed: pip install -r bench/requirements.txt")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # on several, TRL would copy the model
    prepared(bench, "llama3.2-1b", batch=1, steps=1)
    dtype = "fp32" if bench.tiny else "bf16"
    flags = [f"--model={bench.folder}/model", "--shape=ultrafeedback", f"--dtype={dtype}"]
    flags += ["--ours=", f"--ours={' '.join(FITTED)}", "--rounds=1", "--steps=4"]
    flags += ["--batch-size=2", "--microbatch=1"] if bench.tiny else ["--batch-size=32"]

    def beside(objective: str) -> dict:
        more = f"--objective={objective}"
        said = bench.run(ROOT / "bench" / "compare.py", *flags, more)
        return {"said": re.findall(r"^- (.*)$|^(\| .*not run.*)$", said, re.M)}

    for objective in ("simpo", "dpo"):
        bench.measure(f"llama3.2-1b, {objective}, beside TRL", partial(beside, objective))


def decoding_part(bench: Bench) -> None:
    """Time steps of greedy decoding: three times each, of which the first meets new lengths.

    `sample.decode` keeps cuDNN out. If that plans its kernel for every length, "with cuDNN" is slow
    the first time.
    """
    prepared(bench, "llama3.2-1b", batch=1, steps=1)
    tokens, peer = 4 if bench.tiny else 128, bool(find_spec("transformers")) and not bench.tiny
    work = partial(bench.tool, "decode", bench.folder, tokens, peer)
    bench.measure("llama3.2-1b, 16 sequences", work)


def killed_part(bench: Bench) -> None:
    """Let one rank die, raise an error or run out of memory; say when and how the others end.

    On several GPUs the end is that of torchrun, which stops the others. Tiny runs have two ranks
    without torchrun; a single GPU has one.
    """
    flags = prepared(bench, "llama3.2-1b", batch=8, steps=3)
    for fault in FAULTS[:1] if bench.tiny else FAULTS:
        bench.measure(f"one rank {fault}", partial(after, bench, fault, flags))


def after(bench: Bench, fault: str, flags: list[str]) -> dict:
    """Return how long after a fault the other ranks, or torchrun, end, and with which status."""
    name = fault.replace(" ", "-")
    sign, log, out = (bench.folder / f"{name}.{kind}" for kind in ("sign", "log", "out"))
    ranks = 2 if bench.tiny else max(1, torch.cuda.device_count())
    flags = [*flags, "--microbatch-tokens=auto", f"--out={out}"]
    job = "worker", json.dumps([fault, str(ranks - 1), str(sign), *flags])
    if bench.tiny:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            joined = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        joined["WORLD_SIZE"] = str(ranks)
        places = [{"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]
        pids = [fork(Path(__file__), job, log, **joined, **place) for place in places]
    else:
        pids = [launch(Path(__file__), job, log, ranks)]
    statuses = [wait(pid, bench.left) for pid in pids]
    ended, said = time.time(), log.read_text(errors="replace")
    if not sign.exists():
        raise Failed(f"the fault did not come: {said[-300:]}")
    numbers = {"seconds": ended - float(sign.read_text()), "statuses": statuses}
    if fault == "with an error":
        numbers["its traceback is printed"] = "RuntimeError: only here" in said
    if fault == "without memory":
        record = json.loads((out / "config.json").read_text())
        numbers["next"] = record["settings"]["microbatch_tokens"]
        numbers["instead of"] = record["too_many_tokens"]
    return numbers


PARTS: dict[str, Callable[[Bench], None]] = {
    "tests": tests_part,
    "shapes": shapes_part,
    "8b": eight_part,
    "switches": switches_part,
    "trl": trl_part,
    "decoding": decoding_part,
    "killed": killed_part,
}

# --------------------------------------------------------------------------------------------------
# The command


def line_of(row: dict) -> str:
    """Return a measurement as one readable line."""

    def text(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    rest = {k: v for k, v in row.items() if k not in ("part", "name", "date")}
    numbers = ", ".join(f"{name.replace('_', ' ')} {text(value)}" for name, value in rest.items())
    return f"{row['part']:9} {row['name']}: {numbers}"


def summary(out: Path) -> None:
    """Print every measurement in the file of results, the newest of each name alone."""
    rows = {}
    for line in out.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["part"], row["name"]] = row
    print("\n".join(map(line_of, rows.values())))


def one_part(part: str, out: Path, tiny: bool) -> int:
    """Run a part; return 1 if it failed as a whole, which its last line says."""
    with tempfile.TemporaryDirectory(prefix="simpo-gpu-") as folder:
        bench = Bench(part, out, Path(folder), tiny, time.time())
        try:
            bench.note("machine", **bench.tool("about"))
            PARTS[part](bench)
        except Failed as e:
            bench.note("part", **e.row)
            return int(not isinstance(e, Skipped))
        except Exception as e:
            bench.note("part", failed=f"{type(e).__name__}: {e}")
            raise
        bench.note("part", took=f"{time.time() - bench.began:.0f} s")
    return 0


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in TOOLS:
        print(json.dumps(TOOLS[sys.argv[1]](*json.loads(sys.argv[2]))), flush=True)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "all", "summary"], metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU")
    text = "file to append results to (default: bench/gpu-results.jsonl)"
    parser.add_argument("--out", type=Path, metavar="OUT", help=text)
    flags = parser.parse_args()
    flags.out = flags.out or ROOT / "bench" / f"gpu-results{'-tiny' * flags.tiny}.jsonl"
    if flags.part == "summary":
        return summary(flags.out)
    if not flags.tiny and not torch.cuda.device_count():
        parser.error("no GPU here; pass --tiny to test this script on a CPU")
    if flags.part != "all":
        sys.exit(one_part(flags.part, flags.out, flags.tiny))
    if flags.tiny:
        importlib.import_module("torch._dynamo")  # once for all forks
    failed = []
    for part in PARTS:
        arguments = (part, f"--out={flags.out}", *["--tiny"] * flags.tiny)
        with tempfile.NamedTemporaryFile() as log:
            start = fork if flags.tiny else partial(launch, ranks=1)
            status = wait(start(Path(__file__), arguments, Path(log.name)), LIMIT + 60)
            print(Path(log.name).read_text(errors="replace"), end="", flush=True)
        failed += [f"{part} (status {status})"] * bool(status)
    print(f"\nfailed: {', '.join(failed) or 'none'}\n")
    summary(flags.out)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
