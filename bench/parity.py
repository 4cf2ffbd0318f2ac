"""Same checkpoint, pairs, order and settings, here and in TRL: is every step's loss the same?

    pip install -r bench/requirements.txt
    python bench/parity.py                    compares, prints both losses of each step and their relative difference
    python bench/parity.py --record           also writes TRL's losses to tests/trl_losses.json, which a test holds us to

The toy checkpoint, its first 128 pairs, 8 steps of 16, float32, constant learning rate. Where definitions differ (see
baselines.py), the comparison is made where they meet:

    ipo     per token, as TRL has it (`--length-norm`)
    cpo     SFT over the tokens of the batch, as TRL has it (`--lam 0 --sft-weight 1`)
    kto     TRL is given the responses themselves, in place of mismatched ones, to estimate the divergence from; and its
            weights are 2, because it divides by responses, not pairs
    orpo    TRL's SFT term includes the prompt: only the odds-ratio term is compared, at a learning rate of nothing
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "trl_losses.json"
STEPS, BATCH, LR = 8, 16, 1e-4
OBJECTIVES = {
    "simpo": {"beta": 10.0, "gamma_beta_ratio": 0.3},
    "dpo": {"beta": 0.1},
    "ipo": {"beta": 0.5, "length_norm": True},
    "cpo": {"beta": 0.1, "lam": 0.0, "sft_weight": 1.0},
    "kto": {"beta": 1.0},
    "orpo": {"lam": 0.5, "lr": 1e-30},
}


def write_pairs(path: Path) -> list[dict]:
    """The first pairs of the toy as message lists, in file order."""
    lines = (ROOT / "toy" / "train.jsonl").read_text().splitlines()[: STEPS * BATCH]
    pairs = []
    for record in map(json.loads, lines):
        prompt = [{"role": "user", "content": record["prompt"]}]
        pairs.append({key: prompt + [{"role": "assistant", "content": record[key]}] for key in ("chosen", "rejected")})
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return pairs


def settings_of(objective: str) -> dict:
    """Settings of `train.py` that define a comparison, besides model and data."""
    common = {"objective": objective, "batch_size": BATCH, "max_steps": STEPS, "lr": LR, "lr_schedule": "constant", "warmup_ratio": 0.0}  # fmt: skip
    return common | OBJECTIVES[objective]


def losses_of(objective: str, rows: list[dict]) -> list[float]:
    """What is compared, from the rows of metrics.jsonl: the losses; of ORPO its second term."""
    if objective == "orpo":
        return [row["loss"] + row["avg_logps/chosen"] for row in rows]
    return [row["loss"] for row in rows]


def our_losses(objective: str, folder: Path) -> list[float]:
    """Losses of `train.py`, step by step."""
    write_pairs(folder / "pairs.jsonl")
    flags = settings_of(objective) | {"model": ROOT / "toy" / "checkpoint", "data": folder / "pairs.jsonl", "device": "cpu", "out": folder / objective}  # fmt: skip
    words = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in flags.items()]
    subprocess.run([sys.executable, ROOT / "train.py", *words], check=True, capture_output=True)
    return losses_of(objective, [json.loads(line) for line in (folder / objective / "metrics.jsonl").open()])


def trl_losses(objective: str, folder: Path) -> list[float]:
    """Losses of TRL's trainer, fed the pairs in the order in which `train.py` takes them."""
    import datasets
    import transformers
    from peer import trl_trainer

    sys.path.insert(0, str(ROOT))
    from data import batches

    pairs = write_pairs(folder / "pairs.jsonl")
    pairs = [pairs[i] for step in batches(len(pairs), BATCH, epochs=1, seed=42) for i in step]
    ours, batch = OBJECTIVES[objective], BATCH
    if objective == "kto":  # one response a record
        records = [(pair[key], key == "chosen") for pair in pairs for key in ("chosen", "rejected")]
        pairs = [{"prompt": text[:-1], "completion": text[-1:], "label": label} for text, label in records]
        batch = 2 * BATCH
    dataset = datasets.Dataset.from_list(pairs)
    checkpoint = ROOT / "toy" / "checkpoint"
    settings = {"output_dir": str(folder / "trl"), "per_device_train_batch_size": batch, "num_train_epochs": 1, "learning_rate": ours.get("lr", LR),
                "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False,
                "max_length": 1024, "gradient_checkpointing": False, "weight_decay": 0.0, "max_grad_norm": 1.0}  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl_trainer(objective, model, tokenizer, dataset, settings, ours)
    if objective == "kto":
        trainer.train_dataset = trainer.train_dataset.map(lambda row: {"KL_completion_ids": row["completion_ids"]})
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [-ours["lam"] * row["log_odds_ratio"] if objective == "orpo" else row["loss"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write TRL's losses to {RECORD.relative_to(ROOT)}")
    flags = parser.parse_args()
    record, worst = {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for objective in OBJECTIVES:
            ours, theirs = our_losses(objective, Path(folder)), trl_losses(objective, Path(folder))
            record[objective] = theirs
            print(f"{objective}: step, train.py, TRL, relative difference")
            for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
                worst = max(worst, abs(a - b) / abs(b))
                print(f"  {step}  {a:.7f}  {b:.7f}  {abs(a - b) / abs(b):.1e}")
    if flags.record:
        import trl

        RECORD.write_text(json.dumps({"trl": trl.__version__, "losses": record}, indent=2) + "\n")
    print(f"largest relative difference: {worst:.1e}")
    sys.exit(worst > 1e-4)


if __name__ == "__main__":
    main()
