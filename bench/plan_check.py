"""Is `train.py --plan` right? Memory that it foresees beside what two steps then take, on a CPU.

    python bench/plan_check.py [--model DIR --data FILE --max-length 1024 …]

Without a --model the random one of `shape` is trained on made-up pairs. All other flags go to train.py as they are, on top
of each line of the table. Memory is the most that the process had resident (getrusage), as in metrics.jsonl.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import workload  # noqa: E402
from plan import GIB, plan  # noqa: E402
from settings import read_settings  # noqa: E402

SHAPE = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
GRID = [
    [objective, f"--dtype={dtype}", f"--{switch}activation-checkpointing"]
    for dtype in ("fp32", "bf16")
    for switch in ("", "no-")
    for objective in ("--objective=simpo", "--objective=dpo --reference=online", "--objective=dpo --reference=cached")
]


def write_inputs(folder: Path, shape: dict) -> list[str]:
    """A random model of that shape, and pairs of some 200 tokens; returns the flags of a run."""
    workload.random_checkpoint(folder / "model", shape)
    words = "a b c d e f g h".split()
    text = lambda i, n: " ".join(words[(i * j + j // 7) % 8] for j in range(n))
    pairs = [{"prompt": text(i, 30), "chosen": text(i + 1, 80), "rejected": text(i + 2, 90)} for i in range(64)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return [f"--model={folder / 'model'}", f"--data={folder / 'pairs.jsonl'}", "--batch-size=8", "--microbatch-tokens=1600"]


def foreseen_and_taken(flags: list[str]) -> tuple[float, float]:
    """GiB, of two steps with these flags."""
    flags = [*flags, "--device=cpu", "--max-steps=2"]
    foreseen = plan(read_settings(flags + ["--plan"]))["total"] / GIB
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "train.py"), *flags, f"--out={out}/run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ran.returncode:
            sys.exit(ran.stderr)
        last = (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    return foreseen, json.loads(last)["peak_memory_gib"]


def main() -> None:
    extra = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        given = any(flag.startswith("--model") for flag in extra)
        inputs = extra if given else write_inputs(Path(folder), SHAPE) + extra
        print("foreseen  taken GiB  foreseen / taken")
        for line in GRID:
            flags = " ".join(line).split()
            foreseen, taken = foreseen_and_taken(inputs + flags)
            print(f"{foreseen:8.2f} {taken:10.2f} {foreseen / taken:17.2f}   {' '.join(flags)}", flush=True)


if __name__ == "__main__":
    main()
