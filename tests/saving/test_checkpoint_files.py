"""Adapters on disk: damaged, malicious and incomplete files, and files for another model."""

import copy
import json
import logging
import math
import os
import pickle
import random
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from cotolora import CoToLoRALinear, adapters, load_adapter, save_adapter
from cotolora.merging import AdapterState
from cotolora.variants import VARIANTS
from tests.support.saving import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    base,
    config_of,
    logits,
    picture,
    refused,
    rewrite,
    train,
    tuned,
)

# unsupported settings and invalid configs


def nested(depth):
    return "[" * depth + "]" * depth


BAD_FIELDS = [
    ("use_dora", 1), ("use_dora", "yes"), ("lora_bias", True), ("bias", "all"), ("bias", "lora_only"), ("bias", None),
    ("layer_replication", [[0, 2], [1, 2]]), ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"), ("init_lora_weights", "loftq"), ("init_lora_weights", "corda"),
    ("init_lora_weights", []), ("trainable_token_indices", [1, 2]), ("target_parameters", "fc.weight"),
    ("use_qalora", True), ("megatron_config", {"a": 1}), ("alora_invocation_tokens", [1]), ("velora_config", {"a": 1}),
    ("kasa_config", {}), ("use_bdlora", {}),
    ("ensure_weight_tying", True), ("something_new", 1), ("something_new", {"a": None}),
    ("peft_type", "LOHA"), ("peft_type", "lora"), ("peft_type", None), ("peft_type", ["LORA"]),
    ("r", 0), ("r", -1), ("r", "2"), ("r", 2.0), ("r", True), ("r", None), ("r", [2]),
    ("lora_alpha", "16"), ("lora_alpha", math.nan), ("lora_alpha", math.inf), ("lora_alpha", 10**400),
    ("lora_alpha", 1e39), ("lora_alpha", None),
    ("lora_dropout", 1.5), ("lora_dropout", "0"), ("lora_dropout", -(10**400)),
    ("use_rslora", 1), ("use_rslora", "no"), ("target_modules", None), ("target_modules", []), ("target_modules", ""),
    ("target_modules", 3), ("target_modules", [3]), ("target_modules", {"fc": 1}), ("target_modules", "(fc"),
    ("target_modules", "a{99999999999999999999}"), ("exclude_modules", 3), ("exclude_modules", "["),
    ("rank_pattern", ["fc"]), ("rank_pattern", {"fc": 0}), ("rank_pattern", {"fc": "2"}), ("rank_pattern", {"(": 2}),
    ("alpha_pattern", {"fc": math.nan}), ("alpha_pattern", {"fc": -1e39}),
    ("alpha_pattern", {"fc": None}), ("alpha_pattern", {"*": 2}),
    ("layers_to_transform", "1"), ("layers_to_transform", [-1]), ("layers_to_transform", [True]),
    ("layers_pattern", 3), ("layers_pattern", ["("]), ("modules_to_save", {"head": 1}), ("modules_to_save", [None]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=lambda value: str(value)[:24])
def test_a_bad_field_is_named(field, value, saved):
    rewrite(saved, **{field: value})
    for model in (base(), tuned(base(), ["fc"], rank=2)):
        with refused(model, rf"{CONFIG}: .*{field}"):
            load_adapter(model, saved)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("r", 10**12, r"lora_A.weight must be of shape \(1000000000000, 4\)"),
        ("r", 10**100, "must be of shape"),
        ("rank_pattern", {"fc": 10**9}, "must be of shape"),
        ("target_modules", ["value"], r"target_modules \['value'\] must match linear modules"),
        ("target_modules", "fc.*x", "must match linear modules"),
        ("exclude_modules", [".*", "fc"], "must match linear modules"),
        ("modules_to_save", ["fc"], "must match linear modules"),
        ("target_modules", ["fc", "head.0"], r"missing keys \['head.0.lora_A.weight', 'head.0.lora_B.weight'\]"),
        ("exclude_modules", ["blocks.0.fc"], r"unexpected keys \['blocks.0.fc.lora_A.weight'"),
        ("modules_to_save", ["head.2"], r"missing keys \['head.2.bias', 'head.2.weight'\]"),
    ],
)
def test_a_config_that_does_not_fit_the_weights(field, value, match, saved):
    rewrite(saved, **{field: value})
    for model in (base(), tuned(base(), ["fc"], rank=2)):
        with refused(model, match):
            load_adapter(model, saved)


