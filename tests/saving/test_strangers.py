"""Untrusted adapter files: they cannot make a load hang, and errors and log lines stay short.

Time limits are CPU time, so that they hold on a busy machine.
"""

import json
import logging
import time
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cotolora import load_adapter
from tests.support.saving import PREFIX, WEIGHTS, base, refused, rewrite

SLOW = [r"(\w+\.?)+!", r"([a-z0-9_.]+)+!", r"(.|[a-z])*!", ".*" * 9 + "!", r"(?=(\w+\.?)+!)x", r"(.*)*\1", "a?" * 50]
FIELDS = {
    "target_modules": lambda pattern: pattern,
    "exclude_modules": lambda pattern: pattern,
    "rank_pattern": lambda pattern: {pattern: 3},
    "alpha_pattern": lambda pattern: {pattern: 3},
    "layers_pattern": lambda pattern: [pattern],
}


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("field", FIELDS)
def test_a_pattern_that_could_hang_is_refused_by_the_name_of_its_field(field, pattern, saved):
    rewrite(saved, **{field: FIELDS[field](pattern), "layers_to_transform": [1]})
    began = time.process_time()
    for strict in (True, False):
        with refused(model := base(), rf"{field} must hold regular expressions that can be matched in bounded time"):
            load_adapter(model, saved, strict=strict)
    assert time.process_time() - began < 5


def test_modules_to_save_are_name_suffixes_not_expressions(saved):
    rewrite(saved, modules_to_save=[r"(\w+\.?)+!", "[", ".*"])
    began = time.process_time()
    load_adapter(base(), saved)
    assert time.process_time() - began < 5


MEGABYTE = "x" * 1_000_000
NESTED = json.loads("[" * 400 + "]" * 400)
FLOODS = {
    "a-long-pattern": ({"target_modules": MEGABYTE}, {}),
    "a-long-excluded": ({"exclude_modules": MEGABYTE + "("}, {}),
    "a-long-key": ({"rank_pattern": {MEGABYTE + ".*": 1}}, {}),
    "many-keys": ({"rank_pattern": {f"a{i}.*": 1 for i in range(20_000)}}, {}),
    "a-broken-key": ({"alpha_pattern": {"(?P<" + "y" * 10_000: 1}}, {}),
    "many-targets": ({"target_modules": [f"a{i}" for i in range(50_000)]}, {}),
    "many-saved": ({"modules_to_save": [f"a{i}" for i in range(50_000)], "target_modules": ["nowhere"]}, {}),
    "many-layers": ({"layers_pattern": [f"a{i}" for i in range(10_000)], "layers_to_transform": [1]}, {}),
    "a-long-value": ({"r": MEGABYTE}, {}),
    "an-unknown-field": ({"something_new": [MEGABYTE] * 3}, {}),
    "a-long-field": ({MEGABYTE: 1}, {}),
    "many-fields": ({f"field{i}": 1 for i in range(20_000)}, {}),
    "a-long-init": ({"init_lora_weights": MEGABYTE}, {}),
    "a-long-method": ({"peft_type": MEGABYTE}, {}),
    "a-deep-value": ({"lora_alpha": NESTED}, {}),
    "a-long-rank": ({"r": 10**4000}, {}),
    "many-tensors": ({}, {f"{PREFIX}a{i}.lora_A.weight": torch.zeros(1) for i in range(3000)}),
    "a-long-tensor": ({}, {PREFIX + MEGABYTE: torch.zeros(1)}),
    "a-foreign-tensor": ({}, {MEGABYTE: torch.zeros(1)}),
    "many-dimensions": ({}, {PREFIX + "fc.lora_A.weight": torch.zeros([1] * 60)}),
}


@pytest.mark.parametrize("case", FLOODS)
def test_no_error_and_no_log_line_is_long(case, saved, caplog):
    fields, tensors = FLOODS[case]
    rewrite(saved, {**load_file(saved / WEIGHTS), **tensors}, **fields)
    model, began = base(), time.process_time()
    with pytest.raises(ValueError, match=r"must|not supported") as caught:
        load_adapter(model, saved)
    assert len(str(caught.value)) < 2000
    with caplog.at_level(logging.WARNING, "cotolora"), suppress(ValueError):
        load_adapter(model, saved, strict=False)
    assert all(len(record.getMessage()) < 2000 for record in caplog.records)
    assert time.process_time() - began < 10


def test_the_result_lists_everything_that_was_skipped(saved):
    strange = {f"a{i}.lora_A.weight": torch.zeros(1) for i in range(1000)}
    rewrite(saved, load_file(saved / WEIGHTS) | {PREFIX + key: tensor for key, tensor in strange.items()})
    assert load_adapter(base(), saved, strict=False).unexpected_keys == sorted(strange)


def test_unused_keys_are_reported_briefly(saved, caplog):
    rewrite(saved, rank_pattern={f"{i}" + "a" * 5000: 3 for i in range(200)})
    long = nn.ModuleDict({f"fc{i}": nn.Linear(4, 4) for i in range(3)})
    with caplog.at_level(logging.WARNING, "cotolora"):
        load_adapter(base(), saved)
        with suppress(ValueError):
            load_adapter(long, saved)
    assert caplog.records
    assert all(len(record.getMessage()) < 2000 for record in caplog.records)
