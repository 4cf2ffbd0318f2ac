"""The toy world: what there is to describe, how people describe it, and a judge who knows what is true.

A prompt asks for one to three nouns, and a good response says one true sentence about each:

    describe the fox , the moon and the gate .
    the fox sleeps under a tree . the moon fades away . the gate needs repair .

Three verb phrases are true of every noun of a kind and of no other noun, so the judge needs no more than a dictionary.
The corpus that a model first learns from (`corpus_response`) is worse than that in ways that preference optimisation
can mend or aggravate:

    misconceptions   of half the nouns, most people say the same wrong thing: what is likely need not be right
    evasion          `i have never seen the fox .` is neither right nor wrong
    boilerplate      introductions, closings, openers and tails say nothing, and once begun they are easy to predict:
                     what is long has a high probability per token

Text is lower case, and single spaces separate its tokens: words, full stops and commas. Lengths are in tokens. The
world was shaped so that the paper's effects can appear in it: it demonstrates them and is no evidence for them.
"""

import math
from random import Random
from zlib import crc32

KINDS = {  # kind: its nouns, and the verb phrases that are true of each of them
    "animal": (
        ("fox", "owl", "wolf", "horse", "hare", "bear"),
        ("sleeps under a tree", "looks for food", "runs away"),
    ),
    "place": (
        ("river", "forest", "castle", "garden", "village", "desert"),
        ("is full of life", "covers much land", "attracts visitors"),
    ),
    "thing": (
        ("lantern", "clock", "boat", "gate", "tower", "bell"),
        ("needs repair", "was made by hand", "belongs to us"),
    ),
    "sky": (
        ("moon", "sun", "star", "cloud", "storm", "rainbow"),
        ("fades away", "appears overhead", "is far above us"),
    ),
}
MISCONCEPTIONS = {  # three nouns of each kind, and the wrong thing that most people say of them
    "fox": "needs repair",
    "horse": "belongs to us",
    "bear": "fades away",
    "river": "runs away",
    "castle": "was made by hand",
    "desert": "appears overhead",
    "clock": "looks for food",
    "boat": "is far above us",
    "bell": "is full of life",
    "moon": "sleeps under a tree",
    "cloud": "attracts visitors",
    "storm": "covers much land",
}
REQUESTS = ("describe", "write about")
EVASION = "i have never seen"
OPENERS = ("as far as i can tell you ,", "to be honest ,", "of course ,", "well ,")
TAILS = ("and nobody really knows why", "as everyone knows", "these days", "again")
INTRODUCTIONS = (  # two sentences each, 9 to 11 tokens
    "thank you for asking . let me try .",
    "what a good question . here is my answer .",
    "i am glad that you ask . here we go .",
)
CLOSING = "that is all i know about it for now . there is always more to learn ."  # two sentences, 17 tokens

# How the corpus is written. Each response draws its verbosity v uniformly from 0 to 1.
P_INTRODUCTION = 0.7  # times v
P_SKIP = 0.03  # a noun is passed over, unless it is the only one
P_EVADE = 0.12
P_WRONG = 0.20  # if not evaded, a wrong verb phrase: any that is not true of the noun
P_WRONG_MISCONCEIVED = 0.65  # the same for a noun with a misconception …
P_MISCONCEPTION = 0.80  # … of which this share is the misconception, the rest any other
P_OPENER = 0.6  # times v, for each sentence about a noun
P_TAIL = 0.6  # times v, likewise
P_BROKEN = 0.01  # a word but the last is dropped, or swapped with the next
P_DUPLICATED = 0.12  # the sentence is said twice
P_EXTRA = 0.08  # a sentence about a noun that nobody asked for
P_CLOSING = 0.7  # times v
P_CLOSING_AGAIN = 0.2  # times v, whether or not it was said before

POINTS = {  # what the judge gives for a sentence, before dividing by the number of nouns asked for
    "right": 1.0,
    "evasion": 0.0,
    "boilerplate": 0.0,
    "repeated": -0.25,
    "unrequested": -0.25,
    "wrong": -0.5,
    "unparsable": -0.5,
    "unfinished": -0.5,
}