@pytest.mark.parametrize("field", ["bias", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"])
def test_fields_that_are_absent_have_pefts_defaults(field, peft, saved):
    defaults = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list))
    model = tuned(base(), ["fc"], rank=8, alpha=8.0)
    save_adapter(model, saved)
    fields = config_of(saved)
    assert fields.pop(field) == defaults[field]
    rewrite(saved)
    (saved / CONFIG).write_text(json.dumps(fields))
    other = base()
    load_adapter(other, saved)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "Gaussian", "orthogonal", "eva", "mica", "MiCA"])
def test_inits_that_leave_the_base_alone_are_read(init, saved):
    rewrite(saved, init_lora_weights=init)
    assert load_adapter(base(), saved) == ([], [])


@pytest.mark.parametrize(
    ("field", "value", "way_out"),
    [
        ("init_lora_weights", "PiSSA", "path_initial_model_for_weight_conversion"),
        ("ensure_weight_tying", True, "may be set to false"),
    ],
)
def test_an_error_names_the_file_the_field_and_a_remedy(field, value, way_out, saved):
    rewrite(saved, **{field: value})
    model = base()
    with refused(model, rf"{CONFIG}: {field} must be .*{way_out}.*; got {value!r}"):
        load_adapter(model, saved)


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_key_without_effect_is_named_in_a_warning(pattern, saved, caplog):
    rewrite(saved, **{pattern: {"nowhere": 3, "head.*": 4}})
    with caplog.at_level(logging.WARNING, "cotolora"):
        load_adapter(base(), saved)
    assert [record.getMessage() for record in caplog.records] == [
        f"{pattern}: 'nowhere', 'head.*' match none of the targets, 'blocks.0.fc', 'blocks.1.fc', 'fc'"
    ]


def test_pefts_default_config_is_read(peft, saved):
    fields = json.loads(json.dumps(peft.LoraConfig(r=2, lora_alpha=16, target_modules=["fc"]).to_dict(), default=list))
    rewrite(saved, **fields)
    load_adapter(base(), saved)


SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["fc", ".*", "(", "head"]),
)
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=120, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(sorted({field for field, _ in BAD_FIELDS})), VALUE, max_size=3))
def test_any_config_is_read_or_refused(fields):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        directory, model = Path(name), base()
        patch.setattr(os, "fsync", lambda _: None)
        save_adapter(tuned(base(), ["fc"], rank=2), directory)
        rewrite(directory, **fields)
        before = picture(model)
        try:
            load_adapter(model, directory)
        except ValueError:
            assert picture(model) == before
        else:
            assert adapters(model)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"{'r': 2}", "must be JSON"),
        (b'{"r": 2}\xff', "must be JSON"),
        (b"\x80\x04K\x01.", "must be JSON"),
        (b'{"r": ' + b"1" * 5000 + b"}", "must be JSON"),
        (nested(100_000).encode(), "must be JSON|must hold a JSON object"),
        (b'{"peft_type": "LORA", "target_modules": ' + nested(100_000).encode() + b"}", "must be"),
        (b"[]", "must hold a JSON object; got list"),
        (b"null", "must hold a JSON object; got NoneType"),
        (b'"LORA"', "must hold a JSON object; got str"),
        (b"{}", "peft_type must be 'LORA'"),
    ],
    ids=lambda value: repr(value)[:16],
)
def test_an_invalid_config_is_refused(text, match, saved):
    rewrite(saved)
    (saved / CONFIG).write_bytes(text)
    model = base()
    with refused(model, match):
        load_adapter(model, saved)


# missing, damaged and malicious files


