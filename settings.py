"""The settings of a run: one table. A flag is `--batch-size`, a key of a TOML file `batch-size` or `batch_size`."""

import argparse
import difflib
import importlib.util
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent

# objective: the hyperparameters that are its own, with the value taken where none is given
HYPERPARAMETERS = {
    "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5, "length_norm": True, "label_smoothing": 0.0},
    "dpo": {"beta": 0.01, "label_smoothing": 0.0},
    "rrhf": {"lam": 1.0},
    "slic": {"lam": 1.0, "delta": 1.0},
    "ipo": {"beta": 0.1, "length_norm": False},
    "cpo": {"beta": 0.01, "lam": 1.0},
    "kto": {"beta": 0.01},
    "orpo": {"lam": 0.1},
    "rdpo": {"beta": 0.01, "alpha": 0.05},
    "sft": {},
}
NEEDS_REFERENCE = {"dpo", "ipo", "kto", "rdpo"}


def option(default, help: str, choices: tuple = ()):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    # what to train, on what
    objective: str = option(
        "simpo",
        "what to optimise: baselines.py has the formulas; sft trains on the chosen responses alone",
        tuple(HYPERPARAMETERS),
    )
    model: str | None = option(
        None, "checkpoint: a Hugging Face folder, or a hub id NAME[@REVISION]; the toy's if absent"
    )
    data: str | None = option(
        None,
        "training pairs: .jsonl, .json, .jsonl.gz or .parquet, a folder of them, or a hub id NAME[:SPLIT][@REVISION]",
    )
    eval_data: str | None = option(
        None, "held-out pairs, read likewise; evaluated before the first step and after the last"
    )
    chat_template: str | None = option(
        None, "file with a jinja2 chat template to use instead of the checkpoint's; 'none' for plain text"
    )
    max_length: int = option(2048, "tokens of a prompt and one response together; a longer response is cut at its end")
    max_prompt_length: int | None = option(
        None, "tokens of a prompt; a longer one is cut at its start; 1800 of 2048 if absent, the same share of less"
    )
    # the objective
    beta: float | None = option(
        None,
        "β, the scale of the reward: 2.0 for simpo (the paper tunes 2.0–10), 0.01 for dpo, cpo, kto and rdpo "
        "(0.01, 0.05, 0.1); for ipo its τ, 0.1 (0.01, 0.1, 0.5, 1.0)",
    )
    gamma_beta_ratio: float | None = option(
        None, "simpo's margin γ as a multiple of β, γ = ratio · β, 0.5 (the paper tunes 0.1–0.8); 0 is its ablation"
    )
    length_norm: bool | None = option(
        None,
        "divide log-probabilities by response length: on for simpo, where --no-length-norm is the paper's ablation; "
        "off for ipo, where --length-norm is TRL's form",
    )
    lam: float | None = option(
        None,
        "λ, weight of the SFT term, a sum over the response, in rrhf and slic, 1.0 (the paper tunes 0.1, 0.5, 1.0, "
        "10), and in cpo, 1.0 (not tuned); weight of the odds ratio in orpo, 0.1 (0.1, 0.5, 1.0, 2.0)",
    )
    delta: float | None = option(None, "slic's margin δ in nats, 1.0 (the paper tunes 0.1, 0.5, 1.0, 2.0)")
    alpha: float | None = option(None, "rdpo's α per token of length, 0.05 (the paper tunes 0.05, 0.1, 0.5, 1.0)")
    label_smoothing: float | None = option(
        None, "simpo, dpo: probability that a pair's label is wrong (conservative DPO), below 0.5; 0 if absent"
    )
    sft_weight: float = option(
        0.0, "add this times the mean negative log-likelihood of a chosen token, to any objective"
    )
    reference: str = option(
        "online",
        "of dpo, ipo, kto, rdpo: online keeps a frozen copy in memory; cached scores all pairs once, then frees it",
        ("online", "cached"),
    )
    # optimisation
    batch_size: int = option(128, "pairs per optimizer step, over all processes and micro-batches")
    epochs: int = option(1, "passes over the training pairs")
    max_steps: int | None = option(None, "stop after this many steps")
    lr: float = option(1e-6, "peak learning rate of AdamW")
    lr_schedule: str = option(
        "cosine",
        "learning rate after warm-up: falls to 0 along a cosine or a line, or stays",
        ("cosine", "linear", "constant"),
    )
    warmup_ratio: float = option(0.1, "share of the steps over which the learning rate rises to its peak")
    adam_beta1: float = option(0.9, "AdamW: decay of the mean of gradients")
    adam_beta2: float = option(0.999, "AdamW: decay of the mean of squared gradients")
    adam_eps: float = option(1e-8, "AdamW: added to the denominator")
    weight_decay: float = option(0.0, "AdamW: decay of the weights, times the learning rate")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    shuffle: bool = option(True, "take the pairs in a new order each epoch; --no-shuffle keeps that of the file")
    seed: int = option(42, "decides the order of the pairs, together with the epoch and nothing else")
    # hardware
    device: str = option("auto", "cuda where there is one, else cpu", ("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "what is computed with: bf16 on cuda, fp32 on a cpu; master weights and the loss are float32 with both. fp64, "
        "all of it in float64, is for telling a bug from rounding",
        ("auto", "bf16", "fp32", "fp64"),
    )
    microbatch_tokens: int = option(8192, "tokens per forward pass and process: the memory knob; changes nothing else")
    activation_checkpointing: bool = option(
        True,
        "keep only each block's input and attention for backward and compute the rest again: less memory, a quarter more work",
    )
    keep_products: str = option(
        "none",
        "with activation checkpointing, matrix products that are kept all the same: attention's, about a third of those made "
        "again, or all (but an MLP's under --compile); of Llama 3 8B in bf16 they take 0.66 or 2.5 GB per 1,000 tokens of "
        "--microbatch-tokens",
        ("none", "attention", "all"),
    )
    gather_once: bool = option(
        False,
        "gather weights and reduce gradients once a step, not once a micro-batch: for slow links between processes; costs "
        "6 bytes a parameter on every process (8 in fp32)",
    )
    offload: bool = option(
        False, "keep weights, gradients and AdamW's moments on the host, 16 bytes a parameter less per GPU, and step there"
    )
    compile: bool = option(False, "torch.compile the norms and MLPs: a slow start, then fewer trips to memory")
    replicate: int = option(
        1, "HSDP: keep so many copies of the sharded model, usually one a node; gradients are averaged over them"
    )
    # output
    out: str | None = option(None, "folder of the run; runs/OBJECTIVE-N with the first free N if absent")
    overwrite: bool = option(False, "replace a finished run in --out")
    save_every: int = option(
        0, "also keep what it takes to go on, every so many steps: 12 bytes a parameter; 0: only when told to stop"
    )
    keep: int = option(2, "how many of these checkpoints stay; one more is there while it is being written")
    resume: str = option(
        "auto", "auto: go on from the newest whole checkpoint in --out; PATH: from that one; never: begin anew"
    )
    dry_run: bool = option(
        False, "resolve everything but the weights, print it and stop; nothing is fetched, computed or written"
    )
    log_every: int = option(1, "write metrics of every so many steps")
    eval_every: int = option(0, "also evaluate every so many steps; 0 for only before and after")
    tensorboard: bool = option(False, "write the metrics for TensorBoard too, into OUT/tensorboard (package: tensorboard)")
    wandb: bool = option(False, "write the metrics to Weights & Biases too (package: wandb)")
    # planning
    plan: bool = option(
        False, "say what these settings would take, memory and time, and stop; of the model only config.json is read"
    )
    gpus: int | None = option(None, "plan: GPUs, or with --device cpu processes; those that are here if absent, else 1")
    gpu_memory: float | None = option(None, "plan: GiB of each; those of the GPU that is here if absent, else 80")
    gpu_tflops: float | None = option(
        None, "plan: dense bf16 TFLOP/s of each at its peak; of the GPU that is here, else 989, an H100's"
    )
    mfu: float = option(0.4, "plan: the share of that peak which goes into the mathematics")
    plan_tokens_per_pair: int | None = option(
        None, "plan: tokens of a prompt and its two responses; read off the data where it is here"
    )

    def __post_init__(self):
        for name, value in HYPERPARAMETERS.get(self.objective, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.max_prompt_length is None:
            self.max_prompt_length = min(1800, self.max_length * 1800 // 2048)

    @property
    def gamma(self) -> float | None:
        return None if self.gamma_beta_ratio is None else self.gamma_beta_ratio * self.beta


SECTIONS = {
    "objective": "what to train, on what",
    "beta": "the objective",
    "batch_size": "optimisation",
    "device": "hardware",
    "out": "output",
    "plan": "planning",
}


def read_settings(argv: list[str] | None = None, description: str | None = None) -> Settings:
    """Defaults, then the TOML file, then the flags. Exits with status 2 and one line on a usage error."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        usage="train.py [--flag value ...]     (--help explains every flag)",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with any of these settings, without the dashes before them"
    )
    group = parser
    for f, kind in zip(fields(Settings), setting_types()):
        group = parser.add_argument_group(SECTIONS[f.name]) if f.name in SECTIONS else group
        flag = "--" + f.name.replace("_", "-")
        text = (f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")).replace("%", "%%")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            choices = f.metadata["choices"] or None
            group.add_argument(
                flag, type=kind, choices=choices, metavar=None if choices else kind.__name__.upper(), help=text
            )
    flags = vars(parser.parse_args(argv))
    config = flags.pop("config", None)
    toy = not ({"model", "data"} & flags.keys() or config)
    if toy:  # the embedded default: its settings stand beside it, one file per objective
        config = HERE / "toy" / f"{flags.get('objective', 'simpo')}.toml"
    try:
        values = (read_toml(Path(config)) if config else {}) | flags
    except ValueError as e:
        parser.error(str(e))
    if toy:
        values |= {
            key: str(HERE / values[key]) for key in ("model", "data", "eval_data") if key in values and key not in flags
        }
    settings = Settings(**values)
    if problem := settings_problem(settings):
        parser.error(problem)
    return settings


def setting_types() -> list[type]:
    """int, float, str or bool for each setting; `X | None` is an X that may be left out."""
    hints = typing.get_type_hints(Settings)
    return [
        next(t for t in (typing.get_args(hints[f.name]) or (hints[f.name],)) if t is not types.NoneType)
        for f in fields(Settings)
    ]


def read_toml(path: Path) -> dict:
    """A flat file of settings. Raises ValueError naming file and key."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: cannot be read: {e}") from None
    kinds = dict(zip((f.name for f in fields(Settings)), setting_types()))
    values = {}
    for key, value in raw.items():
        name = key.replace("-", "_")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            raise ValueError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if kinds[name] is float and type(value) is int:
            value = float(value)
        if type(value) is not kinds[name]:
            raise ValueError(f"{path}: {key} = {value!r}: expected {kinds[name].__name__}")
        values[name] = value
    return values


def settings_problem(s: Settings) -> str | None:
    """The first thing wrong with the settings, in words; None if nothing is."""
    flag = lambda name: "--" + name.replace("_", "-")
    for f in fields(Settings):
        if f.metadata["choices"] and getattr(s, f.name) not in f.metadata["choices"]:
            return f"{flag(f.name)}: {getattr(s, f.name)!r} is not one of {', '.join(f.metadata['choices'])}"
        if isinstance(getattr(s, f.name), float) and not math.isfinite(getattr(s, f.name)):
            return f"{flag(f.name)}: not a finite number"
        if getattr(s, f.name) == "":
            return f"{flag(f.name)}: is empty"
    if s.model is None or s.data is None:
        return "--model and --data go together; without both, the toy is trained"
    if s.device == "cuda" and not s.plan and not torch.cuda.is_available():
        return "--device cuda: torch sees no CUDA device here"
    own = HYPERPARAMETERS[s.objective]
    for name in {name: None for names in HYPERPARAMETERS.values() for name in names}:
        if getattr(s, name) is not None and name not in own:
            users = [objective for objective, names in HYPERPARAMETERS.items() if name in names]
            return f"{flag(name)}: not a setting of {s.objective}, but of {', '.join(users)}"
    positive = "beta batch_size epochs max_steps lr adam_eps max_grad_norm microbatch_tokens max_prompt_length "
    positive += "replicate log_every keep gpus gpu_memory gpu_tflops mfu plan_tokens_per_pair"
    for name in positive.split():
        if getattr(s, name) is not None and getattr(s, name) <= 0:
            return f"{flag(name)}: expected a positive number"
    for name in "gamma_beta_ratio lam delta alpha sft_weight weight_decay eval_every save_every seed".split():
        if getattr(s, name) is not None and getattr(s, name) < 0:
            return f"{flag(name)}: expected 0 or a positive number"
    for name, top in (("label_smoothing", 0.5), ("warmup_ratio", 1), ("adam_beta1", 1), ("adam_beta2", 1)):
        if getattr(s, name) is not None and not 0 <= getattr(s, name) < top:
            return f"{flag(name)}: expected a number from 0 to below {top}"
    if s.max_prompt_length >= s.max_length:
        return f"--max-prompt-length {s.max_prompt_length} leaves no room for a response in --max-length {s.max_length}"
    for name in ("tensorboard", "wandb"):
        if getattr(s, name) and not importlib.util.find_spec(name):
            return f"{flag(name)}: the package {name} is not installed"
    if s.eval_every and not s.eval_data:
        return "--eval-every goes with --eval-data"
    return None
