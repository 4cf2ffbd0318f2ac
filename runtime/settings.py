"""List the settings of a run in one table: default, meaning, bounds, what may change on resume.

A flag is `--batch-size`; a key in a TOML file is `batch-size` or `batch_size`. Flags override the
file, and the file overrides the defaults. `PlanOptions` is a second table, for `--plan` alone.
`parse_table` turns any such table into a command line; `sample.py` uses it, too.
"""

import argparse
import dataclasses
import datetime
import difflib
import importlib.util
import math
import os
import sys
import tomllib
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from formats.errors import DataError
from formats.files import reading
from formats.schemas import FORMATS, Columns
from methods.objectives import OBJECTIVES, hyperparameters
from model import flash_runs

ROOT = Path(__file__).resolve().parent.parent

# The metavars of flags that hold a path: in them, `~` is the home folder.
PATHS = {"DIR", "FILE", "PAIRS", "RUN", "FILE.png", "FILE.html", "[NAME=]DIR", "auto|never|PATH"}

# Other trainers' names, so that an unknown flag can suggest ours; a note may follow our name.
ALIASES = {
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_schedule",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "microbatch_tokens",
    "gradient_checkpointing": "activation_checkpointing",
    "loss_type": "objective",
    "method": "objective",
    "gamma": "gamma_beta_ratio (γ/β, not γ)",
    "simpo_gamma": "gamma_beta_ratio (γ/β, not γ)",
    "model_name_or_path": "model",
    "dataset_name": "data",
    "dataset": "data",
    "train_data": "data",
    "output_dir": "out",
    "max_seq_length": "max_length",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "resume_from_checkpoint": "resume",
    "precision": "dtype",
}


