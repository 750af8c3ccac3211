"""Makes doctests, including those of README.md, run in a temporary folder; kernels have no doctests."""

import pytest

collect_ignore = ["kernels", "cotolora/kernels"]


@pytest.fixture(autouse=True)
def doctests_write_elsewhere(request, monkeypatch):
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))


def pytest_collection_modifyitems(items):
    for item in items:
        if isinstance(item, pytest.DoctestItem) and item.path.match("integrations/README.md"):
            # what the stacks of others say of themselves and of their future versions
            for category in ("FutureWarning", "DeprecationWarning", "UserWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{category}"))
