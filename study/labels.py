"""Name runs for tables and legends by what sets them apart.

`study/analyze.py` uses `labels` for both of its commands. What a setting means stands in
runtime/settings.py, the hyperparameters of each objective in methods/objectives.py.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from typing import Any

from formats.errors import CheckpointError
from formats.files import read_json
from methods.objectives import OBJECTIVES, hyperparameters
from runtime.settings import Settings

SYMBOLS = {"beta": "β", "gamma_beta_ratio": "γ/β", "lam": "λ", "delta": "δ", "alpha": "α"}
PATHS = {"model", "data", "eval_data", "chat_template"}

# Settings that decide the result. A chat template may change on resume, but only if the tokens
# stay the same, so two runs with different templates are different runs.
DECISIVE = [
    f.name for f in fields(Settings) if not f.metadata["may_change"] or f.name == "chat_template"
]
# Settings that change speed and memory alone. The remaining ones say where output goes.
_sections: Iterable[str] = accumulate(
    (f.metadata["section"] for f in fields(Settings)), lambda a, b: b or a
)
HARDWARE = [
    f.name
    for f, section in zip(fields(Settings), _sections)
    if section == "hardware" and f.name not in DECISIVE
]


def folder_name(name: str) -> str:
    """Return the name of a folder, or of the run that it is the `model` folder of."""
    return run_folder(name).absolute().name or name


def run_folder(name: str) -> Path:
    """Return the folder of a run, given that folder or the `model` folder in it."""
    path = Path(name)
    is_run = path.name != "model" or (path / "model" / "config.json").exists()
    return path if is_run else path.absolute().parent


def recorded_settings(name: str) -> Settings | None:
    """Return the settings that a run recorded in its config.json; None if `name` is not a run.

    name: the folder of a run, or the `model` folder in it.

    Raises:
        CheckpointError: the config.json cannot be read, or its objective is unknown.
    """
    record = run_folder(name) / "config.json"
    values = read_json(record, CheckpointError).get("settings") if record.exists() else None
    if not isinstance(values, dict):  # a model folder, say: its config.json has no settings
        return None
    objective = values.get("objective", Settings.objective)
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise CheckpointError(f"{record}: settings.objective: {objective!r} is unknown here")
    known = {f.name for f in fields(Settings)}
    return Settings(**{key: value for key, value in values.items() if key in known})


def labels(names: list[str], settings: list[Settings | None]) -> list[str]:
    """Label every run with its objective and the settings in which the runs differ.

    Values that are the default of the run's objective are left out. A hyperparameter is compared
    among runs with the same objective. Settings that only change speed and memory appear if two
    labels would be equal without them. If they are equal even so, the folder is added. A run
    without recorded settings has the name of its folder.

    >>> labels(["a", "b", "c"], [Settings(), Settings(length_norm=False), Settings("dpo", lr=5e-6)])
    ['simpo', 'simpo, no length norm', 'dpo, lr 5e-06']
    >>> labels(["runs/simpo-1", "runs/simpo-2", "old/model"], [Settings(), Settings(), None])
    ['simpo (simpo-1)', 'simpo (simpo-2)', 'old']
    """
    found = [s.objective if s else folder_name(name) for name, s in zip(names, settings)]
    for group in (DECISIVE, HARDWARE):
        current, found = found, []
        for label, s in zip(current, settings):
            peers = [
                other
                for other, its_label in zip(settings, current)
                if other and (group is DECISIVE or its_label == label)
            ]
            found.append(", ".join([label, *_differences(s, peers, group)]) if s else label)
    without_folder = found
    for place in (folder_name, str):
        count = Counter(label for _, label in set(zip(names, found)))
        found = [
            f"{short} ({place(name)})" if count[label] > 1 else label
            for label, short, name in zip(found, without_folder, names)
        ]
    return found


def _differences(run: Settings, peers: list[Settings], names: list[str]) -> list[str]:
    """Describe the settings among `names` in which `run` has no default and `peers` differ."""
    default = Settings(objective=run.objective, max_length=run.max_length)
    parts = []
    for name in names:
        compared = peers
        if name in hyperparameters():
            compared = [peer for peer in peers if peer.objective == run.objective]
            if name not in OBJECTIVES[run.objective].defaults:
                continue
        differ = len({described(name, getattr(peer, name)) for peer in compared}) > 1
        if name != "objective" and differ and getattr(run, name) != getattr(default, name):
            parts.append(described(name, getattr(run, name)))
    return parts


def described(name: str, value: Any) -> str:
    """Return a setting as it appears in a label.

    >>> described("gamma_beta_ratio", 0.0), described("data", "sets/pairs.jsonl")
    ('γ/β 0', 'data pairs.jsonl')
    """
    words = SYMBOLS.get(name, name.replace("_", " "))
    if isinstance(value, bool):
        return words if value else f"no {words}"
    if isinstance(value, float):
        return f"{words} {value:g}"
    return f"{words} {folder_name(value) if name in PATHS and value else value}"
