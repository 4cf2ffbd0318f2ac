"""Hide GPUs from all tests but those of tests/test_gpu.py, which need a run of their own."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if not all("test_gpu" in path for path in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
