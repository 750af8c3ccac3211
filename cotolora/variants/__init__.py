"""The variants of the low-rank update, one file each. A new variant needs a file here and an entry below."""

from cotolora.variants.base import Variant
from cotolora.variants.dora import Dora
from cotolora.variants.hira import Hira
from cotolora.variants.lora import Lora
from cotolora.variants.vera import Vera

VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (Lora(), Dora(), Hira(), Vera())}
