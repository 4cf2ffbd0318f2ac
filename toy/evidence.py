"""Say what training on the toy has done to the model's answers, as the judge of its world sees it.

`train.py` ends with these lines if it trained the embedded checkpoint and has at least `FEWEST`
held-out prompts. The judge is `verdicts` in toy/world.py. toy/RESULTS.md compares the methods.
"""

import json
import statistics
import textwrap
from pathlib import Path
from typing import Any

from data import Pair
from formats.checkpoint import load
from formats.tokenizer import Tokenizer
from sample import generate
from toy import world

FEWEST = 300  # prompts: with fewer, two standard errors of a win rate exceed six points
DECODING: dict[str, Any] = {"max_new_tokens": 128, "temperature": 0.7, "batch_size": 256}
WORLD = (
    "The world: a good answer says one true thing about each noun, and every noun",
    "has three. The people it learnt from ramble, and most say the same wrong thing",
    "about half of the nouns.",
)
RECORDED = ("SimPO", "DPO", "no length norm")  # methods of results.json
# RESULTS.md has these findings, and a test holds them to its numbers.
LESSON = (
    "Every method beats the model before training. SimPO and DPO tie, whatever one",
    "run says. Without length normalisation, answers grow long and win less often.",
)


def judged(prompts: list[str], answers: list[list[int]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return "texts", "verdicts", "scores" and "lengths" of answers (token ids), one per prompt."""
    texts = [tokenizer.decode(answer) for answer in answers]
    finished = [answer[-1] in tokenizer.stop_ids for answer in answers]
    asked = list(zip(prompts, texts, finished))
    return {
        "texts": texts,
        "verdicts": [world.verdicts(*one) for one in asked],
        "scores": [world.score(*one) for one in asked],
        "lengths": [len(text.split()) for text in texts],
    }


def win_rate(scores: list[float], others: list[float]) -> float:
    """Return how often, in percent, an answer has the higher score; a tie counts ½."""
    return 100 * statistics.mean(world.win_probability(a, b, 0, 0) for a, b in zip(scores, others))


def evidence(source: Path, model: Path, tokenizer: Tokenizer, held_out: list[Pair]) -> list[str]:
    """Answer the held-out prompts before and after training; return the judge's findings as lines.

    Answers are sampled at temperature 0.7, with other random numbers before than after. Those to
    the first three prompts are quoted. Returns [] if there are fewer than `FEWEST` prompts, or if
    one asks for nothing in this world.
    """
    ids = [pair.prompt.tolist() for pair in held_out]
    prompts = [tokenizer.decode(prompt) for prompt in ids]
    if len(prompts) < FEWEST or not all(map(world.nouns_of, prompts)):
        return []
    print(f"answering {len(prompts)} held-out prompts, before and after …", flush=True)
    before, after = (
        judged(prompts, generate(load(folder), ids, **decoding, seed=seed), tokenizer)
        for decoding in [DECODING | {"stop_ids": tokenizer.stop_ids}]
        for seed, folder in enumerate((source, model))
    )
    rate = win_rate(after["scores"], before["scores"])
    score, length = (
        [statistics.mean(found[key]) for found in (before, after)] for key in ("scores", "lengths")
    )
    lines = [*WORLD, "", "The first three held-out prompts, and the judge's score and verdicts:"]
    for i, prompt in enumerate(prompts[:3]):
        lines += [f"  {prompt}", *_quoted("before", before, i), *_quoted("after", after, i)]
    return [
        *lines,
        "",
        f"The judge on the answers to all {len(prompts)} held-out prompts:",
        f"  win rate            50.0 %  →  {rate:.1f} %   against before; a tie counts ½",
        f"  score            {score[0]:+7.2f}    →  {score[1]:+.2f}    from −1 to 1",
        f"  length           {length[0]:7.1f}    →  {length[1]:.1f}     tokens",
        "",
        *recorded(),
    ]


def _quoted(when: str, found: dict[str, Any], i: int) -> list[str]:
    """Return answer i, each sentence behind the verdict on it, in lines of a narrow terminal."""
    rows = []
    for verdict, sentence in zip(found["verdicts"][i], found["texts"][i].split(".")):
        first, *others = textwrap.wrap(sentence.strip(), 80 - 31) or [""]
        rows += [f"{verdict:11}  {first}", *(f"{'':13}{line}" for line in others)]
    first, *others = rows or ["says nothing"]
    return [f"    {when:6} {found['scores'][i]:+.2f}  {first}", *(f"{'':18}{r}" for r in others)]


def recorded() -> list[str]:
    """Return what toy/results.json says of the methods, and what follows from it."""
    record = json.loads((Path(__file__).parent / "results.json").read_text(encoding="utf-8"))
    seeds = record["seeds"]
    lines = [f"The same for {len(seeds)} models of other seeds (toy/RESULTS.md), mean ± sd:"]
    for method in RECORDED:
        rates, lengths = ([s["methods"][method][k] for s in seeds] for k in ("win_rate", "length"))
        rate = f"{statistics.mean(rates):.1f} ± {statistics.stdev(rates):.1f} %"
        lines += [f"  {method:14} win rate {rate}, length {statistics.mean(lengths):.1f}"]
    return [*lines, *LESSON]


if __name__ == "__main__":
    print(__doc__)
