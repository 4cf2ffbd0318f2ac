"""Check that the recipes hold the published values and pass a dry run without a network."""

import sys
from pathlib import Path

import pytest

import train
from data import Example
from formats.tokenizer import Tokenizer, read_template
from runtime import settings

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"

ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
ULTRACHAT = "HuggingFaceH4/ultrachat_200k"
LLAMA3_INSTRUCT = "meta-llama/Meta-Llama-3-8B-Instruct"
SOURCES = {  # setting: (model, pairs)
    "mistral-base": ("alignment-handbook/zephyr-7b-sft-full", ULTRAFEEDBACK),
    "mistral-instruct": (
        "mistralai/Mistral-7B-Instruct-v0.2",
        "princeton-nlp/mistral-instruct-ultrafeedback",
    ),
    "llama3-base": ("princeton-nlp/Llama-3-Base-8B-SFT", ULTRAFEEDBACK),
    "llama3-instruct": (LLAMA3_INSTRUCT, "princeton-nlp/llama3-ultrafeedback"),
    "llama3-instruct-v0.2": (LLAMA3_INSTRUCT, "princeton-nlp/llama3-ultrafeedback-armorm"),
}
# The tables of the README of github.com/princeton-nlp/SimPO; the lengths of its training_configs/.
PUBLISHED = {
    # setting               lengths       SimPO β, γ/β, lr   DPO β, lr
    "mistral-base":         ((1024, 512),  (2.0, 0.8, 3e-7),  (0.01, 5e-7)),
    "mistral-instruct":     ((2048, 1800), (2.5, 0.1, 5e-7),  (0.01, 5e-7)),
    "llama3-base":          ((2048, 1800), (2.0, 0.5, 6e-7),  (0.01, 5e-7)),
    "llama3-instruct":      ((2048, 1800), (2.5, 0.55, 1e-6), (0.01, 7e-7)),
    "llama3-instruct-v0.2": ((2048, 1800), (10.0, 0.3, 1e-6), (0.01, 3e-7)),
}  # fmt: skip
# scripts/train/tulu3/dpo_8b.sh of github.com/allenai/open-instruct, commit 16c002b. Its truncation
# has no limit for prompts; the recipe says why 2047 comes nearest.
TULU3 = {
    "objective": "dpo",
    "length_norm": True,
    "model": "allenai/Llama-3.1-Tulu-3-8B-SFT",
    "data": "allenai/llama-3.1-tulu-3-8b-preference-mixture:train",
    "max_length": 2048,
    "max_prompt_length": 2048 - 1,
    "beta": 5.0,
    "lr": 5e-07,
    "batch_size": 8 * 1 * 16,  # processes, pairs on each, accumulated steps
    "epochs": 1,
    "lr_schedule": "linear",
    "warmup_ratio": 0.1,
}
COMMON = {"batch_size": 128, "epochs": 1, "lr_schedule": "cosine", "warmup_ratio": 0.1}
ZEPHYR, LLAMA3, MISTRAL = (
    {"chat_template": f"recipes/{name}.jinja"} for name in ("zephyr", "llama3", "mistral")
)
TEMPLATES = {"mistral-base": ZEPHYR, "mistral-instruct": MISTRAL}  # the others: the checkpoint's


def expected() -> dict[str, dict]:
    """Return every recipe's name with all the settings that it must hold."""
    table = {}
    for setting, (lengths, (beta, ratio, lr), (dpo_beta, dpo_lr)) in PUBLISHED.items():
        model, pairs = SOURCES[setting]
        split = "{}_prefs" if pairs == ULTRAFEEDBACK else "{}"
        shared = COMMON | {"model": model, "like_authors": True}
        shared |= {"data": f"{pairs}:{split.format('train')}"}
        shared |= {"eval_data": f"{pairs}:{split.format('test')}"}
        shared |= {"max_length": lengths[0], "max_prompt_length": lengths[1]}
        shared |= TEMPLATES.get(setting, {})
        simpo = {"objective": "simpo", "beta": beta, "gamma_beta_ratio": ratio, "lr": lr}
        table[f"{setting}-simpo"] = shared | simpo
        table[f"{setting}-dpo"] = shared | {"objective": "dpo", "beta": dpo_beta, "lr": dpo_lr}
    sft = COMMON | {"data": f"{ULTRACHAT}:train_sft", "eval_data": f"{ULTRACHAT}:test_sft"}
    sft |= {"objective": "sft", "lr": 2e-5, "max_length": 2048, "max_prompt_length": 1800}
    table["mistral-base-sft"] = sft | ZEPHYR | {"model": "mistralai/Mistral-7B-v0.1"}
    table["tulu3-8b-dpo"] = TULU3
    table["llama3-base-sft"] = sft | LLAMA3 | {"model": "meta-llama/Meta-Llama-3-8B"}
    return table


def refuse_download(*args, **options) -> None:
    pytest.fail("the hub was asked")