def test_missing_files(saved, tmp_path):
    model = base()
    with refused(model, "must hold adapter_model.safetensors; there is none", FileNotFoundError):
        load_adapter(model, tmp_path / "nowhere")
    rewrite(saved)
    (saved / CONFIG).unlink()
    with refused(model, "must hold adapter_config.json; there is none", FileNotFoundError):
        load_adapter(model, saved)
    (saved / WEIGHTS).unlink()
    (saved / WEIGHTS).mkdir()
    with refused(model, "must hold adapter_model.safetensors", FileNotFoundError):
        load_adapter(model, saved)


def unless_a_pipe(read):
    def checked(path, *args, **options):
        assert not path.is_fifo(), "reading it would wait for ever"
        return read(path, *args, **options)

    return checked


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_pipe_in_the_place_of_a_file_is_waited_for_by_nobody(name, saved, monkeypatch):
    for way in ("open", "read_bytes"):
        monkeypatch.setattr(Path, way, unless_a_pipe(getattr(Path, way)))
    (saved / name).unlink()
    os.mkfifo(saved / name)
    message, kind = (
        ("must be a regular file", ValueError) if name == CONFIG else (f"must hold {WEIGHTS}", FileNotFoundError)
    )
    with refused(base(), message, kind):
        load_adapter(base(), saved)
    model = tuned(base(), ["fc"], rank=2)
    save_adapter(model, saved)
    other = base()
    load_adapter(other, saved)
    assert torch.equal(logits(other), logits(model))


def test_the_config_must_be_the_one_the_weights_were_saved_with(saved, tmp_path):
    model = base()
    save_adapter(tuned(base(), ["fc"], rank=2, alpha=17.0), tmp_path / "other")
    mine = (saved / CONFIG).read_bytes()
    for text in ((tmp_path / "other" / CONFIG).read_bytes(), mine + b"x", mine.replace(b"LORA", b"HIRA"), b"[]", None):
        (saved / CONFIG).unlink() if text is None else (saved / CONFIG).write_bytes(text)
        for strict in (True, False):
            with refused(model, "must be the config that .* was saved with"):
                load_adapter(model, saved, strict=strict)
    (saved / CONFIG).write_bytes(mine)
    load_adapter(model, saved)


EDITS = {
    "name": lambda fields: {**fields, "base_model_name_or_path": "me/model", "revision": "v2", "task_type": "X"},
    "order-of-targets": lambda fields: {**fields, "target_modules": fields["target_modules"][::-1]},
    "order-of-fields": lambda fields: dict(reversed(fields.items())),
    "defaults-of-peft": lambda fields: {**fields, "lora_bias": False, "layers_pattern": None, "peft_version": "0.21"},
}


@pytest.mark.parametrize("edit", EDITS)
def test_fields_without_effect_may_be_edited(edit, saved):
    fields = config_of(saved)
    fields["target_modules"] = ["blocks.0.fc", "blocks.1.fc", "fc"]
    (saved / CONFIG).write_text(json.dumps(EDITS[edit](fields)))
    model = base()
    load_adapter(model, saved)
    assert torch.equal(logits(model), logits(tuned(base(), ["fc"], rank=2)))


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_an_edited_field_is_named(field, saved):
    fields = config_of(saved)
    (saved / CONFIG).write_text(json.dumps({**fields, field: 7}))
    with refused(
        model := base(),
        rf"stored as cotolora_config in its metadata; it has {{'{field}': 7}}, the saved one has .*{fields[field]}",
    ):
        load_adapter(model, saved)


def test_a_config_that_cannot_be_read_says_why(saved):
    (saved / CONFIG).write_text((saved / CONFIG).read_text(), encoding="utf-16")
    with refused(model := base(), "was saved with.* must be JSON; reading it failed: 'utf-8' codec"):
        load_adapter(model, saved)
    (saved / CONFIG).unlink()
    (saved / CONFIG).mkdir()
    with refused(model, "was saved with.*Is a directory"):
        load_adapter(model, saved)


def test_a_byte_order_mark_is_accepted(saved):
    (saved / CONFIG).write_text((saved / CONFIG).read_text(), encoding="utf-8-sig")
    assert load_adapter(base(), saved) == ([], [])