def option(
    default: Any,
    help: str,
    *,
    choices: Any = (),
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    metavar: str | None = None,
    section: str | None = None,
    may_change: bool = False,
    auto: bool = False,
) -> Any:
    """Describe one setting: a field of a dataclass, with `help` and its rules as metadata.

    choices, least (≥), above (>), below (<), most (≤): which values are accepted.
    section: the heading that starts with this setting in `--help`.
    may_change: a run may resume with another value; the result stays the same up to rounding.
    auto: the word auto is accepted instead of a number; something else must resolve it.
    """
    metadata = {name: value for name, value in locals().items() if name != "default"}
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    """Holds the settings of one run of `train.py`."""

    objective: str = option(
        "simpo",
        "what to optimise; simpo.py, methods/baselines.py and methods/successors.py have the "
        "formulas, and sft trains on the chosen responses alone",
        choices=OBJECTIVES,
        section="what to train, on what",
    )
    model: str = option(
        None,
        "checkpoint: a Hugging Face folder or a hub id NAME[@REVISION]; default: the toy's",
        metavar="DIR",
    )
    data: str = option(
        None,
        "training pairs: .jsonl, .json, .jsonl.gz or .parquet, a folder of such files, or a hub "
        "id NAME[:SPLIT][@REVISION]. Known formats: "
        + "; ".join(f"{row.columns} ({row.users})" for row in FORMATS),
        metavar="PAIRS",
    )
    eval_data: str | None = option(
        None,
        "held-out pairs, as for --data; evaluated before and after training; none: not those that "
        "a --config names",
        metavar="PAIRS",
    )
    columns: str | None = option(
        None,
        "what columns of other formats are: TARGET=SOURCE,…, as in prompt=question,chosen=good,"
        "rejected=bad; a source may be a path, such as answers.0.text",
        metavar="NAMES",
        may_change=True,
    )
    ignore_columns: str | None = option(
        None,
        "columns, and keys of messages, that may be ignored although they say something: A,B,…",
        metavar="NAMES",
        may_change=True,
    )
    chat_template: str | None = option(
        None,
        "file with a jinja2 chat template instead of the checkpoint's; 'none' for plain text",
        metavar="FILE",
        may_change=True,
    )
    max_length: int = option(
        2048, "longest prompt plus response, in tokens; the response is cut at its end", above=0
    )
    max_prompt_length: int = option(
        None,
        "longest prompt, in tokens; a longer one is cut at its start; default: 1800 of 2048, or "
        "the same share of another --max-length",
        above=0,
    )
    date: str | None = option(
        None,
        "the day that a chat template gets if it asks for one, YYYY-MM-DD; default: today, and on "
        "resume the day on which the run began",
        metavar="DATE",
    )
    skip_unusable: float = option(
        0.0,
        "drop and count records that cannot be used, up to this share of all; 0: stop at the first",
        least=0,
        below=1,
        metavar="SHARE",
        may_change=True,
    )
    like_authors: bool = option(
        False,
        "tokenize and cut pairs as the trainer of SimPO's authors does, and warm up as Hugging "
        "Face does, from rate 0; formats/authors.py lists what differs",
    )

    beta: float | None = option(
        None,
        "β, the scale of the reward (the paper tunes 2.0, 2.5 for simpo, and its authors' later "
        "recipe takes 10; 0.01, 0.05, 0.1 for dpo, cpo, kto, rdpo; Tülu 3 takes 5 for dpo "
        "--length-norm); for ipo its τ (0.01, 0.1, 0.5, 1.0)",
        above=0,
        section="the objective",
    )
    gamma_beta_ratio: float | None = option(
        None,
        "margin γ of simpo and alphapo as a multiple of β: γ = ratio · β (the paper tunes γ = 0.3, "
        "0.5, 1.0, 1.2, 1.4, 1.6, a ratio of 0.12 to 0.8; its authors advise 0.5, then a search "
        "from 0 to 1; 0 is the ablation); for repo, which has no β, the margin itself in nats per "
        "token (its authors take 0.4 to 0.6)",
        least=0,
    )
    length_norm: bool | None = option(
        None,
        "divide log-probabilities by response length; --no-length-norm is simpo's ablation, "
        "--length-norm is TRL's form of ipo and Tülu 3's of dpo",
    )
    lam: float | None = option(
        None,
        "λ. rrhf, slic, cpo: weight of the SFT term, summed over a response (the paper tunes 0.1, "
        "0.5, 1.0, 10, but not cpo's). orpo: weight of the odds ratio (0.1, 0.5, 1.0, 2.0)",
        least=0,
    )
    delta: float | None = option(
        None, "slic's margin δ, in nats (the paper tunes 0.1, 0.5, 1.0, 2.0)", least=0
    )
    alpha: float | None = option(
        None, "rdpo's α per token of length (the paper tunes 0.05, 0.1, 0.5, 1.0)", least=0
    )
    alphapo_alpha: float | None = option(
        None,
        "alphapo's α, the shape of the reward: 0 is simpo; above 0, the reward is steeper for "
        "less likely responses (its authors take 0.25 for Mistral)",
        least=-10,
        most=10,
    )
    label_smoothing: float | None = option(
        None, "probability that a pair's label is wrong (conservative DPO)", least=0, below=0.5
    )
    sft_weight: float = option(
        0.0, "weight of the chosen tokens' mean negative log-likelihood, added to any loss", least=0
    )
    reference: str | None = option(
        None,
        "online keeps a frozen copy of the model; cached scores all pairs once and frees the copy",
        choices=("online", "cached"),
    )

    batch_size: int = option(
        128, "pairs per step, over all ranks and micro-batches", above=0, section="optimisation"
    )
    epochs: int = option(1, "passes over the training pairs", above=0)
    max_steps: int | None = option(None, "stop after this many steps", above=0)
    lr: float = option(1e-6, "peak learning rate of AdamW", above=0)
    lr_schedule: str = option(
        "cosine",
        "learning rate after warm-up: decay to 0 along a cosine or a line, or stay constant",
        choices=("cosine", "linear", "constant"),
    )
    warmup_ratio: float = option(
        0.1, "share of the steps over which the learning rate rises to its peak", least=0, below=1
    )
    adam_beta1: float = option(0.9, "AdamW: decay rate of the mean gradient", least=0, below=1)
    adam_beta2: float = option(
        0.999, "AdamW: decay rate of the mean squared gradient", least=0, below=1
    )
    adam_eps: float = option(1e-8, "AdamW: term added to the denominator", above=0)
    weight_decay: float = option(
        0.0, "AdamW: decay of the weights, times the learning rate", least=0
    )
    max_grad_norm: float = option(1.0, "clip gradients to this norm", above=0)
    shuffle: bool = option(
        True, "reorder the pairs in each epoch; --no-shuffle keeps the order of the file"
    )
    seed: int = option(
        42, "determines, with the epoch, the order of the pairs; nothing else is random", least=0
    )

    device: str = option(
        "auto",
        "cuda if available, else cpu",
        choices=("auto", "cpu", "cuda"),
        section="hardware",
        may_change=True,
    )
    dtype: str = option(
        "auto",
        "dtype to compute in; auto: bf16 on a GPU of compute capability 8 or later, else fp32. "
        "Master weights and the loss are float32 in both. fp64 does everything in float64, to tell "
        "a bug from rounding",
        choices=("auto", "bf16", "fp32", "fp64"),
    )
    microbatch_tokens: int = option(
        8192,
        "most tokens per forward pass and rank; a longer pair travels alone. Lower it to save "
        "memory: that changes speed and rounding, nothing else. auto: what --plan says fits in "
        "80% of the free memory, and half of that after an out-of-memory error",
        above=0,
        metavar="N|auto",
        may_change=True,
        auto=True,
    )
    activation_checkpointing: bool = option(
        True,
        "save only the input and the attention output of each block for backward and recompute the "
        "rest, logits included: less memory, a quarter more work",
        may_change=True,
    )
    keep_products: str = option(
        "none",
        "matrix products that activation checkpointing saves nevertheless. attention spares a "
        "quarter to a third of the recomputation; all adds those of the MLPs and the head. For "
        "Llama 3 8B in bf16 they take 0.66 or 2.7 GB per 1,000 tokens of --microbatch-tokens. "
        "auto: as many as --plan says fit in 80% of the free memory",
        choices=("none", "attention", "all", "auto"),
        may_change=True,
    )
    gather_once: bool = option(
        False,
        "gather weights and reduce gradients once per step, not per micro-batch, for slow links "
        "between ranks; costs 6 bytes per parameter on every rank (8 in fp32)",
        may_change=True,
    )
    offload: bool = option(
        False,
        "keep weights, gradients and AdamW's moments on the host and step there: saves 16 bytes of "
        "GPU memory per parameter",
        may_change=True,
    )
    flash: int = option(
        2,
        "FlashAttention's version on a GPU: 2 comes with torch; 3 (Hopper) and 4 (Hopper, "
        "Blackwell) need their packages, flash_attn_interface and flash_attn.cute",
        least=2,
        most=4,
        metavar="2|3|4",
        may_change=True,
    )
    compile: bool = option(
        False,
        "torch.compile the blocks: a slow start, less memory traffic; with activation "
        "checkpointing only where FlashAttention runs",
        may_change=True,
    )
    replicate: int = option(
        1,
        "HSDP: copies of the sharded model, usually one per node; gradients are averaged over them",
        above=0,
        may_change=True,
    )

    out: str | None = option(
        None,
        "output folder; default: runs/OBJECTIVE-N with the first free N",
        metavar="DIR",
        section="output",
        may_change=True,
    )
    overwrite: bool = option(False, "replace a finished run in --out", may_change=True)
    save_every: int = option(
        0,
        "save a resumable checkpoint every N steps (12 bytes per parameter); 0: only when stopped "
        "by a signal",
        least=0,
        metavar="N",
        may_change=True,
    )
    keep: int = option(
        2, "checkpoints to keep, and one more during a save", above=0, metavar="N", may_change=True
    )
    resume: str = option(
        "auto",
        "auto: resume from the newest complete checkpoint in --out; PATH: from that checkpoint; "
        "never: start over",
        metavar="auto|never|PATH",
        may_change=True,
    )
    dry_run: bool = option(
        False,
        "resolve all but the weights, print it, stop; nothing is downloaded, computed or written",
        may_change=True,
    )
    show: int = option(
        0,
        "print the first N records as the model will see them, with special tokens, and stop; "
        "needs no weights",
        least=0,
        metavar="N",
        may_change=True,
    )
    log_every: int = option(
        1, "log metrics every N steps and after the last", above=0, metavar="N", may_change=True
    )
    eval_every: int = option(
        0,
        "also evaluate every N steps; 0: only before the first step and after the last",
        least=0,
        metavar="N",
        may_change=True,
    )
    tensorboard: bool = option(
        False, "also write OUT/tensorboard, for TensorBoard (package: tensorboard)", may_change=True
    )
    wandb: bool = option(
        False, "also log the metrics to Weights & Biases (package: wandb)", may_change=True
    )

    def __post_init__(self) -> None:
        objective = OBJECTIVES.get(self.objective)
        for name, value in objective.defaults.items() if objective else ():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.max_prompt_length is None:
            self.max_prompt_length = min(1800, self.max_length * 1800 // 2048)

    def resolved(self, device: str) -> "Settings":
        """Return a copy in which `--dtype auto` is what it means on this kind of device.

        Raises:
            DataError: a value is out of bounds, or two settings conflict.
        """
        if problem := table_problem(self):
            raise DataError(problem)
        dtype = auto_dtype(device) if self.dtype == "auto" else self.dtype
        return dataclasses.replace(self, dtype=dtype)

    @property
    def named_columns(self) -> Columns:
        """Return --columns and --ignore-columns, read anew."""
        return Columns.of(self.columns, self.ignore_columns)

    @property
    def gamma(self) -> float | None:
        """Return the absolute margin, in units of reward; None without a ratio or a β."""
        if self.gamma_beta_ratio is None or self.beta is None:
            return None
        return self.gamma_beta_ratio * self.beta

    def problem(self) -> str | None:
        """Return the first conflict between two settings, in words; None if there is none."""
        if self.model is None or self.data is None:
            return "--model and --data belong together; without both, the toy is trained"
        try:
            _ = self.named_columns
        except DataError as e:
            return str(e)
        own = OBJECTIVES[self.objective].defaults
        for name, users in hyperparameters().items():
            if getattr(self, name) is not None and name not in own:
                others = ", ".join(users)
                return f"{_flag(name)}: not a setting of {self.objective}, but of {others}"
        if self.like_authors and OBJECTIVES[self.objective].responses != 2:
            return f"--like-authors: their trainer takes pairs, and {self.objective} has none"
        if self.date and not is_date(self.date):
            return f"--date {self.date}: expected a day as YYYY-MM-DD"
        if self.max_prompt_length >= self.max_length:
            prompt = f"--max-prompt-length {self.max_prompt_length}"
            return f"{prompt} leaves no room for a response in --max-length {self.max_length}"
        for name in ("tensorboard", "wandb"):
            if getattr(self, name) and not importlib.util.find_spec(name):
                return f"{_flag(name)}: the package {name} is not installed"
        if self.eval_every and not self.eval_data:
            return "--eval-every needs --eval-data"
        if self.keep_products != "none" and not self.activation_checkpointing:
            return f"--keep-products {self.keep_products} needs --activation-checkpointing"
        return None

    @property
    def kept(self) -> str:
        """Return what backward finds: `keep_products`, or "everything" without checkpointing."""
        return self.keep_products if self.activation_checkpointing else "everything"

    @property
    def keeps_logits(self) -> bool:
        """Return True if the head's logits, like all other products, wait for backward."""
        return self.kept in KEEP_LOGITS


KEEP_LOGITS = "all", "everything"  # values of `Settings.kept`
AUTO = "microbatch_tokens", "keep_products"  # what `runtime.plan.fit_to_memory` chooses for auto


def check_hyperparameters() -> None:
    """Raise TypeError if a hyperparameter of the table is not a setting that is None by default."""
    for name, users in hyperparameters().items():
        if getattr(Settings, name, "absent") is not None:
            line = f"{name}: float | None = option(None, …)"
            raise TypeError(f"hyperparameter {name} of {', '.join(users)}: Settings needs `{line}`")


check_hyperparameters()


def auto_dtype(device: str) -> str:
    """Return the dtype that `auto` means on "cuda" or "cpu": bf16 on GPUs that compute in it."""
    old = torch.cuda.is_available() and not flash_runs(torch.device("cuda"))
    return "bf16" if device == "cuda" and not old else "fp32"


def of_old_gpu(name: str) -> str:
    """Say why `auto` is not bf16 on the GPU of this name."""
    return f"{name} is older than compute capability 8, so float32 is the default"


@dataclass
class PlanOptions:
    """Holds what only `train.py --plan` uses."""

    plan: bool = option(
        False,
        "print the memory and time that these settings would take, and stop; of the model only "
        "config.json is read",
        section="planning, with --plan alone",
    )
    gpus: int | None = option(
        None, "GPUs, or CPU ranks with --device cpu; default: this machine's, else 1", above=0
    )
    gpu: str | None = option(
        None,
        "their name, as torch has it or shorter: A100-40, 'H200 NVL', L40S; memory, peak and "
        "bandwidths are those of the data sheet; default: this machine's, else H100",
    )
    gpu_memory: float | None = option(
        None, "memory of each in GiB, instead of what this machine or the data sheet has", above=0
    )
    gpu_tflops: float | None = option(
        None, "peak dense bf16 TFLOP/s of each, instead of the data sheet's", above=0
    )
    mfu: float | None = option(
        None,
        "share of that peak that goes into the model's arithmetic; default: modelled from counted "
        "operations and bytes, 0.4 where only the peak is known",
        above=0,
    )
    plan_tokens_per_pair: int | None = option(
        None, "tokens of a prompt and its two responses; default: measured on local data", above=0
    )


# --------------------------------------------------------------------------------------------------
# From a table to a command line


def read_settings(argv: list[str] | None = None, description: str | None = None) -> Settings:
    """Read the settings of a run: defaults, then the TOML file, then the flags.

    Exits with status 2 and one line on stderr for a usage error.
    """
    return read_command(argv, description)[0]


def read_command(
    argv: list[str] | None = None, description: str | None = None
) -> tuple[Settings, PlanOptions]:
    """Read the settings as `read_settings` does, and the options for `--plan` beside them."""
    parser = _parser(description, "train.py [--flag value ...]     (--help explains every flag)")
    text = "TOML file with any of these settings, without the leading dashes"
    parser.add_argument("--config", metavar="FILE", help=text)
    for table in (Settings, PlanOptions):
        _add_flags(parser, table)
    flags = _parse(parser, argv, _types(Settings) | _types(PlanOptions))
    config = flags.pop("config", None)
    try:
        if flags.keys().isdisjoint(("model", "data")) and not config:
            values = _toy(flags.get("objective", "simpo")) | flags
        else:
            values = (read_toml(Path(config)) if config else {}) | flags
    except DataError as e:
        parser.error(str(e))
    if values.get("eval_data") == "none":
        del values["eval_data"]
    for f in fields(Settings):  # of the TOML file
        if f.metadata["metavar"] in PATHS and f.name in values:
            values[f.name] = expand_home(values[f.name])
    planning = {name: values.pop(name) for name in _types(PlanOptions) if name in values}
    settings, options = Settings(**values), PlanOptions(**planning)
    for name in flags.keys() & _types(PlanOptions).keys() - {"plan"}:
        if not options.plan:
            parser.error(f"{_flag(name)}: is used by --plan alone; add --plan")
    if settings.device == "cuda" and not options.plan and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device available")
    if problem := table_problem(settings) or table_problem(options):
        parser.error(problem)
    return settings, options


def parse_table(table: type, argv: list[str] | None, description: str | None, usage: str) -> Any:
    """Parse flags into an instance of `table`; exit with status 2 and one line on a usage error."""
    parser = _parser(description, usage)
    _add_flags(parser, table)
    flags = _parse(parser, argv, _types(table))
    instance = table(**flags)
    if problem := table_problem(instance):
        parser.error(problem)
    return instance


def table_problem(instance: Any) -> str | None:
    """Return the first value out of bounds, or the first conflict that `problem` names."""
    for f in fields(instance):
        value = getattr(instance, f.name)
        if value is not None and (wrong := _value_problem(value, f.metadata)):
            return f"{_flag(f.name)}: {wrong}"
    return instance.problem() if hasattr(instance, "problem") else None


def _value_problem(value: Any, rule: typing.Mapping) -> str | None:
    """Return what is wrong with a value, in words; None if it is accepted."""
    if rule["auto"] and value == "auto":
        return None
    if rule["choices"] and value not in rule["choices"]:
        return f"{value!r} is not one of {', '.join(rule['choices'])}"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    if value == "":
        return "is empty"
    if isinstance(value, str) and "\0" in value:
        return "contains a NUL character"
    if isinstance(value, int) and value >= 2**63 and rule["below"] is None:
        return "expected less than 2^63"
    least, above, below, most = (rule[name] for name in ("least", "above", "below", "most"))
    if above is not None and value <= above:
        return "expected a positive number" if above == 0 else f"expected more than {above}"
    if least is not None and below is not None and not least <= value < below:
        return f"expected a number from {least} to below {below}"
    if least is not None and value < least:
        return "expected 0 or a positive number" if least == 0 else f"expected at least {least}"
    if most is not None and value > most:
        return f"expected at most {most}"
    if below is not None and value >= below:
        return f"expected less than {below}"
    return None


def expand_home(value: Any) -> Any:
    """Expand the `~` of a path, of a path behind NAME=, or of each in a list."""
    if isinstance(value, list):
        return [expand_home(path) for path in value]
    if isinstance(value, str):
        return "=".join(map(os.path.expanduser, value.split("=")))
    return Path(os.path.expanduser(value))  # unlike Path.expanduser, it keeps an unknown ~user


class Parser(argparse.ArgumentParser):
    """Expands the `~` of every flag that holds a path; a shell leaves it alone after `--out=`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as the base class does. Flags with one of `PATHS` as metavar hold a path."""
        flags, unknown = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.metavar in PATHS and getattr(flags, action.dest, None):
                setattr(flags, action.dest, expand_home(getattr(flags, action.dest)))
        return flags, unknown


def _toy(objective: str) -> dict:
    """Return the settings of the embedded default for an objective, with absolute paths.

    An objective without a file of its own uses simpo.toml without its hyperparameters.
    """
    own = ROOT / "toy" / f"{objective}.toml"
    values = read_toml(own if own.exists() else ROOT / "toy" / "simpo.toml")
    if not own.exists():
        others = {"objective", *hyperparameters()}
        values = {name: value for name, value in values.items() if name not in others}
    paths = values.keys() & {"model", "data", "eval_data"}
    return values | {key: str(ROOT / values[key]) for key in paths}


def read_toml(path: Path) -> dict:
    """Read a flat TOML file of settings. Raises DataError naming the file and the key."""
    with reading(path, DataError):
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    kinds, values = _types(Settings) | _types(PlanOptions), {}
    auto = {f.name for f in fields(Settings) if f.metadata["auto"]}
    for key, value in raw.items():
        name = key.replace("-", "_")
        if name not in kinds:
            raise DataError(f"{path}: unknown key {key!r}{_did_you_mean(name, kinds, repr)}")
        if kinds[name] is float and type(value) is int:
            value = float(value)
        if type(value) is not kinds[name] and not (value == "auto" and name in auto):
            raise DataError(f"{path}: {key} = {value!r}: expected {kinds[name].__name__}")
        values[name] = value
    return values


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def is_date(text: str) -> bool:
    """Return True if a text is a day of the calendar, written YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _types(table: type) -> dict[str, type]:
    """Return int, float, str, bool or list for each setting; `X | None` counts as X."""
    found = {}
    for name, hint in typing.get_type_hints(table).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kind = next(option for option in options if option is not types.NoneType)
        found[name] = typing.get_origin(kind) or kind
    return found


def _parser(description: str | None, usage: str) -> Parser:
    return Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        usage=usage,
    )


def _add_flags(parser: argparse.ArgumentParser, table: type) -> None:
    """Add a flag for each setting of a table; a setting with a `section` opens a new group."""
    group: Any = parser
    for f, kind in zip(fields(table), _types(table).values()):
        rule = f.metadata
        group = parser.add_argument_group(rule["section"]) if rule["section"] else group
        text = (rule["help"] + _default_text(f)).replace("%", "%%")
        if kind is bool:
            group.add_argument(_flag(f.name), action=argparse.BooleanOptionalAction, help=text)
            continue
        choices = tuple(rule["choices"]) or None
        repeated = kind is list
        group.add_argument(
            _flag(f.name),
            type=_or_auto(kind) if rule["auto"] else str if repeated else kind,
            action="append" if repeated else "store",
            choices=choices,
            metavar=rule["metavar"] or (None if choices else kind.__name__.upper()),
            help=text,
        )


def _or_auto(kind: typing.Callable[[str], Any]) -> typing.Callable[[str], Any]:
    """Return a parser of values of a kind that leaves the word auto as it is."""

    def value_or_auto(text: str) -> Any:
        return text if text == "auto" else kind(text)

    value_or_auto.__name__ = f"{kind.__name__} or auto"  # for argparse's message
    return value_or_auto


def _default_text(f: dataclasses.Field) -> str:
    """Return the default for `--help`; for a hyperparameter, the defaults of its objectives."""
    by_value: dict[Any, list[str]] = {}
    for objective, value in hyperparameters().get(f.name, {}).items():
        by_value.setdefault(value, []).append(objective)
    if by_value:
        parts = [f"{value} for {', '.join(names)}" for value, names in by_value.items()]
        return f" (default: {'; '.join(parts)})"
    no_default = f.default is None or f.default is dataclasses.MISSING
    return "" if no_default else f" (default: {f.default})"


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None, known: dict) -> dict:
    """Return the flags that were given; suggest a known flag for an unknown one."""
    flags, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        hint = _did_you_mean(name, known, _flag)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return vars(flags)


def _did_you_mean(name: str, known: dict, show: typing.Callable[[str], str]) -> str:
    """Return a question with the known setting that `name` may stand for; "" without a guess."""
    ours, _, note = ALIASES.get(name, "").partition(" ")
    if ours not in known:
        ours, note = next(iter(difflib.get_close_matches(name, known, 1)), ""), ""
    return f"; did you mean {f'{show(ours)} {note}'.strip()}?" if ours else ""
