"""Settings for all tests."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
# Two cores, several processes a test: threads would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slow" in item.keywords and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="slow: only under --full"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder with a tiny model, text and tokenizer, shared by the tests of a file."""
    from tiny import Bench

    return Bench(tmp_path_factory.mktemp("bench"))
