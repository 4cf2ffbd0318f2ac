"""List the flags of sample.py in one table: default, meaning and bounds.

runtime/settings.py parses it, as it does the settings of train.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from formats.benchmarks import BENCHMARKS, Benchmark
from formats.candidates import SETTINGS
from formats.errors import DataError
from runtime.settings import ROOT, auto_dtype, is_date, of_old_gpu, option

TOY = ROOT / "toy" / "checkpoint"
USAGE = "sample.py [--flag value ...]     (--help explains every flag)"


@dataclass
class Flags:
    """Holds the flags of one call of `sample.py`."""

    model: str = option(
        str(TOY),
        "checkpoint: a Hugging Face folder or a hub id NAME[@REVISION]",
        metavar="DIR",
        section="what to answer",
    )
    chat_template: str | None = option(
        None,
        "file with a jinja2 chat template instead of the checkpoint's; 'none' for plain text",
        metavar="FILE",
    )
    date: str | None = option(
        None,
        "the day that a chat template gets if it asks for one, YYYY-MM-DD; default: today, or that "
        "of the unfinished --out",
        metavar="DATE",
    )
    prompt: list[str] = option([], "a prompt; may be given several times", metavar="TEXT")
    prompts: str | None = option(
        None,
        "file of prompts: .txt with one prompt per line, or records with `prompt` or `messages` "
        "(.jsonl, .json, .jsonl.gz, .parquet)",
        metavar="FILE",
    )
    limit: int | None = option(None, "answer only the first N prompts", least=1, metavar="N")
    chat: bool = option(False, "chat in the terminal")

    num_samples: int = option(
        1, "responses per prompt", least=1, most=10_000, metavar="N", section="decoding"
    )
    temperature: float | None = option(
        None,
        "0 is greedy, 1 samples from the model's own distribution; default: 0, or with --format "
        "mt_bench the temperature of each category. The paper samples AlpacaEval at 0.9 from "
        "Llama 3, 0.7 from Mistral-Base and 0.5 from Mistral-Instruct, and Arena-Hard greedily",
        least=0,
        metavar="T",
    )
    top_p: float = option(
        1.0,
        "sample from the fewest tokens that together reach probability P; 1 is off",
        above=0,
        most=1,
        metavar="P",
    )
    top_k: int = option(0, "sample from the K likeliest tokens; 0 is off", least=0, metavar="K")
    max_new_tokens: int = option(512, "longest response, in tokens", least=1, metavar="N")
    seed: int = option(0, "seed of the random numbers", least=0, below=2**64, metavar="N")

    out: str | None = option(
        None,
        "write one record per prompt, with its `responses`, to FILE (.jsonl); default: print. With "
        "a list of `scores` added to each record, train.py can train on it",
        metavar="FILE",
        section="output",
    )
    overwrite: bool = option(
        False, "replace --out, and an unfinished file written with other settings"
    )
    format: str | None = option(
        None, "read this benchmark's question file and write its answer file", choices=BENCHMARKS
    )
    generator: str | None = option(
        None, "model's name in an answer file; default: its hub id, folder or run", metavar="NAME"
    )

    batch_size: int = option(
        32,
        "sequences to decode at once; it changes no answer, except by rounding",
        least=1,
        metavar="N",
        section="hardware",
    )
    dtype: str = option(
        "auto",
        "dtype to compute in; auto is bf16 on a GPU of compute capability 8 or later, else fp32",
        choices=("auto", "bf16", "fp32"),
    )
    device: str = option(
        "auto", "auto is cuda if available, else cpu", choices=("auto", "cpu", "cuda")
    )

    def problem(self) -> str | None:
        """Return the first conflict between two flags, in words; None if there is none."""
        if self.date and not is_date(self.date):
            return f"--date {self.date}: expected a day as YYYY-MM-DD"
        if self.num_samples > 1 and not self.temperature:
            return "--num-samples needs a --temperature above 0: greedy samples are all the same"
        if self.chat and (self.prompt or self.prompts or self.out):
            return "--chat excludes --prompt, --prompts and --out"
        if self.format and not (self.prompts and self.out):
            return "--format needs --prompts and --out"
        if self.format and (self.prompt or self.num_samples > 1):
            return "--format excludes --prompt and --num-samples"
        if self.out and Path(self.out).exists() and not self.overwrite:
            return f"{self.out} exists: pass --overwrite to replace it"
        return None

    def resolve_auto(self) -> tuple[str, torch.dtype]:
        """Settle what `auto` means on this machine; return the device and the dtype to load in.

        Raises:
            DataError: there is no CUDA device.
        """
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise DataError("--device cuda: no CUDA device available")
        if self.device == "auto":
            self.device = "cuda" if cuda else "cpu"
        if self.dtype == "auto":
            self.dtype = auto_dtype(self.device)
            if (self.device, self.dtype) == ("cuda", "fp32"):
                print(f"warning: {of_old_gpu(torch.cuda.get_device_name())}", file=sys.stderr)
        return self.device, torch.bfloat16 if self.dtype == "bf16" else torch.float32

    @property
    def benchmark(self) -> Benchmark | None:
        """Return the benchmark that --format names; None without --format."""
        return BENCHMARKS[self.format] if self.format else None

    @property
    def decoding(self) -> dict:
        """Return the options of `sample.decode` that are the same for all prompts."""
        names = ("max_new_tokens", "top_p", "top_k", "seed", "batch_size")
        return {name: getattr(self, name) for name in names}

    @property
    def generation(self) -> dict:
        """Return the settings that shape an answer, by name, for a candidate file's records."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return values | ({"date": self.date} if self.date else {})
