"""Run train.py several times, one run after another, on one group of ranks.

    torchrun tests/several_runs.py FILE

Starting ranks takes longer than these runs do, so the tests start them once. FILE holds a JSON list
with one list of flags per run. `test_train.launch` writes it.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # torchrun adds only tests/

import train
from runtime.settings import read_settings

for flags in json.loads(Path(sys.argv[1]).read_text()):
    train.train(read_settings(flags))