def dry_run(monkeypatch, capsys, *flags: object) -> str:
    """Run `train.py --dry-run` at the repository's root; return what it prints.

    Fails if it asks the hub or writes a file to the root.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse_download)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--dry-run"])
    files_before = sorted(ROOT.iterdir())
    train.main()
    assert sorted(ROOT.iterdir()) == files_before
    return capsys.readouterr().out


def test_every_recipe_is_in_the_table():
    """The folder holds the expected recipes and no others."""
    assert sorted(path.stem for path in RECIPES.glob("*.toml")) == sorted(expected())


@pytest.mark.parametrize("name", expected())
def test_recipe(monkeypatch, capsys, name):
    """A recipe holds exactly the published values, says how to run it, and resolves offline."""
    path = RECIPES / f"{name}.toml"
    assert settings.read_toml(path) == expected()[name]
    assert f"--config recipes/{name}.toml" in path.read_text().splitlines()[1]
    printed = dry_run(monkeypatch, capsys, "--config", path)
    lines = [line.split() for line in printed.splitlines()]
    for key, value in expected()[name].items():
        [line] = [words for words in lines if words and words[0] == key.replace("_", "-")]
        assert line[1] == str(value)
    names = sum(key in ("model", "data", "eval_data") for key in expected()[name])
    assert printed.count("hub id; downloaded unless cached") == names


def test_zephyr_template_is_what_the_authors_train_with():
    """zephyr.jinja renders what the authors train with, an empty system turn included."""
    # eval/alpacaeval2/templates/mistral_base.txt in their repository has a space after <s>, which
    # their training had not; bench/like_authors.py compares the tokens of training
    tokenizer = Tokenizer(ROOT / "toy" / "checkpoint", read_template(RECIPES / "zephyr.jinja"))
    tokenizer.special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer.tail = "</s>\n"
    prompt = tokenizer.prompt_text("Hi", "")
    assert prompt == "<s><|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
    assert tokenizer.texts([Example("Hi", ("Hello.",), "")]) == [(prompt, ["Hello."])]
    messages = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hi"}]
    rendered = "<s><|system|>\nRhyme.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
    assert tokenizer.prompt_text(messages, "") == rendered
    alone = [{"role": "assistant", "content": "Hello."}]  # a response, for --like-authors
    assert tokenizer.render([(alone, False)], [""]) == ["<s><|assistant|>\nHello.</s>\n"]


def test_mistral_template_is_what_the_authors_train_with():
    """mistral.jinja renders the authors' format behind BOS, and a response alone without it."""
    tokenizer = Tokenizer(ROOT / "toy" / "checkpoint", read_template(RECIPES / "mistral.jinja"))
    tokenizer.special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer.tail = "</s>"
    prompt = tokenizer.prompt_text(" Hi ", "")
    assert prompt == "<s> [INST] Hi [/INST]"
    assert tokenizer.texts([Example(" Hi ", (" Hello.",), "")]) == [(prompt, [" Hello. "])]
    turns = [("system", " Rhyme. "), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = "<s> [INST] Rhyme.\n\nHi [/INST] Hello. </s>[INST] Bye [/INST]"
    assert tokenizer.prompt_text(messages, "") == rendered
    messages[0]["content"] = ""
    assert tokenizer.prompt_text(messages, "") == rendered.replace("Rhyme.\n\n", "")
    assert tokenizer.render([(messages[2:3], False)], [""]) == [" Hello. </s>"]


def test_llama3_template_is_llama_3_s():
    """llama3.jinja renders Llama 3's own format, which strips a message's outer spaces."""
    tokenizer = Tokenizer(ROOT / "toy" / "checkpoint", read_template(RECIPES / "llama3.jinja"))
    tokenizer.special = {"bos_token": "<|begin_of_text|>"}
    tokenizer.tail = "<|eot_id|>"
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    prompt = tokenizer.prompt_text("Hi ", "")
    assert prompt == f"<|begin_of_text|>{header('user')}Hi<|eot_id|>{header('assistant')}"
    assert tokenizer.texts([Example("Hi ", ("Hello.",), "")]) == [(prompt, ["Hello."])]


def test_dry_run_reads_what_is_on_this_machine(monkeypatch, capsys, tmp_path):
    """A dry run counts parameters, pairs and steps as far as model and data are local."""
    # 15 pairs, twice, in steps of 4: 8 steps, unless --max-steps says fewer.
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join((ROOT / "toy" / "heldout.jsonl").open().readlines()[:15]))
    flags = ["--objective=dpo", f"--data={pairs}", "--epochs=2", "--batch-size=4"]
    local = dry_run(monkeypatch, capsys, "--model=toy/checkpoint", *flags)
    assert "104,768 parameters" in local and "15 used, 8 steps" in local
    fewer = dry_run(monkeypatch, capsys, "--model=owner/name@rev", "--max-steps=3", *flags)
    assert "15 records, 3 steps" in fewer
    split = dry_run(monkeypatch, capsys, "--model=owner/name", f"--data={tmp_path}:pairs")
    assert "15 records, 1 steps" in split
    assert "beta                      0.01" in local and "alpha" not in local
    assert list(tmp_path.iterdir()) == [pairs]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model=owner/name", "--data=absent.jsonl"], "absent.jsonl: no such file or folder"),
        (["--model=absent", "--data=owner/name:train"], "absent: no such file or folder"),
        (
            ["--model=owner/name", "--data=owner/name:train", "--chat-template=absent"],
            "absent: no such file",
        ),
        (["--model=recipes", "--data=owner/name"], "config.json"),
    ],
)
def test_dry_run_finds_what_is_wrong(monkeypatch, capsys, flags, words):
    """A dry run names the file that is missing, in one line and with status 1."""
    with pytest.raises(SystemExit) as exit:
        dry_run(monkeypatch, capsys, *flags)
    error = capsys.readouterr().err
    assert exit.value.code == 1 and error.startswith("train.py: error: ") and words in error
