"""Runs the properties of `tests.conformance` for every variant in the registry."""

import pytest

from cotolora.variants import VARIANTS
from tests import conformance

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    # numpy, which the interpreter uses, warns about infinities
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.mark.parametrize("case", conformance.cases(VARIANTS.values()))
def test_every_variant(case):
    case()
