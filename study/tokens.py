"""Write a page that shows what training did to the log-probability of every response token.

    python -m study.tokens --policy runs/simpo-1 --policy "no norm=runs/simpo-2" \\
        --data toy/heldout.jsonl --out tokens.html

The page is one HTML file without network or libraries: prompt, chosen and rejected response of each
pair, every token coloured by log π(token) − log π_ref(token) in nats, the numbers at the pointer,
rewards and margins, and the pair's margin among all, for several runs side by side.

The reference is the checkpoint that the runs started from, as their config.json records it, or
`--reference`. Rewards are those of `python -m study.analyze rewards`. Read next: study/tokens.html.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data
from data import Pair, pack
from formats import checkpoint
from formats.errors import CheckpointError, DataError, InputError
from formats.progress import Progress
from formats.tokenizer import Tokenizer, read_template
from methods.objectives import OBJECTIVES
from model import Llama, to_device
from runtime.settings import Parser, Settings
from study.analyze import FLAGS_OVER_RECORD, open_policy, read_pairs, rewards_of
from study.labels import described, folder_name, labels, recorded_settings

PROGRAM = "python -m study.tokens"
LARGEST = 1_900_000  # bytes of the pairs; a page stays below 2 MB
TokenLogps = list[list[np.ndarray]]  # [pair][chosen, rejected] → [tokens], in nats


@torch.no_grad()
def token_logps(model: Llama, pairs: list[Pair], microbatch_tokens: int = 8192) -> TokenLogps:
    """Return the log-probability of every response token; their sums are `train.response_logps`."""
    found: TokenLogps = [[] for _ in pairs]
    device = checkpoint.compute_device(model)
    rounds = list(data.assign([pair.tokens for pair in pairs], 1, microbatch_tokens))
    for [share] in Progress("scoring", rounds):
        packed: dict[str, Any] = pack([pairs[i] for i in share])
        for name in packed.keys() - {"cu_q", "cu_k"}:  # these stay on the CPU
            packed[name] = to_device(packed[name], device)
        lengths = [len(response) for i in share for response in pairs[i].responses]
        logps = iter(np.split(model(**packed).cpu().numpy(), np.cumsum(lengths)[:-1]))
        for i in share:
            found[i] = [next(logps) for _ in pairs[i].responses]
    return found


def pieces(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """Return the text that each token adds, special tokens included.

    A token that ends within a character adds "", and the one that completes it the character.
    """
    texts: list[str] = []
    first = shown = 0  # decoded from `first` on, since the text of a token depends on its neighbour
    for end in range(1, len(ids) + 1):
        before, text = (
            tokenizer.backend.decode(ids[first:stop].tolist(), skip_special_tokens=False)
            for stop in (shown, end)
        )
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
        else:
            texts.append(text[len(before) :])
            first, shown = shown, end
    return texts


def read(source: Path, flags: argparse.Namespace, settings: Settings) -> tuple[list[Pair], Counter]:
    """Return the pairs of the first `--limit` records, cut as in training, and what was cut."""
    tokenizer = Tokenizer(source, read_template(settings.chat_template))
    tokenizer.check_fits(checkpoint.read_config(source).vocab_size)
    assert settings.max_prompt_length  # Settings derives it from max_length
    rules = settings.max_length, settings.max_prompt_length, settings.like_authors
    return read_pairs(flags.data, tokenizer, *rules, flags.limit, settings.named_columns)


def ids(pair: Pair) -> list[list[int]]:
    return [part.tolist() for part in (pair.prompt, *pair.responses)]


def score(source: Path, pairs: list[Pair], name: str) -> TokenLogps:
    print(f"{name}: scoring {len(pairs)} pairs with {source} …", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    logps = token_logps(checkpoint.load(source, device, dtype), pairs)
    if not all(np.isfinite(response).all() for pair in logps for response in pair):
        raise CheckpointError(f"{source}: gives log-probabilities that are not finite")
    return logps


def run_entry(name: str, settings: Settings, logps: TokenLogps, before: TokenLogps) -> dict:
    """Return what the page holds about a run: its name and its rewards [pair][response]."""
    summed, reference = (
        torch.tensor([[float(r.sum(dtype=np.float64)) for r in pair] for pair in table])
        for table in (logps, before)
    )
    lengths = torch.tensor([[len(response) for response in pair] for pair in logps])
    rewards = rewards_of(settings, summed, lengths, reference).double().round(decimals=4)
    keys = OBJECTIVES[settings.objective].defaults.keys() - {"label_smoothing", "reference"}
    hyperparameters = [described(key, getattr(settings, key)) for key in sorted(keys)]
    reward = f"reward of {', '.join([settings.objective, *hyperparameters])}"
    return {"name": name, "reward": reward, "rewards": rewards.tolist()}


def pair_entry(pair: Pair, tokenizer: Tokenizer, tables: list[list[np.ndarray]]) -> dict[str, Any]:
    """Return what the page holds about a pair, in thousandths of a nat; tables: before, *after."""
    before, *after = [[np.rint(1000 * x).astype(int).tolist() for x in table] for table in tables]
    return {
        "where": Path(pair.where).name,
        "prompt": "".join(pieces(tokenizer, pair.prompt)),
        "tokens": [pieces(tokenizer, response) for response in pair.responses],
        "before": before,
        "after": after,
    }


def strongest(before: TokenLogps, after: list[TokenLogps]) -> float:
    """Return the change in nats that has the strongest colour: 95 % of all changes are smaller."""
    flat = [np.concatenate([x for pair in table for x in pair]) for table in (before, *after)]
    return max(0.1, float(np.quantile(np.abs(np.array(flat[1:]) - flat[0]), 0.95)))


def as_json(value: Any) -> str:
    """Return JSON without "<": the texts of strangers cannot end the script that holds them."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def page(values: dict[str, Any]) -> str:
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return template.replace("DATA", as_json(values), 1)


