"""What a flag may be, and what is said of one that does nothing."""

import argparse
import importlib
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from test_train import ROOT, TOY, fails, few_pairs, run

from runtime import settings
from runtime.settings import PlanOptions, Settings, read_command, read_settings, table_problem

MODEL = ["--model=m", "--data=d"]


def refused(capsys, *flags: str) -> str:
    """Return the last line on stderr of a command line that must exit with status 2."""
    with pytest.raises(SystemExit) as exit:
        read_command([*MODEL, *flags])
    assert exit.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "flag, ours",
    [
        ("--learning-rate=1", "--lr"),
        ("--num-train-epochs", "--epochs"),
        ("--simpo-gamma=1", "--gamma-beta-ratio (γ/β, not γ)"),
        ("--gamma=0.5", "--gamma-beta-ratio (γ/β, not γ)"),
        ("--gamma-beta-ration=1", "--gamma-beta-ratio"),
        ("--bacth-size=3", "--batch-size"),
        ("--output_dir=x", "--out"),
        ("--gpuss=8", "--gpus"),
    ],
)
def test_an_unknown_flag_is_answered_with_ours(capsys, flag, ours):
    line = refused(capsys, flag)
    assert flag in line and line.endswith(f"did you mean {ours}?")


@pytest.mark.parametrize(
    "flag", ["--gpus=8", "--gpu=H100", "--gpu-memory=80", "--mfu=0.4", "--gpu-tflops=1"]
)
def test_flags_of_plan_need_plan(capsys, flag):
    line = refused(capsys, flag)
    assert flag.partition("=")[0] in line and "--plan" in line
    found, options = read_command([*MODEL, "--plan", flag])
    assert options.plan and not hasattr(found, "gpus")


