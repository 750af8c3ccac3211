"""LoRA fine-tuning in which adapters come together step by step (CoTo, arXiv:2506.05713)."""

from cotolora.backends.choice import set_backend
from cotolora.backends.explain import explain
from cotolora.coto import CoTo
from cotolora.functional import coto_lora_linear
from cotolora.groups import adapter_parameters, adapters, lora_plus_groups, trainable_parameters, trainable_report
from cotolora.inject import eject, inject
from cotolora.linear import CoToLoRALinear
from cotolora.masks import adapter_mask
from cotolora.saving.adapter import load_adapter, save_adapter
from cotolora.schedule import Schedule, activation_probability, sample_mask
from cotolora.stacking import stack

__version__ = "0.1.0"

__all__ = [
    "CoTo",
    "CoToLoRALinear",
    "Schedule",
    "__version__",
    "activation_probability",
    "adapter_mask",
    "adapter_parameters",
    "adapters",
    "coto_lora_linear",
    "eject",
    "explain",
    "inject",
    "load_adapter",
    "lora_plus_groups",
    "sample_mask",
    "save_adapter",
    "set_backend",
    "stack",
    "trainable_parameters",
    "trainable_report",
]