def named(policies: list[str]) -> dict[str, str]:
    """Return name → folder for `NAME=DIR`, and for `DIR`, whose name says how the runs differ."""
    split = [("", "", p) if Path(p).exists() else p.rpartition("=") for p in policies]
    folders = [folder for _, _, folder in split]
    found = labels(folders, [recorded_settings(folder) for folder in folders])
    names = [name or label for (name, _, _), label in zip(split, found)]
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise DataError(f"--policy: two are called {twice[0]!r}; name them: --policy NAME=DIR")
    return dict(zip(names, folders))


def explore(flags: argparse.Namespace) -> None:
    """Write the page.

    Raises:
        DataError: two policies have one name, start from different models, or read other tokens.
    """
    opened = {name: open_policy(folder, flags) for name, folder in named(flags.policy).items()}
    references = {settings.model for _, settings in opened.values()}
    if len(references) != 1 or not (reference := references.pop()):
        raise DataError("pass --reference, the checkpoint that training started from")
    source, settings = checkpoint.checkpoint_folder(reference), next(iter(opened.values()))[1]
    pairs, counts = read(source, flags, settings)
    for what, n in counts.items():
        print(f"{flags.data}: {n} {what}", file=sys.stderr)
    for name, (folder, own) in opened.items():
        if [*map(ids, read(folder, flags, own)[0])] != [*map(ids, pairs)]:
            raise DataError(f"--policy {name}: reads {flags.data} as other tokens than {reference}")
    before = score(source, pairs, "reference")
    after = [score(folder, pairs, name) for name, (folder, _) in opened.items()]
    tokenizer = Tokenizer(source, read_template(settings.chat_template))
    tables = Progress("decoding", list(zip(pairs, before, *after)))
    found = [pair_entry(pair, tokenizer, logps) for pair, *logps in tables]
    sizes = np.cumsum([len(as_json(entry).encode(errors="replace")) for entry in found])
    count = max(1, int((sizes < LARGEST).sum()))
    if count < len(found):
        print(f"{flags.data}: {count} of {len(found)} pairs fill a page of 2 MB")
    scored = zip(opened.items(), after)
    runs = [run_entry(n, own, x[:count], before[:count]) for (n, (_, own)), x in scored]
    about = f"{folder_name(flags.data)}; before training: {folder_name(reference)}"
    values = {"about": about, "scale": strongest(before, after), "runs": runs}
    html = page(values | {"pairs": found[:count]}).encode(errors="replace")
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_bytes(html)
    print(f"{flags.out}: {count} pairs, {len(runs)} runs, {len(html) // 1000} kB")


def read_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Exits with status 2 and one line on stderr for a usage error."""
    how = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=PROGRAM, description=__doc__, formatter_class=how, allow_abbrev=False)
    add = parser.add_argument
    text = "a run of train.py, a Hugging Face folder or a hub id, and its name on the page; several"
    add("--policy", action="append", required=True, metavar="[NAME=]DIR", help=text)
    text = "the model before training (default: the checkpoint that the runs started from)"
    add("--reference", dest="model", metavar="DIR", help=text)
    add("--data", required=True, metavar="PAIRS", help="pairs in any format that train.py reads")
    add("--limit", type=int, default=50, metavar="N", help="records to show (default: 50)")
    choices = [name for name, objective in OBJECTIVES.items() if objective.loss]
    text = "the objective that defines the reward (default: the run's, or simpo)"
    add("--objective", choices=choices, help=text)
    add("--out", type=Path, required=True, metavar="FILE.html", help="the page")
    parser.set_defaults(**dict.fromkeys({*FLAGS_OVER_RECORD} - {"model", "objective"}))
    flags = parser.parse_args(argv)
    if flags.limit < 1:
        parser.error("--limit: expected a positive number")
    return flags


def main() -> None:
    flags = read_flags()
    try:
        explore(flags)
    except (InputError, OSError) as e:
        sys.exit(f"{PROGRAM}: error: {e}")


if __name__ == "__main__":
    main()
