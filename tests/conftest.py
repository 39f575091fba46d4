"""Fixtures: drawings, a small chain trained on them, tars, the text encoder."""


import pytest
import torch

import stage_a
import stage_b
import stage_c
from plumbing.text import text_encoder
from test_shapes import TINY_A, TINY_B, TINY_C
from tests.common import command, make_tar, members_of


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out by `make test`, run by `make test-all`")


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    """24 drawings in tar shards."""
    folder = tmp_path_factory.mktemp("shards")
    command("-m", "pocket.shapes", "--out", folder / "shapes", "--count", 24, "--workers", 1)
    return folder / "shapes"


@pytest.fixture(scope="session")
def chain(tmp_path_factory, drawings):
    """Folder of weights: A, B and C trained for four steps each, in this process."""
    folder = tmp_path_factory.mktemp("weights")
    a, b = folder / "stage_a/checkpoint.pt", folder / "stage_b/checkpoint.pt"
    stage_a.train(TINY_A, drawings, folder / "stage_a")
    stage_b.train(TINY_B, drawings, folder / "stage_b", a)
    stage_c.train(TINY_C, drawings, folder / "stage_c", a, b)
    return folder


@pytest.fixture
def shards(tmp_path):
    """Three shards of 5, 4 and 3 samples of 30 x 40 pixels."""
    for number, (start, n) in enumerate([(0, 5), (5, 4), (9, 3)]):
        make_tar(tmp_path / "shards" / f"{number:05d}.tar", members_of(n, start))
    return tmp_path / "shards"


@pytest.fixture(scope="session")
def encoder():
    return text_encoder("pocket")
