"""TRL's trainers, set up to do what this project does: one place for `parity.py` and `compare.py`.

    python bench/peer.py JOB.json RESULT.json        one timed run in a process of its own; compare.py starts it

The job names the pairs by token id, so that both sides see the same tokens, cut in the same places.
"""

import json
import resource
import sys
import time
from pathlib import Path


class Unavailable(Exception):
    """The peer cannot do what was asked of it; the message says why."""


def trl_trainer(objective: str, model, tokenizer, dataset, settings: dict, loss: dict, callbacks: tuple = ()):
    """TRL's trainer for the objective, which takes the records of `dataset` in their order.

    dataset: messages or strings, which TRL tokenizes; or lists `prompt_ids`, `chosen_ids` and `rejected_ids`, which it
    takes as they are. settings: of transformers' TrainingArguments. loss: the flags of `train.py` that define it."""
    import trl
    from torch.utils.data import SequentialSampler
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    match objective:
        case "simpo":
            gamma = loss["gamma_beta_ratio"] * loss["beta"]
            simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": loss["beta"], "simpo_gamma": gamma}
            arguments, base = CPOConfig(**settings, **simpo), CPOTrainer
        case "dpo":
            arguments, base = trl.DPOConfig(**settings, beta=loss["beta"]), trl.DPOTrainer
        case "ipo":
            arguments, base = trl.DPOConfig(**settings, loss_type="ipo", beta=loss["beta"]), trl.DPOTrainer
        case "cpo":
            arguments, base = CPOConfig(**settings, beta=loss["beta"], cpo_alpha=loss["sft_weight"]), CPOTrainer
        case "kto":
            weights = {"desirable_weight": 2.0, "undesirable_weight": 2.0}
            arguments, base = trl.KTOConfig(**settings, **weights, beta=loss["beta"]), trl.KTOTrainer
        case "orpo":
            arguments, base = ORPOConfig(**settings, beta=loss["lam"]), ORPOTrainer
    tokenized = "prompt_ids" in dataset.column_names

    class InOrder(base):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, dataset, *arguments):  # DPOTrainer's
            return dataset if tokenized else super()._prepare_dataset(dataset, *arguments)

        def tokenize_row(self, pair, model=None):  # CPOTrainer's
            return cpo_row(pair) if tokenized else super().tokenize_row(pair, model)

    return InOrder(
        model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=list(callbacks)
    )


def cpo_row(pair: dict) -> dict:
    """One pair of ids as CPOTrainer's collator wants it: whole sequences, labels −100 where nothing is predicted."""
    prompt = pair["prompt_ids"]
    row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for name in ("chosen", "rejected"):
        response = pair[f"{name}_ids"]
        row[f"{name}_input_ids"] = prompt + response
        row[f"{name}_attention_mask"] = [1] * (len(prompt) + len(response))
        row[f"{name}_labels"] = [-100] * len(prompt) + response
    return row


def timed_run(job: dict) -> dict:
    """What compare.py calls a Run."""
    import datasets
    import torch
    import transformers

    cuda = job["device"] == "cuda"

    class Clock(transformers.TrainerCallback):
        """From a step's first forward pass to its optimizer's last word; batches are collated before that."""

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

    pairs = [
        {"prompt": "", "chosen": "", "rejected": "", "prompt_ids": p, "chosen_ids": c, "rejected_ids": r}
        for p, c, r in job["pairs"]
    ]
    settings = {
        "output_dir": job["folder"], "per_device_train_batch_size": job["microbatch"], "num_train_epochs": 1,
        "gradient_accumulation_steps": job["batch_size"] // job["microbatch"], "max_length": job["max_length"],
        "learning_rate": job["lr"], "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": not cuda,
        "bf16": job["dtype"] == "bf16", "gradient_checkpointing": job["activation_checkpointing"],
    }  # fmt: skip
    if job["objective"] == "dpo":
        settings |= {"precompute_ref_log_probs": job["reference"] == "cached", "padding_free": job["padding_free"]}
    attention = {"attn_implementation": "flash_attention_2"} if job["padding_free"] else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.bfloat16 if job["weights"] == "bf16" else torch.float32, **attention
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    clock = Clock()
    dataset = datasets.Dataset.from_list(pairs)
    trainer = trl_trainer(job["objective"], model, tokenizer, dataset, settings, job["loss"], (clock,))
    if job["padding_free"] and not trainer.padding_free:
        raise Unavailable("this TRL accepts padding_free and falls back to padding (see its warning)")
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    first = trainer.state.log_history[0]
    logps = [first["logps/chosen"], first["logps/rejected"]]
    return {"seconds": clock.seconds, "loss": first["loss"], "logps": logps, "peak_gib": peak / 2**30}


if __name__ == "__main__":
    try:
        outcome = timed_run(json.loads(Path(sys.argv[1]).read_text()))
    except (Unavailable, ImportError) as e:
        outcome = {"unavailable": str(e)}
    Path(sys.argv[2]).write_text(json.dumps(outcome))
