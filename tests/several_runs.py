"""`torchrun tests/several_runs.py FILE`: runs of train.py one after the other in one set of processes, which start slowly.
FILE holds a JSON list with one list of flags per run."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402

runs = [train.read_settings(flags) for flags in json.loads(Path(sys.argv[1]).read_text())]
device, _ = train.start_processes(runs[0])
for settings in runs:
    train.train(settings, device, train.make_mesh(settings, device.type))