@pytest.mark.parametrize(
    "flags, setting, needs",
    [
        (["--reference=cached"], "--reference", "dpo"),
        (["--reference=online"], "--reference", "dpo"),
        (["--objective=sft", "--beta=1"], "--beta", "simpo"),
        (
            ["--keep-products=all", "--no-activation-checkpointing"],
            "--keep-products",
            "--activation-checkpointing",
        ),
        (["--eval-every=2"], "--eval-every", "--eval-data"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(capsys, flags, setting, needs):
    line = refused(capsys, *flags)
    assert setting in line and needs in line


def test_bounds_stand_on_the_setting(capsys):
    """Every number of the table has a bound, and a value outside it is named with its flag."""
    for table in (Settings, PlanOptions):
        for name, f in table.__dataclass_fields__.items():
            bounds = [f.metadata[key] for key in ("least", "above")]
            if f.type in (
                "int",
                "float",
                "int | None",
                "float | None",
                int,
                float,
                int | None,
                float | None,
            ):
                assert bounds != [None, None], name
                low = min(bound for bound in bounds if bound is not None) - 1
                flag = f"--{name.replace('_', '-')}"
                plan = ["--plan"] if table is PlanOptions else []
                whole = "int" in str(f.type)
                with pytest.raises(SystemExit) as exit:
                    read_command([*MODEL, *plan, f"{flag}={int(low) if whole else low}"])
                assert exit.value.code == 2 and flag in capsys.readouterr().err


def test_a_table_made_in_python_is_checked_too():
    assert "--lr" in table_problem(Settings(model="m", data="d", lr=0.0))
    assert "--objective" in table_problem(Settings(model="m", data="d", objective="ppo"))
    assert table_problem(Settings(model="m", data="d")) is None


def test_help_names_the_default_of_each_objective(capsys):
    with pytest.raises(SystemExit) as exit:
        read_settings(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    added = "[a-z, ]*"  # objectives that somebody put at the end of the table
    names = ("2.0 for simpo", "0.01 for dpo, cpo, kto, rdpo", "0.1 for ipo, apo_zero")
    assert re.search(f"{added}; ".join(map(re.escape, names)), text)
    assert "planning, with --plan alone" in text and text.index("planning") > text.index("--wandb")


# --------------------------------------------------------------------------------------------------
# The first five minutes


def test_the_first_line_of_the_first_command_is_no_warning(monkeypatch, capsys, tmp_path):
    few = few_pairs(tmp_path)["data"]
    run(monkeypatch, tmp_path / "run", data=few, max_steps=1)
    assert "warning" not in capsys.readouterr().out


def test_pairs_beyond_the_context_are_warned_of(monkeypatch, capsys, tmp_path):
    """Not the setting alone: the toy has 512 positions, and --max-length is 2048 by default."""
    long = " ".join(["the fox runs away ."] * 150)
    record = '{"prompt": "describe the fox .", "chosen": "%s", "rejected": "the fox ."}\n' % long
    (tmp_path / "long.jsonl").write_text(record)
    run(monkeypatch, tmp_path / "run", data=tmp_path / "long.jsonl", max_steps=1)
    out = capsys.readouterr().out
    assert "warning: 1 pairs are longer than the model's 512 positions" in out
    assert "--max-length 512" in out


def test_a_finished_folder_is_refused_before_anything_is_read(monkeypatch, capsys, tmp_path):
    """Tokenizing a large data set takes minutes; the answer is known before."""
    run(monkeypatch, tmp_path / "run", max_steps=1)
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    line = fails(monkeypatch, capsys, tmp_path / "run", 1, data=tmp_path / "bad.jsonl")
    assert str(tmp_path / "run") in line and "--overwrite" in line


def test_the_last_step_is_logged(monkeypatch, tmp_path):
    rows = run(monkeypatch, tmp_path / "run", max_steps=3, log_every=2)
    assert [row["step"] for row in rows if "loss" in row] == [2, 3]


def test_a_short_step_says_so(monkeypatch, capsys, tmp_path):
    """Its loss is an average over few pairs, and jumps."""
    run(monkeypatch, tmp_path / "run", **few_pairs(tmp_path) | {"dtype": "fp32"})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3 (1 pairs)"]


def test_an_evaluation_says_that_it_runs(monkeypatch, capsys, tmp_path):
    run(monkeypatch, tmp_path / "run", **few_pairs(tmp_path) | {"max_steps": 1})
    out = capsys.readouterr().out
    assert out.index("evaluating on 15 held-out pairs") < out.index("held out, after 0 steps")


def test_the_toy_has_no_short_step():
    count = len((TOY / "train.jsonl").read_text().splitlines())
    assert count % read_settings([]).batch_size == 0


# --------------------------------------------------------------------------------------------------
# What a run says


def test_the_report_says_what_metrics_say(monkeypatch, capsys, tmp_path):
    flags = {"eval_data": TOY / "heldout.jsonl", "max_steps": 3, "batch_size": 32}
    rows = run(monkeypatch, tmp_path / "run", **flags)
    lines = capsys.readouterr().out.splitlines()
    for name, key, show in (
        ("reward accuracy", "eval_rewards/accuracies", lambda x: f"{100 * x:.1f} %"),
        ("reward margin", "eval_rewards/margins", lambda x: f"{x:+.3f}"),
    ):
        [line] = [line for line in lines if line.strip().startswith(name)]
        before, after = (show(rows[i][key]) for i in (0, -1))
        assert line.split() == f"{name} {before} → {after}".split()


def test_a_dry_run_on_two_ranks_reads_in_one_order(tmp_path):
    """A set of names has another order in each process, and pairs of the wrong file would mix."""
    lines = (TOY / "heldout.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:60]))
    (tmp_path / "b.jsonl").write_text("".join(lines[:20]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "train.py", f"--model={TOY}/checkpoint", f"--data={tmp_path}/a.jsonl"]
    command += [f"--eval-data={tmp_path}/b.jsonl", "--dry-run", "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "60 used" in done.stdout and "20 used" in done.stdout


def test_a_dry_run_refuses_what_training_would(monkeypatch, capsys, tmp_path):
    line = fails(monkeypatch, capsys, tmp_path / "run", 1, dry_run=True, replicate=3)
    assert "--replicate 3" in line


def test_the_held_out_pairs_of_a_recipe_can_be_left_out(tmp_path):
    """They belong to its data, and somebody with other data may have none."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "m"\ndata = "d"\neval-data = "e"\n')
    flags = [f"--config={recipe}", "--data=mine"]
    assert read_settings(flags).eval_data == "e"
    assert read_settings([*flags, "--eval-data=none"]).eval_data is None
    assert read_settings(["--eval-data=none"]).eval_data is None  # nor those of the toy


def test_planning_keys_of_a_file_wait_for_plan(tmp_path):
    """A recipe may say for which GPUs it is meant; on the command line it would be a slip."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("gpus = 8\nmfu = 0.5\nplan = false\n")
    assert not read_command([*MODEL, f"--config={recipe}"])[1].plan
    assert not read_command([*MODEL, "--no-plan"])[1].plan
    settings, options = read_command([*MODEL, f"--config={recipe}", "--plan"])
    assert (options.gpus, options.mfu) == (8, 0.5) and settings.model == "m"


NOT_PATHS = {
    "NAME",
    "NAMES",
    "STR",
    "N|auto",
    "DATE",
    "TEXT",
    "N",
    "G",
    "B",
    "T",
    "P",
    "K",
    "S",
    "SHARE",
    None,
}


def flags_of(read: Callable, monkeypatch, *words: str) -> list[argparse.Action]:
    """Return the actions of the parser, or subparser, that `read` makes for a command line."""
    seen: list[settings.Parser] = []
    parse = settings.Parser.parse_known_args
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *words])
        patch.setattr(
            settings.Parser, "parse_known_args", lambda s, *a: seen.append(s) or parse(s, *a)
        )
        with pytest.raises(SystemExit):
            read([*words, "--unknown"])
    return [action for parser in seen for action in parser._actions]


@pytest.mark.parametrize(
    "module, words",
    [
        ("runtime.settings", []),
        ("sample", []),
        ("study.analyze", ["rewards", "--policy=a", "--data=b", "--out=c"]),
        ("study.analyze", ["curves", "run", "--out=c.png"]),
        ("study.tokens", ["--policy=a", "--data=b", "--out=c"]),
    ],
)
def test_home_is_expanded_in_every_path(monkeypatch, tmp_path, module, words):
    """Behind `--flag=`, where a shell leaves `~` alone; in lists and behind NAME=, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    command = importlib.import_module(module)
    read = command.read_command if module == "runtime.settings" else command.read_flags
    actions = flags_of(read, monkeypatch, *words)
    texts = [a for a in actions if a.nargs != 0 and a.type not in (int, float) and not a.choices]
    assert {a.metavar for a in texts} - settings.PATHS <= NOT_PATHS | {"rewards | curves"}
    paths = [a for a in texts if a.metavar in settings.PATHS]
    assert paths
    for action in paths:
        parser = settings.Parser()
        parser._add_action(action)
        given = "NAME=~/x" if action.metavar.startswith("[NAME=]") else "~/x"
        flag = action.option_strings[0] + "=" if action.option_strings else ""
        action.required = False
        found = getattr(parser.parse_args([flag + given]), action.dest)
        found = found[0] if isinstance(found, list) else found
        assert str(found) == given.replace("~", str(tmp_path)), action


def test_home_is_expanded_in_toml_and_for_the_toml_file(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("model", "data", "eval-data", "chat-template", "out", "resume")
    (tmp_path / "run.toml").write_text("".join(f'{key} = "~/{key}"\n' for key in keys))
    found = read_settings(["--config=~/run.toml"])
    for key in keys:
        assert getattr(found, key.replace("-", "_")) == str(tmp_path / key)
