"""Layers of any width are stacked in these tests."""

import pytest

from cotolora.backends import choice
from cotolora.backends.addmm import lora


@pytest.fixture(autouse=True)
def _of_any_width(monkeypatch):
    monkeypatch.setattr(lora, "_WIDE", 0)
    choice.plans.clear()
    yield
    choice.plans.clear()
