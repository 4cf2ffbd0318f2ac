"""The recipes hold the published values, and every one passes a dry run without a network."""

import sys
from pathlib import Path

import pytest

import data
import settings
import train

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"

MISTRAL, MISTRAL_INSTRUCT = "alignment-handbook/zephyr-7b-sft-full", "mistralai/Mistral-7B-Instruct-v0.2"
LLAMA3, LLAMA3_INSTRUCT = "princeton-nlp/Llama-3-Base-8B-SFT", "meta-llama/Meta-Llama-3-8B-Instruct"
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
# The tables of the README of github.com/princeton-nlp/SimPO, and the lengths and data sets of its training_configs/.
#    setting                 model             pairs                                          lengths      SimPO β, γ/β, lr   DPO β, lr
PUBLISHED = {
    "mistral-base":         (MISTRAL,          ULTRAFEEDBACK,                                 (1024, 512),  (2.0, 0.8, 3e-7),  (0.01, 5e-7)),
    "mistral-instruct":     (MISTRAL_INSTRUCT, "princeton-nlp/mistral-instruct-ultrafeedback", (2048, 1800), (2.5, 0.1, 5e-7),  (0.01, 5e-7)),
    "llama3-base":          (LLAMA3,           ULTRAFEEDBACK,                                 (2048, 1800), (2.0, 0.5, 6e-7),  (0.01, 5e-7)),
    "llama3-instruct":      (LLAMA3_INSTRUCT,  "princeton-nlp/llama3-ultrafeedback",          (2048, 1800), (2.5, 0.55, 1e-6), (0.01, 7e-7)),
    "llama3-instruct-v0.2": (LLAMA3_INSTRUCT,  "princeton-nlp/llama3-ultrafeedback-armorm",   (2048, 1800), (10.0, 0.3, 1e-6), (0.01, 3e-7)),
}  # fmt: skip
COMMON = {"batch_size": 128, "epochs": 1, "lr_schedule": "cosine", "warmup_ratio": 0.1}


def expected() -> dict[str, dict]:
    """Recipe → all that it must say."""
    table = {}
    for setting, (model, pairs, (longest, prompt), (beta, ratio, lr), (dpo_beta, dpo_lr)) in PUBLISHED.items():
        train_split, test_split = ("train_prefs", "test_prefs") if pairs == ULTRAFEEDBACK else ("train", "test")
        shared = COMMON | {"model": model, "data": f"{pairs}:{train_split}", "eval_data": f"{pairs}:{test_split}"}
        shared |= {"max_length": longest, "max_prompt_length": prompt}
        shared |= {"chat_template": "recipes/zephyr.jinja"} if setting == "mistral-base" else {}
        table[f"{setting}-simpo"] = shared | {"objective": "simpo", "beta": beta, "gamma_beta_ratio": ratio, "lr": lr}
        table[f"{setting}-dpo"] = shared | {"objective": "dpo", "beta": dpo_beta, "lr": dpo_lr}
    chat = {"data": "HuggingFaceH4/ultrachat_200k:train_sft", "eval_data": "HuggingFaceH4/ultrachat_200k:test_sft"}
    sft = COMMON | chat | {"objective": "sft", "lr": 2e-5, "max_length": 2048, "max_prompt_length": 1800}
    table["mistral-base-sft"] = sft | {"model": "mistralai/Mistral-7B-v0.1", "chat_template": "recipes/zephyr.jinja"}
    table["llama3-base-sft"] = sft | {"model": "meta-llama/Meta-Llama-3-8B", "chat_template": "recipes/llama3.jinja"}
    return table


def dry_run(monkeypatch, capsys, *flags: object) -> str:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--dry-run"])
    before = sorted(ROOT.iterdir())
    train.main()
    assert sorted(ROOT.iterdir()) == before
    return capsys.readouterr().out


def test_every_recipe_is_in_the_table():
    assert sorted(path.stem for path in RECIPES.glob("*.toml")) == sorted(expected())


@pytest.mark.parametrize("name", expected())
def test_recipe(monkeypatch, capsys, name):
    """Nothing more and nothing less than the published values; says how to run it; resolves without a network."""
    path = RECIPES / f"{name}.toml"
    assert settings.read_toml(path) == expected()[name]
    assert f"--config recipes/{name}.toml" in path.read_text().splitlines()[1]
    printed = dry_run(monkeypatch, capsys, "--config", path)
    lines = [line.split() for line in printed.splitlines()]
    for key, value in expected()[name].items():
        [line] = [words for words in lines if words and words[0] == key.replace("_", "-")]
        assert line[1] == str(value)
    assert printed.count("would be fetched from the hub") == 3


def test_zephyr_template_is_what_the_authors_evaluate_with():
    """eval/alpacaeval2/templates/mistral_base.txt of their repository, an empty system turn included."""
    tokenizer = data.Tokenizer(ROOT / "toy" / "checkpoint", data.read_template(RECIPES / "zephyr.jinja"))
    tokenizer.special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer.tail = "</s>\n"
    prompt = tokenizer.prompt_text("Hi", "")
    assert prompt == "<s><|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
    assert tokenizer.texts([data.Example("Hi", ("Hello.",), "")]) == [(prompt, ["Hello."])]
    told = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.prompt_text(told, "") == "<s><|system|>\nRhyme.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"


def test_llama3_template_is_llama_3_s():
    tokenizer = data.Tokenizer(ROOT / "toy" / "checkpoint", data.read_template(RECIPES / "llama3.jinja"))
    tokenizer.special = {"bos_token": "<|begin_of_text|>"}
    tokenizer.tail = "<|eot_id|>"
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    prompt = tokenizer.prompt_text("Hi ", "")
    assert prompt == f"<|begin_of_text|>{header('user')}Hi<|eot_id|>{header('assistant')}"
    assert tokenizer.texts([data.Example("Hi ", ("Hello.",), "")]) == [(prompt, ["Hello."])]


def test_dry_run_of_what_is_here(monkeypatch, capsys, tmp_path):
    """Model and data are read as far as they are here: 15 pairs twice in steps of 4 are 8, unless stopped."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join((ROOT / "toy" / "heldout.jsonl").open().readlines()[:15]))
    flags = ["--objective=dpo", f"--data={pairs}", "--epochs=2", "--batch-size=4"]
    here = dry_run(monkeypatch, capsys, "--model=toy/checkpoint", *flags)
    assert "104,768 parameters" in here and "15 used, 8 steps" in here
    assert "15 records, 3 steps" in dry_run(monkeypatch, capsys, "--model=owner/name@rev", "--max-steps=3", *flags)
    assert "15 records, 1 steps" in dry_run(monkeypatch, capsys, "--model=owner/name", f"--data={tmp_path}:pairs")
    assert "beta                      0.01" in here and "alpha" not in here
    assert list(tmp_path.iterdir()) == [pairs]


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--model=owner/name", "--data=nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["--model=nowhere", "--data=owner/name:train"], "nowhere: no such file or folder"),
        (["--model=owner/name", "--data=owner/name:train", "--chat-template=nowhere"], "nowhere: cannot be read"),
        (["--model=recipes", "--data=owner/name"], "config.json"),
    ],
)
def test_dry_run_finds_what_is_wrong(monkeypatch, capsys, flags, line):
    with pytest.raises(SystemExit) as exit:
        dry_run(monkeypatch, capsys, *flags)
    error = capsys.readouterr().err
    assert exit.value.code == 1 and error.startswith("train.py: error: ") and line in error