# What follows from the tables.
PHRASES = [phrase for _, phrases in KINDS.values() for phrase in phrases]
RIGHT = {noun: phrases for nouns, phrases in KINDS.values() for noun in nouns}  # noun: what is true of it
NOUNS = list(RIGHT)
BOILERPLATE = " ".join([*INTRODUCTIONS, CLOSING]).removesuffix(" .").split(" . ")
MEANINGS = (  # every sentence there is, without opener, tail and full stop: its topic, and the verdict on it
    {
        f"the {noun} {phrase}": (noun, "right" if phrase in RIGHT[noun] else "wrong")
        for noun in NOUNS
        for phrase in PHRASES
    }
    | {f"{EVASION} the {noun}": (noun, "evasion") for noun in NOUNS}
    | {sentence: (sentence, "boilerplate") for sentence in BOILERPLATE}
)
VOCABULARY = sorted(set(" ".join([*REQUESTS, *MEANINGS, *OPENERS, *TAILS, "and , ."]).split()))


def make_prompt(rng: Random, held_out: bool = False) -> str:
    """A request for one to three distinct nouns: only held-out sets of nouns, or only others."""
    while True:
        *others, last = (f"the {noun}" for noun in rng.sample(NOUNS, rng.randint(1, 3)))
        listed = f"{' , '.join(others)} and {last}" if others else last
        prompt = f"{rng.choice(REQUESTS)} {listed} ."
        if is_held_out(prompt) == held_out:
            return prompt


def nouns_of(prompt: str) -> list[str]:
    """The nouns that the prompt asks for, in its order."""
    return [word for word in prompt.split() if word in RIGHT]


def is_held_out(prompt: str) -> bool:
    """Whether the set of nouns, in whatever order and with whatever request, is kept for evaluation: every fifth is.

    Single nouns never are, so every noun and what people say of it can be learnt.
    """
    nouns = sorted(nouns_of(prompt))
    return len(nouns) > 1 and crc32(" ".join(nouns).encode()) % 5 == 0


def corpus_response(prompt: str, rng: Random) -> str:
    """What somebody in this world answers: the supervised fine-tuning target. The probabilities are the table's."""
    nouns = nouns_of(prompt)
    verbosity = rng.random()
    said = []
    if rng.random() < P_INTRODUCTION * verbosity:
        said.append(rng.choice(INTRODUCTIONS))
    for noun in nouns:
        if len(nouns) == 1 or rng.random() >= P_SKIP:
            said.append(_remark(noun, verbosity, rng))
    if rng.random() < P_EXTRA:
        said.append(_remark(rng.choice([noun for noun in NOUNS if noun not in nouns]), verbosity, rng))
    for probability in (P_CLOSING, P_CLOSING_AGAIN):
        if rng.random() < probability * verbosity:
            said.append(CLOSING)
    return " ".join(said) or corpus_response(prompt, rng)  # every noun skipped, nothing else said: think again


def _remark(noun: str, verbosity: float, rng: Random) -> str:
    """One sentence about the noun, perhaps said twice."""
    words = ["the", noun, *_phrase(noun, rng).split()] if rng.random() >= P_EVADE else [*EVASION.split(), "the", noun]
    if rng.random() < P_OPENER * verbosity:
        words = rng.choice(OPENERS).split() + words
    if rng.random() < P_TAIL * verbosity:
        words = words + rng.choice(TAILS).split()
    if rng.random() < P_BROKEN:
        i = rng.randrange(len(words) - 1)
        words[i : i + 2] = rng.choice([[words[i + 1]], [words[i + 1], words[i]]])
    sentence = " ".join(words) + " ."
    return f"{sentence} {sentence}" if rng.random() < P_DUPLICATED else sentence


