"""The registry's own variants are held to what `tests.conformance` asks of every variant."""

import pytest

from cotolora.variants import VARIANTS
from tests import conformance

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    # what the interpreter's numpy says of infinities
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.mark.parametrize("case", conformance.cases(VARIANTS.values()))
def test_every_variant(case):
    case()
