"""Mutated checkpoints and data through the code that train.py and sample.py read them with: an answer or one clear line.

    python tests/fuzz.py --cases 5000 --seed 0      the campaign; exit status 1 if a case fails
    python tests/fuzz.py --case 1234 --seed 0       one case again, with its traceback

Each case takes a sound tiny checkpoint and data file, mutates one of their files (bytes, numbers, keys, types, links) and
reads everything: configuration, headers, tokenizer, template, records, tokens, weights, one forward pass. It passes if that
works or raises DataError or CheckpointError with one line that names a path. It fails with any other exception, a dead
process, more than 10 seconds of CPU time or 1 GiB of memory on top, or if any file is written. Cases run in child processes,
so that one that kills its process is counted like any other.
"""

import argparse
import faulthandler
import gzip
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
sys.dont_write_bytecode = True

SECONDS, MEMORY, WALL = 10, 2**30, 120
BATCH = 100  # cases of one child process
CHECKPOINT = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
              "special_tokens_map.json", "chat_template.jinja", "model.safetensors.index.json"]  # fmt: skip
DATA = ["data.jsonl", "data.json", "data.jsonl.gz", "data.parquet"]


# ---------------------------------------------------------------------------------------------------------------------
# Mutations; `r` is a random.Random

EXTREMES = [
    None, True, False, -1, 0, 1, 2, 3, 64, 340, 2**16, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400,
    -(2**63), 0.5, -0.0, 1e-320, 1e30, 1e308, math.nan, math.inf, -math.inf, "", " ", "\0", "x", "\n", "\ud83d", "\u202e", "é" * 50,
    "x" * 10**5, "../../etc/passwd", "/etc/passwd", "</s>", "<s>", "<|im_end|>", "F32", "BF16", "F64", "I8", "F8_E4M3", "llama", "yarn",
    [], {}, [[]], [None], {"": None}, {"type": "Sequence"}, [0, 2**63], [2**32, 2**32], [-1], [0] * 1000,
]  # fmt: skip
BYTES = [b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"{", b"}", b"[" * 10**5, b'"', b",", b"\\ud83d", b"1e999", b"9" * 5000, b"\r\n", b"{" * 999]
HOSTILE = [
    "{% for i in range(10**9) %}{% endfor %}", "{{ 'x' * 10**10 }}", "{{ '%1000000000d' % 1 }}", "{{ [1] * 10**10 }}",
    "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ messages[0].__class__ }}",
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "{{ '{:>999999999}'.format(1) }}",
    "{{ lipsum(n=10**6) }}", "{{ raise_exception('no\nway') }}", "{{ undefined.x.y }}", "{{ messages | tojson(indent=10**8) }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(40) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
]  # fmt: skip
SYNTAX = ["{%", "%}", "{{", "}}", "{#", "for", "in", "if", "endif", "endfor", "messages", "loop", "|", "(", ")", "[", "]", "'", "-%}",
          "range(9)", "{% generation %}", "{% set", "{% macro", "{% include 'x' %}", "{% import 'os' %}", "\\ud83d", "{% raw %}"]  # fmt: skip
PARTS = [  # of a tokenizer.json: each makes the library panic, or work without end, in some version
    ("pre_tokenizer", {"type": "FixedLength", "length": 0}), ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "a" * 60}),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 1000}] * 3}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(l+|e+|o+|H+| )+$z"}, "behavior": "Isolated", "invert": False}),
    ("model", {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}), ("model", {"type": "Unigram", "unk_id": 9, "vocab": []}),
    ("decoder", {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}), ("post_processor", None), ("model", None),
]  # fmt: skip


def some_tokenizer(r: random.Random, raw: bytes) -> bytes:
    value = json.loads(raw)
    if r.random() < 0.2:
        name, part = r.choice(PARTS)
        value[name] = part
    return some_json(r, dumps(value).encode()) if r.random() < 0.9 else dumps(value).encode()


