"""Define the toy world: what can be described, how people describe it, and a judge of the truth.

A prompt asks for one to three nouns. A good response says one true sentence about each:

    describe the fox , the moon and the gate .
    the fox sleeps under a tree . the moon fades away . the gate needs repair .

Three verb phrases are true of every noun of a kind and of no other noun, so the judge needs no more
than a dictionary. The corpus that a model learns from first (`corpus_response`) is worse, in ways
that preference optimisation can mend or aggravate:

    misconceptions   for half the nouns, most people say the same wrong thing: likely is not true
    evasion          `i have never seen the fox .` is neither right nor wrong
    boilerplate      introductions, closings, openers and tails say nothing. Once begun they are
                     easy to predict, so long text has a high probability per token

Text is lower case. Its tokens are words, full stops and commas, separated by single spaces; lengths
are in tokens. The world was shaped so that the paper's effects can appear in it. It demonstrates
them and is no evidence for them.

Read `verdicts` next: the rules of the judge. `toy/make.py` and `toy/miniature.py` use this world.
"""

import math
from random import Random
from zlib import crc32

KINDS = {  # kind: its nouns, and the verb phrases that are true of each
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
MISCONCEPTIONS = {  # three nouns of each kind, and the wrong thing that most people say
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
# two sentences, 17 tokens
CLOSING = "that is all i know about it for now . there is always more to learn ."

# Probabilities of the corpus. Each response draws its verbosity v uniformly from 0 to 1.
P_INTRODUCTION = 0.7  # times v
P_SKIP = 0.03  # a noun is skipped, unless it is the only one
P_EVADE = 0.12
P_WRONG = 0.20  # if not evaded, any verb phrase that is not true of the noun
P_WRONG_MISCONCEIVED = 0.65  # the same for a noun with a misconception …
P_MISCONCEPTION = 0.80  # … of which this share is the misconception, the rest any other phrase
P_OPENER = 0.6  # times v, for each sentence about a noun
P_TAIL = 0.6  # times v, likewise
P_BROKEN = 0.01  # a word except the last is dropped, or swapped with the next
P_DUPLICATED = 0.12  # the sentence is said twice
P_EXTRA = 0.08  # a sentence about a noun that was not asked for
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

# Derived from the tables.
PHRASES = [phrase for _, phrases in KINDS.values() for phrase in phrases]
# noun: the verb phrases that are true of it
RIGHT = {noun: phrases for nouns, phrases in KINDS.values() for noun in nouns}
NOUNS = list(RIGHT)
BOILERPLATE = " ".join([*INTRODUCTIONS, CLOSING]).removesuffix(" .").split(" . ")
# Every sentence, without opener, tail and full stop: its topic, and the verdict on it.
MEANINGS = (
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
    """Return a request for one to three distinct nouns, with a held-out set of nouns or another."""
    while True:
        *others, last = (f"the {noun}" for noun in rng.sample(NOUNS, rng.randint(1, 3)))
        listed = f"{' , '.join(others)} and {last}" if others else last
        prompt = f"{rng.choice(REQUESTS)} {listed} ."
        if is_held_out(prompt) == held_out:
            return prompt


def nouns_of(prompt: str) -> list[str]:
    """Return the nouns that the prompt asks for, in its order."""
    return [word for word in prompt.split() if word in RIGHT]


def is_held_out(prompt: str) -> bool:
    """Return True if the set of nouns is kept for evaluation, as every fifth set is.

    Neither the order of the nouns nor the request matters. Single nouns are never held out, so
    every noun and what people say about it can be learnt.
    """
    nouns = sorted(nouns_of(prompt))
    return len(nouns) > 1 and crc32(" ".join(nouns).encode()) % 5 == 0


def corpus_response(prompt: str, rng: Random) -> str:
    """Return what somebody in this world answers: the target of supervised fine-tuning."""
    nouns = nouns_of(prompt)
    verbosity = rng.random()
    said = []
    if rng.random() < P_INTRODUCTION * verbosity:
        said.append(rng.choice(INTRODUCTIONS))
    for noun in nouns:
        if len(nouns) == 1 or rng.random() >= P_SKIP:
            said.append(_remark(noun, verbosity, rng))
    if rng.random() < P_EXTRA:
        other = rng.choice([noun for noun in NOUNS if noun not in nouns])
        said.append(_remark(other, verbosity, rng))
    for probability in (P_CLOSING, P_CLOSING_AGAIN):
        if rng.random() < probability * verbosity:
            said.append(CLOSING)
    return " ".join(said) or corpus_response(prompt, rng)  # nothing was said: try again


def _remark(noun: str, verbosity: float, rng: Random) -> str:
    """Return one sentence about the noun, sometimes twice."""
    if rng.random() >= P_EVADE:
        words = ["the", noun, *_phrase(noun, rng).split()]
    else:
        words = [*EVASION.split(), "the", noun]
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
    """Return a verb phrase that people say about the noun, right or wrong."""
    misconception = MISCONCEPTIONS.get(noun)
    if rng.random() >= (P_WRONG_MISCONCEIVED if misconception else P_WRONG):
        return rng.choice(RIGHT[noun])
    if misconception and rng.random() < P_MISCONCEPTION:
        return misconception
    return rng.choice([phrase for phrase in PHRASES if phrase not in (*RIGHT[noun], misconception)])


def verdicts(prompt: str, response: str, finished: bool = True) -> list[str]:
    """Return the judge's verdicts, keys of `POINTS`: one per sentence, and perhaps "unfinished".

    1. A sentence ends with a full stop. One opener at its start and one tail at its end are
       ignored.
    2. The rest must be, word for word, one of

           the N P                  N any noun, P any verb phrase: right if P is true of N, or wrong
           i have never seen the N  evasion
           boilerplate              one of the sentences of INTRODUCTIONS and CLOSING

       or else the sentence is unparsable, as is an empty one.
    3. The first mention of a noun decides, and an evasion is a mention. A later sentence about the
       noun is repeated, whatever it says. So is boilerplate that was said before.
    4. The first mention of a noun that was not asked for is unrequested, whatever it says.
    5. A response is unfinished, once, if words follow the last full stop, or if it was cut at a
       limit on its length (`finished=False`), even just after a full stop. Words after the last
       full stop are not judged otherwise.
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
    """Return the sentence without its opener and its tail."""
    # No opener begins another, and no tail ends another.
    opener = next((f"{opener} " for opener in OPENERS if sentence.startswith(f"{opener} ")), "")
    tail = next((f" {tail}" for tail in TAILS if sentence.endswith(f" {tail}")), "")
    return sentence.removeprefix(opener).removesuffix(tail)


def score(prompt: str, response: str, finished: bool = True) -> float:
    """Return how well the response answers the prompt, from −1 to 1.

    With the number of sentences that got each verdict, and n nouns asked for,

        score = max(−1, (right − ½ wrong − ¼ unrequested − ¼ repeated − ½ unparsable
                         − ½ unfinished) / n)

    Evasion, boilerplate and a skipped noun count 0. For example, (1 − ½ − ¼) / 2:

    >>> said = "well , the fox needs repair . the moon fades away . the owl runs away ."
    >>> score("describe the fox and the moon .", said)
    0.125
    """
    asked = nouns_of(prompt)
    assert asked, f"no noun in the prompt {prompt!r}"
    points = sum(POINTS[verdict] for verdict in verdicts(prompt, response, finished))
    return max(-1.0, points / len(asked))


def repeats(response: str) -> bool:
    """Return True if the response repeats a noun or a sentence of boilerplate (rule 3)."""
    return "repeated" in verdicts("", response)  # rule 3 does not depend on the prompt


def win_probability(
    score_a: float,
    score_b: float,
    length_a: int,
    length_b: int,
    length_bias: float = 0.0,
    length_sd: float = 1.0,
) -> float:
    """Return the probability that a judge prefers response a to response b.

    Without a length bias the higher score wins for certain, and a tie is worth ½. With one, the
    judge is unsure and swayed by length, as judges like GPT-4 are:

        P(a wins) = σ(4 · Δscore + length_bias · Δlength / length_sd)

    `length_sd` is the standard deviation of the lengths compared, in tokens. The biased judge of
    the miniature has `length_bias=0.6`.
    """
    if length_bias == 0:
        return 0.5 * ((score_a > score_b) + (score_a >= score_b))
    logit = 4 * (score_a - score_b) + length_bias * (length_a - length_b) / length_sd
    return 1 / (1 + math.exp(-logit))


if __name__ == "__main__":
    print(__doc__)
