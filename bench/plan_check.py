"""Check `train.py --plan`: print the memory that it predicts beside what two steps take on a CPU.

    python bench/plan_check.py [--model DIR --data FILE --max-length 1024 …]

Without --model, a random model of shape `SHAPE` is trained on made-up pairs. All other flags are
passed to train.py, on top of each line of `GRID`. Memory is the largest resident size of the
process (getrusage), as in metrics.jsonl.
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
from runtime.plan import GIB, make_plan  # noqa: E402
from runtime.settings import read_command  # noqa: E402

SHAPE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
GRID = [
    [objective, f"--dtype={dtype}", f"--{switch}activation-checkpointing"]
    for dtype in ("fp32", "bf16")
    for switch in ("", "no-")
    for objective in (
        "--objective=simpo",
        "--objective=dpo --reference=online",
        "--objective=dpo --reference=cached",
    )
]


def write_inputs(folder: Path, shape: dict) -> list[str]:
    """Write a random model of this shape and pairs of some 200 tokens; return a run's flags."""
    workload.random_checkpoint(folder / "model", shape)
    words = "a b c d e f g h".split()

    def text(i: int, n: int) -> str:
        return " ".join(words[(i * j + j // 7) % 8] for j in range(n))

    pairs = [
        {"prompt": text(i, 30), "chosen": text(i + 1, 80), "rejected": text(i + 2, 90)}
        for i in range(64)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    inputs = [f"--model={folder / 'model'}", f"--data={folder / 'pairs.jsonl'}"]
    return [*inputs, "--batch-size=8", "--microbatch-tokens=1600"]


def predicted_and_taken(flags: list[str]) -> tuple[float, float]:
    """Return the memory of two steps with these flags, in GiB."""
    flags = [*flags, "--device=cpu", "--max-steps=2"]
    predicted = make_plan(*read_command([*flags, "--plan"])).total / GIB
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "train.py"), *flags, f"--out={out}/run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ran.returncode:
            sys.exit(ran.stderr)
        last = (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    return predicted, json.loads(last)["peak_memory_gib"]


def main() -> None:
    """Print a line for each line of `GRID`."""
    extra = sys.argv[1:]
    if {"-h", "--help"} & set(extra):
        return print(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        given = any(flag.startswith("--model") for flag in extra)
        inputs = extra if given else write_inputs(Path(folder), SHAPE) + extra
        print("predicted  taken GiB  predicted / taken")
        for line in GRID:
            flags = " ".join(line).split()
            predicted, taken = predicted_and_taken(inputs + flags)
            ratio = predicted / taken
            print(f"{predicted:9.2f} {taken:10.2f} {ratio:18.2f}   {' '.join(flags)}", flush=True)


if __name__ == "__main__":
    main()