@pytest.mark.parametrize("end", [b"\r\n", b"\r", b" \n\t"])
def test_line_endings_may_change(end, saved):
    (saved / CONFIG).write_bytes((saved / CONFIG).read_bytes().replace(b"\n", end) + end)
    assert load_adapter(base(), saved) == ([], [])


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", 1), ("lora_alpha", 17), ("use_rslora", True), ("use_dora", True), ("rank_pattern", {"fc": 2}),
     ("alpha_pattern", {"fc": 3}), ("target_modules", ["fc"]), ("exclude_modules", ["head"]), ("lora_dropout", 0.5),
     ("modules_to_save", ["head"]), ("layers_to_transform", [1]), ("lora_bias", True), ("something_new", 1)],
)  # fmt: skip
def test_fields_with_an_effect_must_not_be_edited(field, value, saved):
    (saved / CONFIG).write_text(json.dumps({**config_of(saved), field: value}))
    with refused(model := base(), "must be the config that .* was saved with"):
        load_adapter(model, saved)


def header(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path, fields, data):
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("share", [0.0, 1, 7, 8, 9, 0.1, 0.5, 0.9, 0.999, -1])
def test_truncated_weights(share, saved):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[: int(share * len(data)) if isinstance(share, float) else share])
    model = base()
    with refused(model, "must be a whole safetensors file"):
        load_adapter(model, saved)


def test_random_bytes(saved):
    generator, model = random.Random(0), base()
    for size in (1, 8, 100, 10_000):
        (saved / WEIGHTS).write_bytes(generator.randbytes(size))
        with refused(model, "must be a whole safetensors file"):
            load_adapter(model, saved)


def test_flipped_bytes_in_the_header(saved):
    """Each flip is refused or harmless: if a file is loaded, its factors are correct."""
    data, generator = (saved / WEIGHTS).read_bytes(), random.Random(1)
    length = 8 + struct.unpack("<Q", data[:8])[0]
    reference, refusals = tuned(base(), ["fc"], rank=2), 0
    model = tuned(base(), ["fc"], rank=2, seed=2)
    for _ in range(300):
        flipped = bytearray(data)
        flipped[generator.randrange(length)] ^= 1 << generator.randrange(8)
        (saved / WEIGHTS).write_bytes(flipped)
        before = picture(model)
        try:
            load_adapter(model, saved)
        except ValueError:
            refusals += 1
            assert picture(model) == before
        else:
            assert torch.equal(logits(model), logits(reference))
            train(model)
    assert refusals > 200


def test_a_flipped_bit_in_the_data_is_an_error(saved):
    data, generator, model = (saved / WEIGHTS).read_bytes(), random.Random(2), base()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for place in (start, len(data) - 1, *(generator.randrange(start, len(data)) for _ in range(40))):
        flipped = bytearray(data)
        flipped[place] ^= 1 << generator.randrange(8)
        (saved / WEIGHTS).write_bytes(flipped)
        with refused(model, "must be as it was saved"):
            load_adapter(model, saved)
    (saved / WEIGHTS).write_bytes(data)
    load_adapter(model, saved)


def test_swapped_tensors_are_an_error(saved):
    fields, data = header(saved / WEIGHTS)
    one, other = (PREFIX + f"blocks.{i}.fc.lora_A.weight" for i in range(2))
    write_raw(saved / WEIGHTS, {**fields, one: fields[other], other: fields[one]}, data)
    with refused(model := base(), "must be as it was saved"):
        load_adapter(model, saved)