def some_bytes(r: random.Random, raw: bytes) -> bytes:
    for _ in range(r.choice([1, 1, 1, 2, 5, 20])):
        i, j = sorted(r.randrange(len(raw) + 1) for _ in range(2))
        near = min(len(raw), i + r.choice([1, 2, 8, 100]))
        match r.randrange(8):
            case 0: raw = raw[:i] + bytes([r.randrange(256)]) + raw[i + 1 :]  # fmt: skip
            case 1: raw = raw[:i]  # fmt: skip
            case 2: raw = raw[:i] + raw[near:]  # fmt: skip
            case 3: raw = raw[:i] + r.randbytes(r.choice([1, 8, 100])) + raw[i:]  # fmt: skip
            case 4: raw = raw[:i] + r.choice(BYTES) + raw[i:]  # fmt: skip
            case 5: raw = raw[:j] + raw[i:near] + raw[j:]  # fmt: skip
            case 6: raw = raw[:j] + raw[i:near] * r.choice([2, 50, 1000]) + raw[j:]  # fmt: skip
            case 7:
                numbers = list(re.finditer(rb"-?\d+", raw))
                if numbers:
                    at = r.choice(numbers)
                    extreme = r.choice([x for x in EXTREMES if type(x) in (int, float)])
                    raw = raw[: at.start()] + dumps(extreme).encode() + raw[at.end() :]
    return raw


def dumps(value) -> str:
    return json.dumps(value)


