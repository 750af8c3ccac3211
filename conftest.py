"""For doctests, README.md's included: what they write goes into a temporary folder, and kernels have none."""

import pytest

collect_ignore = ["kernels", "cotolora/kernels"]


@pytest.fixture(autouse=True)
def doctests_write_elsewhere(request, monkeypatch):
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))