def test_files_without_a_checksum_are_read(saved):
    fields, data = header(saved / WEIGHTS)
    metadata = {key: value for key, value in fields["__metadata__"].items() if "sha256" not in key}
    assert len(metadata) == len(fields["__metadata__"]) - 1
    write_raw(saved / WEIGHTS, {**fields, "__metadata__": metadata}, data)
    load_adapter(base(), saved)
    write_raw(saved / WEIGHTS, {key: value for key, value in fields.items() if key != "__metadata__"}, data)
    load_adapter(base(), saved)


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("oversized-header", "must be a whole safetensors file"),
        ("huge-header", "must be a whole safetensors file"),
        ("header-not-json", "must be a whole safetensors file"),
        ("overlap", "must be a whole safetensors file"),
        ("beyond-the-end", "must be a whole safetensors file"),
        ("unknown-dtype", "must be a whole safetensors file"),
        ("half-the-keys", r"missing keys \['blocks.0.fc.lora_A.weight'"),
        ("one-factor", r"missing keys \['fc.lora_B.weight'\], unexpected keys \[\]"),
        ("renamed", r"missing keys .*fc.lora_A.weight.* unexpected keys .*fc.lora_a.weight"),
        ("no-prefix", r"must hold keys that begin with 'base_model.model.'; got"),
        ("extra", r"unexpected keys \['nowhere.lora_A.weight'\]"),
        ("base-weight", r"unexpected keys \['fc.weight'\]"),
        ("transposed", r"fc.lora_B.weight must be of shape \(4, 2\); the file holds \(2, 4\)"),
        ("another-rank", r"fc.lora_A.weight must be of shape \(2, 4\); the file holds \(3, 4\)"),
        ("flat", r"must be of shape \(2, 4\); the file holds \(8,\)"),
        ("scalar", r"the file holds \(\)"),
        ("empty-tensor", r"the file holds \(0, 4\)"),
        ("integers", "fc.lora_A.weight must be of a dtype like torch.float32; the file holds torch.int32"),
        ("bools", "must be of a dtype like torch.float32; the file holds torch.bool"),
        ("complex", "must be of a dtype like torch.float32; the file holds torch.complex64"),
        ("head-shape", r"head.2.bias must be of shape \(3,\); the file holds \(2,\)"),
        ("head-integers", r"head.2.bias must be of a dtype like torch.float32; the file holds torch.int64"),
        ("counter-floats", r"num_batches_tracked must be of a dtype like torch.int64; the file holds torch.float32"),
        ("no-tensors", "missing keys"),
        ("twice", r"must hold each tensor once; 'base_model.model.fc.lora_A.weight.weight' is another of one"),
    ],
)
def test_weights_that_do_not_fit(case, match, saved):
    path = saved / WEIGHTS
    fields, data = header(path)
    tensors = load_file(path)
    first = PREFIX + "blocks.0.fc.lora_A.weight"
    raw = {
        "oversized-header": lambda: path.write_bytes(struct.pack("<Q", 10**6) + b"{}"),
        "huge-header": lambda: path.write_bytes(struct.pack("<Q", 2**63) + b"{}"),
        "header-not-json": lambda: write_raw(path, b"{'a': 1}", data),
        "overlap": lambda: write_raw(path, {**fields, first: {**fields[first], "data_offsets": [8, 40]}}, data),
        "beyond-the-end": lambda: write_raw(path, fields, data[:-4]),
        "unknown-dtype": lambda: write_raw(path, {**fields, first: {**fields[first], "dtype": "F7"}}, data),
    }
    if case in raw:
        raw[case]()
    else:
        a, b = (PREFIX + f"fc.lora_{factor}.weight" for factor in "AB")
        head, counter = PREFIX + "head.2.bias", PREFIX + "head.1.num_batches_tracked"
        changed = {
            "half-the-keys": lambda: {key: t for key, t in tensors.items() if "blocks" not in key},
            "one-factor": lambda: {key: t for key, t in tensors.items() if key != b},
            "renamed": lambda: {key.replace("lora_A", "lora_a"): t for key, t in tensors.items()},
            "no-prefix": lambda: {key.removeprefix(PREFIX): t for key, t in tensors.items()},
            "extra": lambda: {**tensors, PREFIX + "nowhere.lora_A.weight": torch.zeros(2, 4)},
            "base-weight": lambda: {**tensors, PREFIX + "fc.weight": torch.zeros(4, 4)},
            "transposed": lambda: {**tensors, b: tensors[b].T.contiguous()},
            "another-rank": lambda: {**tensors, a: torch.zeros(3, 4)},
            "flat": lambda: {**tensors, a: tensors[a].reshape(8)},
            "scalar": lambda: {**tensors, a: torch.tensor(1.0)},
            "empty-tensor": lambda: {**tensors, a: torch.zeros(0, 4)},
            "integers": lambda: {**tensors, a: tensors[a].int()},
            "bools": lambda: {**tensors, a: tensors[a] > 0},
            "complex": lambda: {**tensors, a: tensors[a].to(torch.complex64)},
            "head-shape": lambda: {**tensors, head: torch.zeros(2)},
            "head-integers": lambda: {**tensors, head: torch.zeros(3, dtype=torch.int64)},
            "counter-floats": lambda: {**tensors, counter: torch.tensor(1.0)},
            "no-tensors": lambda: {},
            "twice": lambda: {**tensors, f"{a}.weight": tensors[a] + 1},
        }[case]()
        rewrite(saved, changed)
    for model in (base(), tuned(base(), ["fc"], rank=2)):
        with refused(model, match):
            load_adapter(model, saved)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "head-shape", "rank"])