def places(value, path=()) -> list[tuple]:
    """Paths to every key and index below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, below in items:
        found.append((*path, key))
        found += places(below, (*path, key)) if len(path) < 6 else []
    return found


def some_json(r: random.Random, raw: bytes) -> bytes:
    value = json.loads(raw)
    again = None
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        paths = places(value)
        if not paths:
            break
        if len(paths) > 200:  # a tokenizer's vocabulary is most of its file and the least of its structure
            paths = [p for p in paths if not {"vocab", "merges"} & set(p[:-1])] if r.random() < 0.9 else paths
        *way, key = r.choice(paths)
        at = value
        for step in way:
            at = at[step]
        match r.randrange(6):
            case 0 | 1: at[key] = r.choice(EXTREMES)  # fmt: skip
            case 2: del at[key]  # fmt: skip
            case 3:
                other = value
                for step in r.choice(paths):
                    other = other[step] if isinstance(other, (dict, list)) else other
                at[key] = json.loads(dumps(other))
            case 4:
                if isinstance(at, dict):
                    at[r.choice(["", "x", "a\nb", "type", "\0", key + "x", *map(str, at)])] = at.pop(key)
            case 5: again = key if isinstance(key, str) else again  # fmt: skip
    text = dumps(value)
    if r.random() < 0.03:
        deep = r.choice([100, 2000, 10**5])
        text = text[:-1] + ', "deep": ' + "[" * deep + "]" * deep + text[-1]
    if again is not None:  # a key that stands twice
        text = text.replace(dumps(again) + ":", f"{dumps(again)}: {dumps(r.choice(EXTREMES))}, {dumps(again)}:", 1)
    return text.encode()


def some_safetensors(r: random.Random, raw: bytes) -> bytes:
    size = int.from_bytes(raw[:8], "little")
    header, tensors = raw[8 : 8 + size], raw[8 + size :]
    if r.random() < 0.2:
        return some_bytes(r, raw)
    header = some_json(r, header) if r.random() < 0.8 else some_bytes(r, header)
    tensors = tensors[: r.randrange(len(tensors))] if r.random() < 0.1 else tensors + bytes(r.choice([0, 0, 0, 8, 4096]))
    size = r.choice([0, 1, size, 2**24, 2**24 + 1, 10**8, 2**63, 2**64 - 1]) if r.random() < 0.1 else len(header)
    return size.to_bytes(8, "little") + header + tensors


def some_template(r: random.Random, raw: bytes) -> bytes:
    text = raw.decode()
    for _ in range(r.choice([1, 1, 2, 5])):
        i = r.randrange(len(text) + 1)
        words = HOSTILE if r.random() < 0.05 else SYNTAX
        text = text[:i] + r.choice(words) + text[i + r.choice([0, 0, 1, 5]) :]
    raw = text.encode()
    return some_bytes(r, raw) if r.random() < 0.4 else raw


def some_lines(r: random.Random, raw: bytes) -> bytes:
    lines = raw.split(b"\n")
    i = r.randrange(len(lines) - 1)
    lines[i] = some_json(r, lines[i])
    return b"\n".join(lines)


def some_table(r: random.Random, raw: bytes) -> bytes:
    """A parquet file that is whole but holds other columns and types."""
    import pyarrow
    import pyarrow.parquet

    def array(n: int):
        values = r.choice([
            [r.choice([None, "x", "", "é"]) for _ in range(n)], [b"\xff"] * n, [r.random()] * n, [2**63 - 1] * n, [None] * n,
            [[]] * n, [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": r.choice(["a", None])}]] * n,
            [{"role": 1}] * n, [[[1]]] * n, [True] * n, ["x" * 10**6] * n, [[1.5, None]] * n,
        ])  # fmt: skip
        return pyarrow.array(values)

    n = r.choice([0, 1, 3])
    names = [x for x in ("prompt", "chosen", "rejected", "responses", "scores", "messages") if r.random() < 0.6]
    sink = pyarrow.BufferOutputStream()
    compression = r.choice(["none", "snappy", "zstd"])
    columns = [array(n) for _ in names]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=names), sink, compression=compression)
    return sink.getvalue().to_pybytes()


def some_file(r: random.Random, path: Path, outside: Path) -> None:
    """Something that is no plain file where one should be."""
    path.unlink()
    match r.randrange(6):
        case 0: path.symlink_to(outside)  # fmt: skip
        case 1: path.symlink_to(path.name)  # fmt: skip
        case 2: path.symlink_to("nowhere")  # fmt: skip
        case 3: path.mkdir()  # fmt: skip
        case 4: os.mkfifo(path)  # fmt: skip
        case 5: path.symlink_to("/dev/zero")  # fmt: skip


def mutate(r: random.Random, folder: Path, base: Path) -> str:
    """Change one file of the folder; its name."""
    name = r.choice([*CHECKPOINT, *CHECKPOINT[:4], CHECKPOINT[0], *DATA, "pickle", "links"])
    if name == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        return name
    if name == "links":
        name = r.choice(CHECKPOINT[:7])
        some_file(r, folder / name, base / name)
        return "links"
    path = folder / name
    if name == "model.safetensors.index.json":
        shutil.copy(base / "index" / name, path)
    if name in DATA:
        (folder / "data").mkdir()
        path = folder / "data" / name
        shutil.copy(base / "data" / name, path)
    raw = path.read_bytes()
    special = {"model.safetensors": some_safetensors, "chat_template.jinja": some_template,
               "tokenizer.json": some_tokenizer, "data.jsonl": some_lines,
               "data.jsonl.gz": lambda r, raw: gzip.compress(some_lines(r, gzip.decompress(raw))),
               "data.parquet": some_table}  # fmt: skip
    path.write_bytes((some_bytes if r.random() < 0.3 else special.get(name, some_json))(r, raw))
    return name


# ---------------------------------------------------------------------------------------------------------------------
# What is tried


def sound(base: Path) -> None:
    """A tiny checkpoint whose every file is read, and the same pairs in every kind of data file."""
    import test_data
    import tiny

    config = tiny.FAMILIES["llama-3.1"] | {"vocab_size": 340, "eos_token_id": [2, 4]}
    folder = tiny.write(base / "checkpoint", config)
    test_data.write_checkpoint(folder, test_data.byte_level(), None, "<|im_end|>", generation_config={"eos_token_id": [2, 4]},
                               special_tokens_map={"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}})  # fmt: skip
    (folder / "chat_template.jinja").write_text(test_data.CHATML)
    names = json.loads((folder / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names.keys() - {"__metadata__"}, "model.safetensors")}
    (base / "index").mkdir()
    (base / "index" / "model.safetensors.index.json").write_text(dumps(index))
    pairs = [{"prompt": "Hi", "chosen": "Hello, hello.", "rejected": "No."}, test_data.ULTRAFEEDBACK[0],
             {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 2.5]},
             {"chosen": test_data.TRANSCRIPT + " Yes.", "rejected": test_data.TRANSCRIPT + " No."}]  # fmt: skip
    (base / "data").mkdir()
    for name in DATA:
        test_data.write(base / "data" / name, pairs[:1] * 3 if name.endswith("parquet") else pairs)
    read_everything(folder, base)


def read_everything(folder: Path, base: Path) -> None:
    """As train.py and sample.py do; the data of `folder` if it has its own, else the sound ones."""
    import torch

    import data
    import model as llama

    source = data.local_path(str(folder), "model", llama.CHECKPOINT_FILES)
    config, weights = llama.Config.from_folder(source), llama.Weights(source)
    tokenizer = data.Tokenizer(source)
    tokenizer.check_fits(config.vocab_size)
    examples = []
    for where, record in data.read_records(str(folder / "data" if (folder / "data").exists() else base / "data" / "data.jsonl")):
        try:
            examples.append(data.parse_record(record, where)[1])
        except data.Dropped:
            pass
    trees = tokenizer.encode(examples, 256, 128, Counter())
    with torch.device("meta"):
        weights.check(llama.Llama(config))
    model = llama.load(source)
    if trees:
        batch = {name: torch.from_numpy(value) for name, value in data.pack(trees[:2]).items()}
        with torch.no_grad():
            model(**batch | {name: batch[name].numpy() for name in ("cu_q", "cu_k")})
        tokenizer.decode(trees[0].responses[0].tolist())
    tokenizer.changed_files()


def run_case(seed: int, number: int, base: Path, work: Path) -> dict:
    from data import DataError
    from model import CheckpointError

    r = random.Random(f"{seed} {number}")
    folder = work / f"case-{number}"
    shutil.copytree(base / "checkpoint", folder)
    what = mutate(r, folder, base)
    outcome, message = "read", ""
    faulthandler.register(signal.SIGXCPU, chain=True)  # where the time went
    began = time.process_time()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # the kernel refuses every write to a file
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(began) + SECONDS, resource.RLIM_INFINITY))
    try:
        read_everything(folder, base)
    except (DataError, CheckpointError) as e:
        outcome, message = "refused", str(e)
        if message.count("\n") or str(work) not in message or not message.isprintable():
            outcome = "FAILED: not one line that names a path"
        if "Too large" in message:
            outcome = "FAILED: wrote a file"
    except BaseException as e:
        outcome, message = f"FAILED: {type(e).__name__}", traceback.format_exc()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    for path in folder.rglob("*"):
        path.is_fifo() and path.unlink()
    shutil.rmtree(folder)
    return {"case": number, "what": what, "outcome": outcome, "message": message, "seconds": time.process_time() - began}


def writes(event: str, args: tuple) -> None:
    """An audit hook: opening a file to write while a case is read (an empty file escapes the limit on size)."""
    limited = event == "open" and resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 0
    if limited and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        if isinstance(args[0], str) and args[0] != os.devnull:
            raise RuntimeError(f"writes {args[0]}")


def run_cases(seed: int, numbers: range, base: Path, work: Path) -> None:
    """The child: one JSON line for each case, as it is done."""
    import torch

    import data  # noqa: F401
    import model  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    torch.set_num_threads(1)
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(writes)
    for number in numbers:
        print(dumps(run_case(seed, number, base, work)), flush=True)


def campaign(seed: int, cases: int, work: Path) -> list[dict]:
    """The outcome of every case."""
    base = work / "base"
    base.mkdir()
    sound(base)
    results: list[dict] = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    while len(results) < cases:
        first, last = len(results), min(cases, len(results) + BATCH)
        command = [sys.executable, __file__, "--seed", str(seed), "--child", str(first), str(last), str(work)]
        with open(work / "stderr", "w+") as stderr:
            try:
                limit = WALL + last - first
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, env=environment, timeout=limit)
                output, status = done.stdout, f"process ended with {done.returncode}"
            except subprocess.TimeoutExpired as e:
                output, status = e.stdout or b"", "no answer"
            stderr.seek(0)
            panic = stderr.read()[-2000:]
        results += [json.loads(line) for line in output.splitlines() if line.endswith(b"}")]
        if len(results) < last:
            results.append({"case": len(results), "what": "?", "outcome": f"FAILED: {status}", "message": panic, "seconds": SECONDS})
            shutil.rmtree(work / f"case-{len(results) - 1}", ignore_errors=True)
        if sys.stderr.isatty():
            print(f"\r{len(results)} of {cases}", end="", file=sys.stderr)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000, metavar="N", help="how many (default: 5000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed and number make a case (default: 0)")
    parser.add_argument("--case", type=int, metavar="N", help="this one alone, in this process")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        first, last, work = flags.child
        run_cases(flags.seed, range(int(first), int(last)), Path(work) / "base", Path(work))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if flags.case is not None:
            (work / "base").mkdir()
            sound(work / "base")
            result = run_case(flags.seed, flags.case, work / "base", work)
            print(*(f"{key}: {value}" for key, value in result.items()), sep="\n")
            return "FAILED" in result["outcome"]
        began = time.perf_counter()
        results = campaign(flags.seed, flags.cases, work)
    failed = [result for result in results if "FAILED" in result["outcome"]]
    for result in failed:
        print(f"case {result['case']} ({result['what']}): {result['outcome']}\n{result['message']}")
    table = Counter((result["what"], result["outcome"].partition(":")[0]) for result in results)
    for what in sorted({what for what, _ in table}):
        print(f"{what:30}", *(f"{table[what, outcome]:6} {outcome}" for outcome in ("read", "refused", "FAILED")))
    slowest = max(results, key=lambda result: result["seconds"])
    print(f"{len(results)} cases, seed {flags.seed}: {len(failed)} failed; {time.perf_counter() - began:.0f} seconds; "
          f"the slowest took {slowest['seconds']:.1f} (case {slowest['case']})")  # fmt: skip
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
