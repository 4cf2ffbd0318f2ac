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
OPENERS = ("as far as i can tell you ,", "to be honest ,", "of course ,")
TAILS = ("and nobody really knows why", "as everyone knows", "these days")
INTRODUCTIONS = (  # two sentences each, 9 to 11 tokens
    "thank you for asking . let me try .",
    "what a good question . here is my answer .",
    "i am glad that you ask . here we go .",
)
CLOSINGS = (  # two sentences each, 17 tokens
    "that is all i know about it for now . there is always more to learn .",
    "i hope this is of some help to you . please ask me again any time .",
)

# How the corpus is written. Each response draws its verbosity v uniformly from 0 to 1.
P_INTRODUCTION = 0.7  # times v
P_SKIP = 0.03  # a noun is passed over, unless it is the only one
P_EVADE = 0.12
P_WRONG = 0.20  # a wrong verb phrase, where no misconception is about
P_WRONG_MISCONCEIVED = 0.65  # a wrong verb phrase, where one is …
P_MISCONCEPTION = 0.80  # … and that it is the misconception, not just any wrong phrase
P_OPENER = 0.6  # times v, for each sentence about a noun
P_TAIL = 0.6  # times v, likewise
P_BROKEN = 0.01  # a word of the sentence is dropped, or swapped with the next
P_DUPLICATED = 0.12  # the sentence is said twice
P_EXTRA = 0.08  # a sentence about a noun that nobody asked for
P_CLOSING = 0.7  # times v
P_SECOND_CLOSING = 0.2  # times v; it may be the same closing again

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
MEANINGS = (  # every sentence there is, without opener, tail and full stop: what it is about, and the verdict on it
    {f"the {noun} {phrase}": (noun, "right" if phrase in RIGHT[noun] else "wrong") for noun in NOUNS for phrase in PHRASES}
    | {f"{EVASION} the {noun}": (noun, "evasion") for noun in NOUNS}
    | {line: (line, "boilerplate") for text in INTRODUCTIONS + CLOSINGS for line in text.removesuffix(" .").split(" . ")}
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
    for chance in (P_CLOSING, P_SECOND_CLOSING):
        if rng.random() < chance * verbosity:
            said.append(rng.choice(CLOSINGS))
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
        words[i : i + 2] = rng.choice([words[i : i + 1], [words[i + 1], words[i]]])
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
    """The judge's verdict on each sentence, a key of `POINTS`. The rules, in the order in which they are applied:

    1. A sentence is what stands before a full stop. One opener at its start and one tail at its end are ignored.
    2. What is left must be word for word one of
           `the N P`                  N any noun, P any verb phrase: right if P is true of N, else wrong
           `i have never seen the N`  evasion
           a line of boilerplate      one of the sentences in INTRODUCTIONS and CLOSINGS
       or the sentence is unparsable; so are an empty sentence and one that is all opener or tail.
    3. A noun or a line of boilerplate that an earlier sentence was about makes the sentence repeated, whatever it says
       now: the first mention decides, and an evasion is a mention.
    4. A first mention of a noun that the prompt does not ask for is unrequested, whatever it says.
    5. Words after the last full stop are unfinished. So is a text that was cut by a limit on its length
       (`finished=False`), even right after a full stop; it counts once, not once more for the words it was cut in.
    """
    *sentences, rest = (" ".join(text.split()) for text in response.split("."))
    asked, seen, given = nouns_of(prompt), set(), []
    for sentence in sentences:
        topic, verdict = MEANINGS.get(_undecorated(sentence), (None, "unparsable"))
        if topic in seen:
            verdict = "repeated"
        elif topic in RIGHT and topic not in asked:
            verdict = "unrequested"
        if topic:
            seen.add(topic)
        given.append(verdict)
    return given + ["unfinished"] * (bool(rest) or not finished)


def _undecorated(sentence: str) -> str:
    """The sentence without one opener and one tail."""
    opener = next((opener for opener in OPENERS if sentence.startswith(opener)), "")
    tail = next((tail for tail in TAILS if sentence.endswith(tail)), "")
    return sentence.removeprefix(opener).removesuffix(tail).strip()


def score(prompt: str, response: str, finished: bool = True) -> float:
    """How well the response answers the prompt: 1 at best, 0 for saying nothing, −1 at worst.

        score = max(−1, (right − ½ wrong − ¼ unrequested − ¼ repeated − ½ unparsable − ½ unfinished) / nouns asked for)

    counts the verdicts; evasion and boilerplate count nothing, and a noun that is not mentioned earns nothing.
    """
    points = sum(POINTS[verdict] for verdict in verdicts(prompt, response, finished))
    return max(-1.0, points / len(nouns_of(prompt)))


def repeats(response: str) -> bool:
    """Whether a sentence occurs twice, word for word."""
    sentences = response.split(" .")[:-1]
    return len(set(sentences)) < len(sentences)


def win_probability(
    score_a: float,
    score_b: float,
    length_a: int,
    length_b: int,
    length_bias: float = 0.0,
    length_sd: float = 1.0,
) -> float:
    """The probability that a judge prefers response a to response b.

    Without a length bias the higher score wins for certain, and a tie is worth ½. With one, the judge is as unsure as
    GPT-4-like judges are, and swayed by length: σ(4 · Δscore + length_bias · Δlength / length_sd), lengths in tokens.
    The study's biased judge has `length_bias=0.6`, with the standard deviation of all lengths compared.
    """
    if length_bias == 0:
        return 0.5 * ((score_a > score_b) + (score_a >= score_b))
    logit = 4 * (score_a - score_b) + length_bias * (length_a - length_b) / length_sd
    return 1 / (1 + math.exp(-logit))