def test_all_of_a_file_is_checked_before_any_of_it_is_loaded(damage, tmp_path):
    options = {"targets": ["fc"], "rank": 2, "trainable": ["head", "gamma", "token"]}
    save_adapter(tuned(base(), **options), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    last, head = PREFIX + "fc.lora_B.weight", PREFIX + "token"
    if damage == "missing":
        del tensors[last]
    rewrite(tmp_path, {
        **tensors,
        **{
            "missing": {},
            "extra": {PREFIX + "zzz.lora_A.weight": torch.zeros(2, 4)},
            "shape": {last: torch.zeros(4, 3)},
            "head-shape": {head: torch.zeros(5)},
            "rank": {},
        }[damage],
    }, **({"rank_pattern": {"^fc": 1}} if damage == "rank" else {}))  # fmt: skip
    for model in (base(), tuned(base(), **options, seed=2)):
        with refused(model, "must"):
            load_adapter(model, tmp_path)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "F8_E4M3", "F8_E5M2", "C64", "U64", "F16", "BF16"])
def test_every_dtype_of_the_format_is_read_or_refused(dtype, saved):
    """For any dtype in the file, tensors that are not factors of the right shape are refused."""
    fields, data = header(saved / WEIGHTS)
    first = PREFIX + "blocks.0.fc.lora_A.weight"
    write_raw(saved / WEIGHTS, {**fields, first: {**fields[first], "dtype": dtype}}, data)
    model = base()
    with refused(model, "must be"):
        load_adapter(model, saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_factors_of_another_floating_dtype_are_cast(dtype, saved):
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(saved / WEIGHTS).items()}
    rewrite(saved, tensors)
    model = base()
    load_adapter(model, saved)
    assert torch.equal(model.fc.lora_b, tensors[PREFIX + "fc.lora_B.weight"].float())


SMALL_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("onto", ["base", "adapters"])
@pytest.mark.parametrize("dtype", [*SMALL_DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("variant", ["lora", "dora", "hira"])
def test_small_numbers_are_loaded_without_loss(variant, dtype, onto, tmp_path):
    options = {"targets": ["fc"], "rank": 3, "variant": variant, "trainable": ["head.2"]}
    save_adapter(tuned(base(), **options), tmp_path)
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(tmp_path / WEIGHTS).items()}
    rewrite(tmp_path, tensors)
    model = base()
    if onto == "adapters":
        tuned(model, **options, seed=2)
    assert load_adapter(model, tmp_path) == ([], [])
    for name, layer in adapters(model).items():
        stored = [tensors[f"{PREFIX}{name}.{part.key}"] for part in VARIANTS[variant].parts]
        # HiRA's B is the tensor of the file divided by the layer's scale, in float32
        scale = layer.scale if variant == "hira" else 1
        expected = [t.double() if dtype == torch.float64 else t.float() for t in stored]
        expected[1] = expected[1] / scale
        for parameter, value in zip(layer.adapter_parameters, expected, strict=True):
            assert torch.equal(parameter, value.float())
    assert torch.equal(model.head[2].weight, tensors[PREFIX + "head.2.weight"].float())


@pytest.mark.parametrize("dtype", SMALL_DTYPES, ids=str)
def test_small_numbers_are_merged_in_float32(dtype, saved):
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(saved / WEIGHTS).items()}
    rewrite(saved, {**tensors, PREFIX + "head.0.bias": torch.ones(4).to(dtype)})
    state = AdapterState.from_directory(saved)
    for name, part in state.factors.items():
        assert torch.equal(part.lora_b, tensors[f"{PREFIX}{name}.lora_B.weight"].float())
    state.load_into(base())


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS])
def test_no_pickle_is_ever_read(name, saved, tmp_path):
    mark = tmp_path / "code-ran"
    (saved / WEIGHTS).unlink()
    torch.save({"a": Bomb(mark)}, saved / name)
    (saved / CONFIG).write_bytes(pickle.dumps(Bomb(mark)))
    model = base()
    with refused(
        model, "adapter_model.bin, which is not read, because a pickle can run code|must be a whole safetensors file"
    ):
        load_adapter(model, saved)
    assert not mark.exists()
    with open(saved / name, "rb") as file:
        torch.load(file, weights_only=False)
    assert mark.exists()  # unpickling would have run the code


