"""Hide GPUs from all tests but those of tests/test_gpu.py, which need a run of their own."""

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    files = {Path(argument.partition("::")[0]).name for argument in config.args}
    if files != {"test_gpu.py"}:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
