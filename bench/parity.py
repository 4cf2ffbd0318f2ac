"""Check that every step's loss is the same in this project and in TRL.

    pip install -r bench/requirements.txt
    python bench/parity.py
        prints both losses of each step; exits with status 1 if they differ by more than 1e-4
    python bench/parity.py --record
        also writes TRL's losses to tests/trl_losses.json, which a test compares with ours

Both sides train the toy checkpoint on its first 128 pairs: 8 steps of 16, in float32, at a constant
learning rate. Where definitions differ (see methods/baselines.py), they are compared where they
meet:

    ipo     per token, as in TRL (`--length-norm`)
    cpo     SFT over the tokens of the batch, as in TRL (`--lam 0 --sft-weight 1`)
    kto     TRL estimates the divergence from the responses themselves instead of mismatched ones.
            Its weights are 2, because it divides by responses, not pairs
    orpo    TRL's SFT term includes the prompt. Only the odds-ratio term is compared, at a learning
            rate of practically 0
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from data import batches

CHECKPOINT = ROOT / "toy" / "checkpoint"
RECORD = ROOT / "tests" / "trl_losses.json"
STEPS, BATCH, LR = 8, 16, 1e-4
OBJECTIVES = {
    "simpo": {"beta": 10.0, "gamma_beta_ratio": 0.3},
    "dpo": {"beta": 0.1},
    "ipo": {"beta": 0.5, "length_norm": True},
    "cpo": {"beta": 0.1, "lam": 0.0, "sft_weight": 1.0},
    "kto": {"beta": 1.0},
    "orpo": {"lam": 0.5, "lr": 1e-30},
    "dpo-norm": {"objective": "dpo", "beta": 5.0, "length_norm": True},
    "alphapo": {"beta": 10.0, "gamma_beta_ratio": 0.3, "alphapo_alpha": 0.25},
    "apo_zero": {"beta": 0.1},
}


def write_pairs(path: Path) -> list[dict]:
    """Write the toy's first pairs as message lists, in file order; return them."""
    lines = (ROOT / "toy" / "train.jsonl").read_text().splitlines()[: STEPS * BATCH]
    pairs = []
    for record in map(json.loads, lines):
        prompt = [{"role": "user", "content": record["prompt"]}]
        pair = {}
        for key in ("chosen", "rejected"):
            pair[key] = [*prompt, {"role": "assistant", "content": record[key]}]
        pairs.append(pair)
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return pairs


def settings_of(objective: str) -> dict:
    """Return the settings of `train.py` that define a comparison, without model and data."""
    common = {
        "objective": objective,
        "batch_size": BATCH,
        "max_steps": STEPS,
        "lr": LR,
        "lr_schedule": "constant",
        "warmup_ratio": 0.0,
    }
    return common | OBJECTIVES[objective]


def losses_of(objective: str, rows: list[dict]) -> list[float]:
    """Return what is compared, from rows of metrics.jsonl: the loss, or ORPO's second term."""
    if objective == "orpo":
        return [row["loss"] + row["avg_logps/chosen"] for row in rows]
    return [row["loss"] for row in rows]


def our_losses(objective: str, folder: Path) -> list[float]:
    """Return the losses of `train.py`, step by step."""
    write_pairs(folder / "pairs.jsonl")
    inputs = {"model": CHECKPOINT, "data": folder / "pairs.jsonl", "out": folder / objective}
    flags = settings_of(objective) | inputs | {"device": "cpu"}
    words = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in flags.items()
    ]
    command = [sys.executable, ROOT / "train.py", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"parity.py: train.py failed:\n{done.stderr[-2000:]}")
    lines = (folder / objective / "metrics.jsonl").read_text().splitlines()
    return losses_of(objective, [json.loads(line) for line in lines])


def trl_losses(objective: str, folder: Path) -> list[float]:
    """Return the losses of TRL's trainer, which gets the pairs in the order of `train.py`."""
    import datasets
    import transformers
    from peer import trl_trainer

    pairs = write_pairs(folder / "pairs.jsonl")
    pairs = [pairs[i] for step in batches(len(pairs), BATCH, epochs=1, seed=42) for i in step]
    ours, batch = OBJECTIVES[objective], BATCH
    if objective == "kto":  # one response per record
        pairs = [
            {"prompt": pair[key][:-1], "completion": pair[key][-1:], "label": key == "chosen"}
            for pair in pairs
            for key in ("chosen", "rejected")
        ]
        batch = 2 * BATCH
    dataset = datasets.Dataset.from_list(pairs)
    settings = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1,
        "learning_rate": ours.get("lr", LR),
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "max_length": 1024,
        "gradient_checkpointing": False,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.pad_token = tokenizer.eos_token
    name = ours.get("objective", objective)
    trainer = trl_trainer(name, model, tokenizer, dataset, settings, ours)
    if objective == "kto":
        trainer.train_dataset = trainer.train_dataset.map(
            lambda row: {"KL_completion_ids": row["completion_ids"]}
        )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    if objective == "orpo":
        return [-ours["lam"] * row["log_odds_ratio"] for row in rows]
    return [row["loss"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    record = f"write TRL's losses to {RECORD.relative_to(ROOT)}"
    parser.add_argument("--record", action="store_true", help=record)
    flags = parser.parse_args()
    try:
        import trl  # only now, so that --help works without it
    except ImportError as e:
        sys.exit(f"parity.py: error: {e}: pip install -r bench/requirements.txt")
    losses, worst = {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for objective in OBJECTIVES:
            ours = our_losses(objective, Path(folder))
            theirs = losses[objective] = trl_losses(objective, Path(folder))
            print(f"{objective}: step, train.py, TRL, relative difference")
            for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
                difference = abs(a - b) / abs(b)
                worst = max(worst, difference)
                print(f"  {step}  {a:.7f}  {b:.7f}  {difference:.1e}", flush=True)
    if flags.record:
        text = json.dumps({"trl": trl.__version__, "losses": losses}, indent=2)
        RECORD.write_text(text + "\n")
    print(f"largest relative difference: {worst:.1e}")
    sys.exit(worst > 1e-4)


if __name__ == "__main__":
    main()