def test_an_adapter_for_a_module_that_cannot_be_adapted(saved):
    model = base()
    model.fc = nn.LazyLinear(4)  # its shape is not known yet
    with pytest.raises(ValueError, match=r"fc must be a module that maps .* LazyLinear"):
        load_adapter(model, saved)
    model = base().to("meta")
    with pytest.raises(ValueError, match=r"must have memory in the model.* meta device"):
        load_adapter(model, saved)
    assert not adapters(model)
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        load_adapter(None, saved)
    with pytest.raises(ValueError, match="must match linear modules"):
        load_adapter(CoToLoRALinear(4, 4), saved)


# strict


def without(directory, *names):
    tensors = load_file(directory / WEIGHTS)
    rewrite(directory, {key: t for key, t in tensors.items() if not key.startswith(tuple(PREFIX + n for n in names))})


def factors(*names):
    return [f"{name}.lora_{factor}.weight" for name in names for factor in "AB"]


def test_adapters_missing_from_the_file(saved, caplog):
    without(saved, "blocks.0.fc")
    fresh, injected, reference = base(), tuned(base(), ["fc"], rank=2, seed=3), tuned(base(), ["fc"], rank=2)
    before = copy.deepcopy(injected.blocks[0].fc.state_dict())
    for model in (fresh, injected):
        with refused(model, r"missing keys \['blocks.0.fc.lora_A.weight'.* unexpected keys \[\]"):
            load_adapter(model, saved)
        with caplog.at_level(logging.WARNING, "cotolora"):
            result = load_adapter(model, saved, strict=False)
        assert result.missing_keys == factors("blocks.0.fc")
        assert result.unexpected_keys == []
        assert "blocks.0.fc.lora_A.weight" in caplog.text
        caplog.clear()
        for name in ("blocks.1.fc", "fc"):
            assert torch.equal(adapters(model)[name].lora_b, adapters(reference)[name].lora_b)
    assert list(adapters(fresh)) == ["blocks.1.fc", "fc"]
    assert all(torch.equal(before[key], value) for key, value in injected.blocks[0].fc.state_dict().items())


def test_adapters_missing_from_the_model(saved, caplog):
    model = tuned(base(), ["blocks.1.fc"], rank=2, seed=3)
    with refused(model, r"missing keys \[\], unexpected keys \['blocks.0.fc.lora_A.weight'"):
        load_adapter(model, saved)
    with caplog.at_level(logging.WARNING, "cotolora"):
        result = load_adapter(model, saved, strict=False)
    assert result == ([], factors("blocks.0.fc", "fc"))
    assert "unexpected keys" in caplog.text
    assert list(adapters(model)) == ["blocks.1.fc"]
    reference = tuned(base(), ["fc"], rank=2)
    assert torch.equal(model.blocks[1].fc.lora_b, reference.blocks[1].fc.lora_b)


def test_adapters_in_the_model_that_the_config_does_not_target(saved):
    model = tuned(base(), ["fc", "head.0"], rank=2, seed=3)
    with refused(model, r"missing keys \['head.0.lora_A.weight', 'head.0.lora_B.weight'\]"):
        load_adapter(model, saved)
    before = model.head[0].lora_b.clone()
    assert load_adapter(model, saved, strict=False) == (factors("head.0"), [])
    assert torch.equal(model.head[0].lora_b, before)


