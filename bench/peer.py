"""Set up TRL's trainers to do what this project does, for parity.py and compare.py.

    python bench/peer.py JOB.json RESULT.json

Makes one timed run in a process of its own; compare.py starts it. The job names the pairs by token
id, so that both sides see the same tokens, cut in the same places.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime.processes import peak_resident


class Unavailable(Exception):
    """Reports that the peer cannot do what was asked; the message says why."""


def trl_trainer(
    objective: str,
    model: Any,
    tokenizer: Any,
    dataset: Any,
    settings: dict,
    loss: dict,
    callbacks: tuple = (),
) -> Any:
    """Return TRL's trainer for the objective, which takes the records of `dataset` in order.

    dataset: messages or strings, which TRL tokenizes; or lists `prompt_ids`, `chosen_ids` and
        `rejected_ids`, which it takes as they are.
    settings: for transformers' TrainingArguments. loss: the flags of `train.py` that define it.
    """
    from torch.utils.data import SequentialSampler

    configuration, trainer, options = trl_classes(objective, loss)
    tokenized = "prompt_ids" in dataset.column_names

    class InOrder(trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, dataset, *arguments):  # DPOTrainer's
            return dataset if tokenized else super()._prepare_dataset(dataset, *arguments)

        def tokenize_row(self, pair, model=None):  # CPOTrainer's
            return cpo_row(pair) if tokenized else super().tokenize_row(pair, model)

    return InOrder(
        model=model,
        args=configuration(**settings, **options),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def trl_classes(objective: str, loss: dict) -> tuple[Any, Any, dict]:
    """Return TRL's configuration class, its trainer class, and the options that define the loss."""
    import trl
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    match objective:
        case "simpo":
            gamma = loss["gamma_beta_ratio"] * loss["beta"]
            options = {"loss_type": "simpo", "cpo_alpha": 0.0}
            return CPOConfig, CPOTrainer, options | {"beta": loss["beta"], "simpo_gamma": gamma}
        case "dpo":
            kind = "sigmoid_norm" if loss.get("length_norm") else "sigmoid"
            return trl.DPOConfig, trl.DPOTrainer, {"loss_type": kind, "beta": loss["beta"]}
        case "ipo":
            return trl.DPOConfig, trl.DPOTrainer, {"loss_type": "ipo", "beta": loss["beta"]}
        case "apo_zero":
            return trl.DPOConfig, trl.DPOTrainer, {"loss_type": "apo_zero", "beta": loss["beta"]}
        case "alphapo":
            options = {"loss_type": "alphapo", "alpha": loss["alphapo_alpha"]}
            gamma = loss["gamma_beta_ratio"] * loss["beta"]
            return CPOConfig, CPOTrainer, options | {"beta": loss["beta"], "simpo_gamma": gamma}
        case "cpo":
            options = {"beta": loss["beta"], "cpo_alpha": loss["sft_weight"]}
            return CPOConfig, CPOTrainer, options
        case "kto":
            weights = {"desirable_weight": 2.0, "undesirable_weight": 2.0}
            return trl.KTOConfig, trl.KTOTrainer, weights | {"beta": loss["beta"]}
        case "orpo":
            return ORPOConfig, ORPOTrainer, {"beta": loss["lam"]}
    raise ValueError(f"{objective}: TRL's trainer is not set up for it")


def cpo_row(pair: dict) -> dict:
    """Return a pair of ids in the form of CPOTrainer's collator.

    It takes whole sequences, with the label −100 where nothing is predicted.
    """
    prompt = pair["prompt_ids"]
    row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for name in ("chosen", "rejected"):
        response = pair[f"{name}_ids"]
        row[f"{name}_input_ids"] = prompt + response
        row[f"{name}_attention_mask"] = [1] * (len(prompt) + len(response))
        row[f"{name}_labels"] = [-100] * len(prompt) + response
    return row


def training_arguments(job: dict) -> dict:
    """Return the settings of a job for transformers' TrainingArguments."""
    settings = {
        "output_dir": job["folder"],
        "per_device_train_batch_size": job["microbatch"],
        "gradient_accumulation_steps": job["batch_size"] // job["microbatch"],
        "num_train_epochs": 1,
        "max_length": job["max_length"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": job["device"] == "cpu",
        "bf16": job["dtype"] == "bf16",
        "gradient_checkpointing": job["activation_checkpointing"],
    }
    if job["objective"] == "dpo":
        settings["precompute_ref_log_probs"] = job["reference"] == "cached"
        settings["padding_free"] = job["padding_free"]
    return settings


def timed_run(job: dict) -> dict:
    """Return what compare.py calls a Run.

    Raises:
        Unavailable: TRL falls back to padding.
    """
    import datasets
    import torch
    import transformers

    cuda = job["device"] == "cuda"

    class Clock(transformers.TrainerCallback):
        """Times each step from its first forward pass to its optimizer, without collating."""

        def __init__(self):
            self.seconds = []

        def now(self) -> float:
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step_begin(self, *_, **__):
            self.start = self.now()

        def on_step_end(self, *_, **__):
            self.seconds.append(self.now() - self.start)
            with open(Path(job["folder"]) / "steps", "a") as file:
                file.write("\n")  # compare.py watches it

    no_text = {"prompt": "", "chosen": "", "rejected": ""}
    pairs = [
        no_text | {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in job["pairs"]
    ]
    attention = {"attn_implementation": "flash_attention_2"} if job["padding_free"] else {}
    dtype = torch.bfloat16 if job["weights"] == "bf16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=dtype, **attention
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    clock, dataset = Clock(), datasets.Dataset.from_list(pairs)
    settings = training_arguments(job)
    trainer = trl_trainer(
        job["objective"], model, tokenizer, dataset, settings, job["loss"], (clock,)
    )
    if job["padding_free"] and not trainer.padding_free:
        raise Unavailable("this TRL accepts padding_free but falls back to padding, as it warns")
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else peak_resident()
    first = trainer.state.log_history[0]
    logps = [first["logps/chosen"], first["logps/rejected"]]
    return {
        "seconds": clock.seconds,
        "loss": first["loss"],
        "logps": logps,
        "peak_gib": peak / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", type=Path, metavar="JOB.json", help="written by compare.py")
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="file to write")
    flags = parser.parse_args()
    try:
        outcome = timed_run(json.loads(flags.job.read_text()))
    except (Unavailable, ImportError) as e:
        outcome = {"unavailable": str(e)}
    flags.result.write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
