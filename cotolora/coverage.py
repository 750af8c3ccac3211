"""Warns of weights that no adapter can reach, such as experts stored together in one parameter."""

from __future__ import annotations

import logging
from collections import Counter

from torch import nn

from cotolora.bases import features, is_conv1d
from cotolora.groups import plain_name
from cotolora.linear import CoToLoRALinear

logger = logging.getLogger("cotolora")

WARN_ABOVE = 0.5  # share of unreachable weights


def warn_of_frozen_share(model: nn.Module) -> None:
    """Warns if most weights of `model` outside embeddings are frozen and in modules that cannot have an adapter.

    Linear modules without an adapter do not count, since the user chose not to adapt them.
    """
    total, out_of_reach = _weights(model)
    frozen = sum(out_of_reach.values())
    if frozen > WARN_ABOVE * total:
        places = [name for name, _ in out_of_reach.most_common(4)]
        more = f" and {len(out_of_reach) - 4} more" if len(out_of_reach) > 4 else ""
        logger.warning(
            "%.0f%% of the weights outside the embeddings (%s of %s) stay frozen and cannot be adapted, because they "
            "belong to no linear module: %s%s; trainable=[...] would train them in full",
            100 * frozen / total,
            f"{frozen:,d}",
            f"{total:,d}",
            ", ".join(places),
            more,
        )


def _weights(model: nn.Module) -> tuple[int, Counter[str]]:
    """The number of weights, and the number that no adapter can reach under each name; block numbers become *."""
    total, out_of_reach = 0, Counter[str]()
    embeddings = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    # a weight that is tied to an embedding counts as part of it
    seen = {parameter for module in embeddings for parameter in module.parameters(recurse=False)}
    linears = [module for module in model.modules() if _is_linear(module)]
    # including the modules inside that hold their weights: the base of an adapter, a parametrisation
    reached = {part for linear in linears for part in linear.modules()}
    for name, module in model.named_modules():
        own = {part.attribute for part in module._variant.parts} if isinstance(module, CoToLoRALinear) else set()
        for key, parameter in module.named_parameters(recurse=False):
            if parameter in seen or key in own:
                continue
            seen.add(parameter)
            total += parameter.numel()
            if module not in reached and parameter.dim() > 1 and not parameter.requires_grad:
                full = plain_name(f"{name}.{key}" if name else key)
                out_of_reach[".".join("*" if part.isdecimal() else part for part in full.split("."))] += (
                    parameter.numel()
                )
    return total, out_of_reach


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (CoToLoRALinear, nn.Linear)) or is_conv1d(module) or all(features(module))