def test_half_an_adapter_is_not_loaded(saved):
    tensors = load_file(saved / WEIGHTS)
    del tensors[PREFIX + "fc.lora_B.weight"]
    rewrite(saved, tensors)
    model = tuned(base(), ["fc"], rank=2, seed=3)
    before = copy.deepcopy(model.fc.state_dict())
    assert load_adapter(model, saved, strict=False) == (["fc.lora_B.weight"], [])
    assert all(torch.equal(before[key], value) for key, value in model.fc.state_dict().items())


def test_strict_false_allows_nothing_else(saved):
    model = base()
    without(saved, "blocks", "fc")
    with refused(model, "must hold an adapter that fits the model; it holds none"):
        load_adapter(model, saved, strict=False)
    save_adapter(tuned(base(), ["fc"], rank=2), saved)
    tensors = load_file(saved / WEIGHTS)
    rewrite(saved, {**tensors, PREFIX + "fc.lora_A.weight": torch.zeros(3, 4)})
    with refused(model, "must be of shape"):
        load_adapter(model, saved, strict=False)


def test_a_complete_load_logs_nothing(saved, caplog):
    with caplog.at_level(logging.DEBUG, "cotolora"):
        result = load_adapter(base(), saved)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 3}, r"must have the rank and scale of the file, 2 and 8; the model's are 3 and"),
        ({"rank": 2, "alpha": 17.0}, "must have the rank and scale of the file, 2 and 8; the model's are 2 and 8.5"),
        ({"rank": 2, "use_rslora": True}, "must have the rank and scale"),
        ({"rank": 2, "alpha_pattern": {"^fc": 15.999}}, "^fc must have the rank and scale"),
        ({"rank": 2, "rank_pattern": {"^fc": 1}}, "^fc must have the rank and scale"),
        ({"rank": 2, "variant": "dora"}, "must have the variant of the file, 'lora'; the model's is 'dora'"),
        ({"rank": 2, "variant": "hira"}, "must have the variant of the file, 'lora'; the model's is 'hira'"),
        ({"rank": 2, "init": "pissa"}, "must not have an init that depends on W.*'pissa'"),
    ],
    ids=str,
)
def test_an_injected_model_must_agree(options, match, saved):
    model = tuned(base(), ["fc"], **options)
    for strict in (True, False):
        with refused(model, match):
            load_adapter(model, saved, strict=strict)


class Attending(nn.Module):
    """Its attention passes the weight of `out_proj` to a functional, which PEFT can adapt and we cannot."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
        self.fc, self.encoder = nn.Linear(4, 4), nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.fc(self.encoder(x))


@pytest.mark.parametrize("targets", ["all-linear", ["fc", "out_proj"], ["fc", "self_attn"], r"fc|.*\.out_proj"])
@pytest.mark.parametrize("onto", ["base", "adapters"])
def test_adapters_inside_attention_are_skipped_by_name(targets, onto, peft, tmp_path, caplog):
    theirs = train(peft.get_peft_model(base(Attending), peft.LoraConfig(target_modules=targets, r=2)))
    theirs.save_pretrained(tmp_path)
    stored = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(tmp_path / WEIGHTS).items()}
    inside = sorted(key for key in stored if "self_attn" in key)
    assert inside
    model = base(Attending) if onto == "base" else tuned(base(Attending), ["fc", "linear1", "linear2"], rank=2, alpha=8)
    with refused(model, r"encoder\.layers\.0\.self_attn.*encoder\.layers\.1\.self_attn.*strict=False"):
        load_adapter(model, tmp_path)
    with caplog.at_level(logging.WARNING, "cotolora"):
        result = load_adapter(model, tmp_path, strict=False)
    assert result.unexpected_keys == inside
    assert any(all(key in record.getMessage() for key in inside) for record in caplog.records)
    for key in set(stored) - set(inside):
        name, factor = key.removesuffix(".weight").rsplit(".", 1)
        assert torch.equal(getattr(adapters(model)[name], factor.lower()), stored[key])