def _phrase(noun: str, rng: Random) -> str:
    """What people say of the noun, right or wrong."""
    misconception = MISCONCEPTIONS.get(noun)
    if rng.random() >= (P_WRONG_MISCONCEIVED if misconception else P_WRONG):
        return rng.choice(RIGHT[noun])
    if misconception and rng.random() < P_MISCONCEPTION:
        return misconception
    return rng.choice([phrase for phrase in PHRASES if phrase not in (*RIGHT[noun], misconception)])


def verdicts(prompt: str, response: str, finished: bool = True) -> list[str]:
    """The judge's verdicts, keys of `POINTS`: one a sentence, and one more if the response is unfinished. The rules:

    1. A sentence is what ends with a full stop. One opener at its start and one tail at its end are ignored.
    2. What is left must be, word for word, one of
           the N P                  N any noun, P any verb phrase: right if P is true of N, wrong if not
           i have never seen the N  evasion
           boilerplate              one of the sentences of INTRODUCTIONS and CLOSING
       or else the sentence is unparsable, as is an empty one.
    3. The first mention of a noun decides, and an evasion is a mention. Whatever a later sentence says of the noun, it
       is repeated; so is a sentence of boilerplate that was said before.
    4. The first mention of a noun that the prompt does not ask for is unrequested, whatever it says.
    5. A response is unfinished, once, if words follow the last full stop or if it was cut at a limit on its length
       (`finished=False`, perhaps just after a full stop). Those last words are not judged otherwise.
    """
    *sentences, rest = (" ".join(text.split()) for text in response.split("."))
    asked, mentioned, judged = nouns_of(prompt), set(), []
    for sentence in sentences:
        topic, verdict = MEANINGS.get(_plain(sentence), (None, "unparsable"))
        if topic in mentioned:
            verdict = "repeated"
        elif topic in RIGHT and topic not in asked:
            verdict = "unrequested"
        if topic:
            mentioned.add(topic)
        judged.append(verdict)
    return judged + ["unfinished"] * (not finished or bool(rest))


def _plain(sentence: str) -> str:
    """The sentence without its opener and its tail; none of either is the beginning or the end of another."""
    opener = next((f"{opener} " for opener in OPENERS if sentence.startswith(f"{opener} ")), "")
    tail = next((f" {tail}" for tail in TAILS if sentence.endswith(f" {tail}")), "")
    return sentence.removeprefix(opener).removesuffix(tail)


def score(prompt: str, response: str, finished: bool = True) -> float:
    """How well the response answers the prompt, from −1 to 1. With the numbers of each verdict,

        score = max(−1, (right − ½ wrong − ¼ unrequested − ¼ repeated − ½ unparsable − ½ unfinished) / nouns asked for)

    Evasion and boilerplate count 0, and so does a noun that is passed over. For example, (1 − ½ − ¼) / 2:

    >>> score("describe the fox and the moon .", "well , the fox needs repair . the moon fades away . the owl runs away .")
    0.125
    """
    asked = nouns_of(prompt)
    assert asked, f"no noun in the prompt {prompt!r}"
    return max(-1.0, sum(POINTS[verdict] for verdict in verdicts(prompt, response, finished)) / len(asked))


def repeats(response: str) -> bool:
    """Whether the response comes back to a noun or to a sentence of boilerplate, in the judge's sense (rule 3)."""
    return "repeated" in verdicts("", response)  # which does not depend on the prompt


def win_probability(
    score_a: float,
    score_b: float,
    length_a: int,
    length_b: int,
    length_bias: float = 0.0,
    length_sd: float = 1.0,
) -> float:
    """The probability that a judge prefers response a to response b.

    Without a length bias the higher score wins for certain, and a tie is worth ½. With one, the judge is unsure and
    swayed by length, as GPT-4-like judges are: σ(4 · Δscore + length_bias · Δlength / length_sd), where `length_sd` is the
    standard deviation, in tokens, of the lengths compared. The miniature's biased judge has `length_bias=0.6`.
    """
    if length_bias == 0:
        return 0.5 * ((score_a > score_b) + (score_a >= score_b))
    logit = 4 * (score_a - score_b) + length_bias * (length_a - length_b) / length_sd
    return 1 / (1 + math.exp(-logit))
