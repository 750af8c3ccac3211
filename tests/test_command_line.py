"""``python -m cotolora``: each command end to end; what it says of damaged files and wrong arguments is one line."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

import cotolora
from cotolora import adapters, inject, load_adapter, save_adapter
from cotolora.commands.layers import by_layer
from cotolora.commands.main import main
from cotolora.merging import AdapterState, align, dare, fuse, lego, mix, ties
from cotolora.saving.contents import contents
from tests.support.repository import ROOT
from tests.support.saving import CONFIG, PREFIX, WEIGHTS, base, config_of, rewrite, train, tuned


def run(*arguments):
    """The exit status of a command, its output and its errors."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(list(map(str, arguments)))
        except SystemExit as error:
            status = error.code
    return status, out.getvalue(), err.getvalue()


def error_of(status, *arguments):
    """The one line that a command prints instead of output when it ends with `status`."""
    found, out, err = run(*arguments)
    assert (found, out) == (status, "")
    assert err.startswith("python -m cotolora")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


class Blocks(nn.Module):
    """Blocks of linears of several sizes, more than ten, and a head."""

    def __init__(self, blocks=11):
        super().__init__()
        sizes = {"q": (6, 6), "up": (6, 10), "down": (10, 6)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}) for _ in range(blocks)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](block["q"](x))))
        return self.head(x)


def written(directory, seed=1, make=Blocks, **options):
    model = tuned(base(make), options.pop("targets", ["q", "up", "down"]), seed=seed, rank=2, **options)
    save_adapter(model, directory)
    return model


# the report


def test_the_report_has_at_most_ten_lines(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run()
    assert (status, err) == (0, "")
    assert len(out.splitlines()) <= 10
    assert f"cotolora {cotolora.__version__}" in out
    assert f"torch {torch.__version__}" in out
    assert "device: cpu" in out
    assert "float32 on cpu: addmm (" in out
    assert "bfloat16 on cpu: addmm (" in out
    assert "tuned table: none" in out
    assert "triton:" not in out


def test_verbose_says_why_the_other_backends_do_not_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, _ = run("--verbose")
    assert status == 0
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert str(cotolora.explain((2048, 4096, 4096, 16), dtype=dtype)) in out


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """What torch says where there are two equal GPUs; their tuned table is sought in `tmp_path`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cotolora, "explain", lambda shapes, dtype, device: f"{dtype} on {device}: made up\nmore")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cotolora" / "Some_GPU.json"


def test_the_report_of_gpus_says_whether_there_is_a_tuned_table(two_gpus):
    status, out, _ = run()
    assert status == 0
    assert len(out.splitlines()) <= 10
    assert "device: cuda, 2 x Some GPU, sm_90" in out
    assert "torch.bfloat16 on cuda: made up" in out
    assert "more\n" not in out
    assert f"tuned table: none in {two_gpus}" in out
    row = {"m": 8, "n": 8, "k": 8, "rank": 8, "element_size": 2, "captured": False, "seconds": {"addmm": 1.0}}
    two_gpus.parent.mkdir()
    two_gpus.write_text(json.dumps({"rows": [row, row]}))
    assert f"tuned table: 2 rows in {two_gpus}" in run()[1]


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "cotolora", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, **options
    )


@pytest.mark.slow
def test_the_commands_as_processes(tmp_path):
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = command(env=ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert cotolora.__version__ in done.stdout
    done = command("merge", "a")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    done = command("inspect", tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    name = "é\udcff"  # of a byte that is no UTF-8
    written(tmp_path / name)
    done = command("inspect", tmp_path / name, env=ascii_only)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_reader_that_stops_early_sees_no_traceback(tmp_path):
    written(tmp_path, make=lambda: Blocks(400))
    process = subprocess.Popen(
        [sys.executable, "-m", "cotolora", "inspect", str(tmp_path), "--verbose"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    process.stderr.close()


WRONG = {
    "no-command": ["nonsense"],
    "no-option": ["--nonsense"],
    "inspect-nothing": ["inspect"],
    "inspect-an-empty-name": ["inspect", ""],
    "inspect-two": ["inspect", "a", "b"],
    "inspect-option": ["inspect", "a", "--nonsense"],
    "plot-without-a-file": ["inspect", "a", "--plot"],
    "plot-into-no-format": ["inspect", "a", "--plot", "norms.txt"],
    "plot-without-an-ending": ["inspect", "a", "--plot", "png"],
    "merge-nothing": ["merge", "--by", "mix", "--out", "o"],
    "merge-one": ["merge", "a", "--by", "mix", "--out", "o"],
    "merge-by-nothing": ["merge", "a", "b", "--out", "o"],
    "merge-by-nonsense": ["merge", "a", "b", "--by", "nonsense", "--out", "o"],
    "merge-into-nothing": ["merge", "a", "b", "--by", "mix"],
    "merge-into-an-empty-name": ["merge", "a", "b", "--by", "mix", "--out", ""],
    "weights-no-numbers": ["merge", "a", "b", "--by", "mix", "--out", "o", "--weights", "1,x"],
    "weights-of-another-number": ["merge", "a", "b", "--by", "mix", "--out", "o", "--weights", "1,2,3"],
    "lego-without-rank": ["merge", "a", "b", "--by", "lego", "--out", "o"],
    "density-of-mix": ["merge", "a", "b", "--by", "mix", "--out", "o", "--density", "0.5"],
    "weights-of-lego": ["merge", "a", "b", "--by", "lego", "--out", "o", "--rank", "2", "--weights", "1,2"],
    "no-reweight-of-mix": ["merge", "a", "b", "--by", "mix", "--out", "o", "--no-reweight"],
    "align-of-ties": ["merge", "a", "b", "--by", "ties", "--out", "o", "--align"],
    "seed-no-integer": ["merge", "a", "b", "--by", "dare", "--out", "o", "--seed", "0.5"],
    "of-nonsense": ["merge", "a", "b", "--by", "dare", "--out", "o", "--of", "nonsense"],
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
def test_wrong_arguments_exit_2_with_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = error_of(2, *arguments)
    name = f" {arguments[0]}" if arguments[0] in ("inspect", "merge") else ""
    assert error.startswith(f"python -m cotolora{name}: error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["merge"]], ids=["alone", "inspect", "merge"])
def test_help(arguments):
    status, out, err = run(*arguments, "--help")
    assert (status, err) == (0, "")
    assert "Exit status" in out


# inspect: what it says of whole files


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "dora"},
        {"variant": "hira"},
        {"variant": "vera"},
        {"init": "pissa", "use_rslora": True},
        {"init": "olora"},
        {"variant": "dora", "init": "pissa"},
        {"rank_pattern": {r"blocks\.[1-3]\.": 5, "up": 3}, "alpha_pattern": {"down": 5.0}, "use_rslora": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "lora",
)
def test_norms_are_those_of_the_products(options, tmp_path):
    model = written(tmp_path, **options)
    found = contents(tmp_path)
    assert found.refusal == ""
    assert found.checksum is True
    assert found.adapters.keys() == adapters(model).keys()
    widest = max(layer.in_features for layer in adapters(model).values())
    for name, layer in adapters(model).items():
        if layer.variant == "vera" and layer.in_features < widest:
            continue  # the file does not say how many columns of A it has
        a, b = (t.detach().double() for t in layer.factors())
        if layer.variant == "vera":
            a, b = a * layer.vera_lambda_d.double()[:, None], b * layer.vera_lambda_b.double()[:, None]
        product = layer.scale * (b @ a)
        assert found.adapters[name].norm == pytest.approx(product.norm().item(), rel=1e-5), name
        assert found.adapters[name].out_features == layer.out_features
        for key, norm in found.adapters[name].extra.items():
            stored = getattr(layer, key).double() * (layer.scale if key == "vera_lambda_b" else 1)
            assert norm == pytest.approx(stored.norm().item(), rel=1e-5)


def test_norms_take_no_memory_of_the_size_of_a_weight(tmp_path):
    size = 2**18  # a product would take 256 GiB
    tensors = {f"{PREFIX}q.lora_A.weight": torch.ones(2, size), f"{PREFIX}q.lora_B.weight": torch.ones(size, 2)}
    save_file(tensors, tmp_path / WEIGHTS)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["q"]}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    found = contents(tmp_path)
    assert found.refusal == ""
    assert found.adapters["q"].norm == pytest.approx(size)


def test_inspect_says_what_a_directory_holds(tmp_path):
    model = base()
    model.name_or_path = "someone/some-model"
    inject(model, ["fc"], rank=2, rank_pattern={r"blocks\.1\..*": 3}, dropout=0.25, trainable=["head.2"])
    save_adapter(train(model), tmp_path)
    status, out, err = run("inspect", tmp_path)
    assert (status, err) == (0, "")
    lines = {line[:14].strip(): line[14:].strip() for line in out.partition("\n\n")[0].splitlines()[1:]}
    assert lines["method"].startswith("lora (")
    assert "lora_dropout=0.25" in lines["method"]
    assert "init_lora_weights=True" in lines["method"]
    assert lines["base model"] == "someone/some-model"
    assert lines["adapters"] == "3 in 3 layers; rank 2 in 2, 3 in 1"
    assert lines["scale"] == "s = 5.33333 in 1, 8 in 2: alpha / rank"
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert lines["parameters"] == f"{count} in 8 tensors, float32"
    assert lines["size"].startswith(f"{4 * count} bytes of tensors, ")
    assert lines["also holds"] == "2 tensors of no linear's adapter: 'head.2.bias', 'head.2.weight'"
    assert lines["checksum"] == "agrees"
    assert lines["load_adapter"] == "reads it, for a model that has these modules"
    norms = {name: adapter.norm for name, adapter in contents(tmp_path).adapters.items()}
    assert f"blocks.1  {norms['blocks.1.fc']:9.4g}" in out


def test_verbose_lists_adapters_tensors_and_fields(tmp_path):
    written(tmp_path, variant="dora", trainable=["head"])
    _, out, _ = run("inspect", tmp_path, "--verbose")
    adapter = contents(tmp_path).adapters["blocks.10.up"]
    line = f"  blocks.10.up: 6 -> 10, rank 2, scale 8, norm {adapter.norm:.4g}"
    assert f"{line}, lora_magnitude {adapter.extra['lora_magnitude']:.4g}\n" in out
    assert "  head.weight: (3, 6) float32, norm " in out
    assert "  use_dora: True\n" in out


def test_layers_are_in_the_order_of_their_numbers(tmp_path):
    written(tmp_path)
    table = run("inspect", tmp_path)[1].partition("\n\n")[2].splitlines()
    assert table[0] == "Frobenius norms by layer of s B A:"
    assert table[1].split() == ["layer", "down", "q", "up", "all"]
    assert [line.split()[0] for line in table[2:]] == [f"blocks.{i}" for i in range(11)]
    for line in table[2:]:
        *each, total = map(float, line.split()[1:])
        assert math.hypot(*each) == pytest.approx(total, rel=1e-3)


def test_experts_share_a_column_and_single_linears_have_none():
    norms = {f"h.{i}.experts.{j}.w": 3.0 + j for i in range(2) for j in range(2)} | {"h.1.q": 1.0, "head": 7.0}
    table = by_layer(norms)
    assert table.rows == ["h.0", "h.1", "head"]
    assert table.columns == {"w": [5.0, 5.0, None], "q": [None, 1.0, None]}
    assert table.total == pytest.approx([5.0, math.sqrt(26), 7.0])
    many = by_layer({f"h.{i}.{kind}": 1.0 for i in range(2) for kind in "abcdefghi"})
    assert (many.columns, many.total) == ({}, [3.0, 3.0])


def test_names_of_kinds_are_as_short_as_they_can_be():
    kinds = ["attention.output.dense", "output.dense", "query"]
    table = by_layer({f"layer.{i}.{kind}": 1.0 for i in range(2) for kind in kinds})
    assert sorted(table.columns) == sorted(kinds)


# inspect: what would be refused


def refused_by_both(model, directory, sizes_known=True):
    """The error of `load_adapter`, which `inspect` must foretell without the model; empty if there is none."""
    error = ""
    try:
        load_adapter(model, directory)
    except (OSError, ValueError) as caught:
        error = str(caught)
    foretold = contents(directory).refusal
    assert foretold == error if sizes_known else bool(foretold) == bool(error)
    status, out, err = run("inspect", directory)
    assert (status, err) == (1 if error else 0, "")
    assert ("refuses it: " if error else "load_adapter  reads it") in out
    return error


def changed(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    rewrite(directory, tensors)


KEY = f"{PREFIX}fc.lora_B.weight"
STRANGE = {
    "nothing": lambda t: None,
    "a-part-missing": lambda t: t.pop(KEY),
    "another-shape": lambda t: t.update({KEY: torch.ones(4, 3)}),
    "one-dimension": lambda t: t.update({KEY: torch.ones(8)}),
    "integers": lambda t: t.update({KEY: torch.ones(4, 2, dtype=torch.int64)}),
    "a-magnitude": lambda t: t.update({f"{PREFIX}fc.lora_magnitude_vector": torch.ones(4)}),
    "a-bias": lambda t: t.update({f"{PREFIX}fc.lora_B.bias": torch.ones(4)}),
    "a-part-of-hira": lambda t: t.update({f"{PREFIX}norm.hira_A": torch.ones(2, 4)}),
    "no-prefix": lambda t: t.update({"fc.lora_B.weight": torch.ones(4, 2)}),
    "a-base": lambda t: t.update({f"{PREFIX}fc.base_layer.weight": torch.ones(4, 4)}),
    "a-base-of-another-size": lambda t: t.update({f"{PREFIX}fc.base_layer.weight": torch.ones(5, 4)}),
    "a-base-bias": lambda t: t.update({f"{PREFIX}fc.base_layer.bias": torch.ones(4)}),
    "a-weight-of-an-adapter": lambda t: t.update({f"{PREFIX}fc.weight": torch.ones(4, 4)}),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_load_adapter_refuses_of_the_tensors_is_foretold(name, saved):
    changed(saved, STRANGE[name])
    error = refused_by_both(base(), saved, sizes_known=name != "one-dimension")
    assert bool(error) == (name not in ("nothing", "a-base", "a-base-bias"))


FIELDS = {
    "another-rank": {"r": 3},
    "no-rank": {"r": "many"},
    "no-alpha": {"lora_alpha": None},
    "pissa": {"init_lora_weights": "pissa"},
    "a-bias": {"bias": "all"},
    "lora-bias": {"lora_bias": True},
    "other-targets": {"target_modules": ["nowhere"]},
    "a-broken-pattern": {"target_modules": "("},
    "a-slow-pattern": {"target_modules": r"(\w+\.?)+!"},
    "a-rank-pattern": {"rank_pattern": {"fc": 4}},
    "dora": {"use_dora": True},
    "loha": {"peft_type": "LOHA"},
    "no-type": {"peft_type": None},
    "a-list-as-type": {"peft_type": ["LORA"]},
    "something-new": {"something_new": [1]},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_what_load_adapter_refuses_of_the_config_is_foretold(fields, saved):
    rewrite(saved, **fields)
    assert refused_by_both(base(), saved)


def test_an_adapter_that_no_model_can_have_is_refused(saved):
    changed(saved, lambda t: t.update({f"{PREFIX}forward.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}))
    assert "unexpected keys ['forward.lora_A.weight'" in contents(saved).refusal


def test_a_refused_config_still_gives_the_scale(saved):
    rewrite(saved, something_new=1)
    assert contents(saved).adapters["fc"].scale == 8
    rewrite(saved, lora_alpha="much")
    found = contents(saved)
    assert found.adapters["fc"].scale is None
    a, b = (load_file(saved / WEIGHTS)[f"{PREFIX}fc.lora_{x}.weight"] for x in "AB")
    expected = torch.linalg.matrix_norm(b @ a)
    assert found.adapters["fc"].norm == pytest.approx(expected.item(), rel=1e-5)
    assert "without s, which is unknown" in run("inspect", saved)[1]


def damage(directory, what):
    weights, config = directory / WEIGHTS, directory / CONFIG
    data = weights.read_bytes()
    if what == "truncated":
        weights.write_bytes(data[:-9])
    elif what == "truncated-header":
        weights.write_bytes(data[:40])
    elif what == "empty":
        weights.write_bytes(b"")
    elif what == "flipped":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 255]))
    elif what == "no-weights":
        weights.unlink()
    elif what == "a-pickle":
        weights.rename(directory / "adapter_model.bin")
    elif what == "no-config":
        config.unlink()
    elif what == "config-a-folder":
        config.unlink()
        config.mkdir()
    elif what == "config-no-json":
        config.write_text("{")
    elif what == "config-a-list":
        config.write_text("[]")
    elif what == "config-edited":
        config.write_text(json.dumps({**config_of(directory), "r": 3}))


NO_WEIGHTS = ("truncated", "truncated-header", "empty", "no-weights", "a-pickle")
NO_CONFIG = ("config-no-json", "config-a-list")
DAMAGES = (*NO_WEIGHTS, *NO_CONFIG, "flipped", "no-config", "config-a-folder", "config-edited")


@pytest.mark.parametrize("what", DAMAGES)
def test_of_a_damaged_pair_the_rest_is_shown(what, saved):
    damage(saved, what)
    assert refused_by_both(base(), saved)
    _, out, _ = run("inspect", saved)
    assert ("weights       cannot be read" in out) == (what in NO_WEIGHTS)
    assert ("Frobenius norms" in out) == (what not in NO_WEIGHTS)
    assert ("checksum      differs" in out) == (what == "flipped")
    assert ("config        cannot be read" in out) == (what in NO_CONFIG)
    assert ("method        lora (" in out) == (what not in NO_CONFIG)


def test_a_directory_without_an_adapter_is_one_line(tmp_path):
    assert "DIR must be a directory; got" in error_of(1, "inspect", tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "which is no directory" in error_of(1, "inspect", tmp_path / "file")
    error_of(1, "inspect", tmp_path)
    error_of(1, "inspect", tmp_path / ("x" * 5000))
    (tmp_path / CONFIG).write_text("no JSON")
    (tmp_path / WEIGHTS).write_text("no tensors")
    error_of(1, "inspect", tmp_path)
    assert "adapter_config.json must be JSON" not in error_of(1, "inspect", tmp_path)


def test_what_is_not_finite_is_named(saved):
    changed(saved, lambda t: t[KEY].fill_(math.nan))
    status, out, _ = run("inspect", saved)
    assert status == 0
    assert "not finite    NaN or infinity in 'fc.lora_B.weight'" in out


def test_names_in_files_cannot_write_to_the_terminal(saved):
    evil = "q\n\x1b[2J\r"
    strange = dict.fromkeys([f"{PREFIX}{evil}", f"{PREFIX}{evil}.lora_A.weight"], torch.ones(2))
    changed(saved, lambda t: t.update({key: value.clone() for key, value in strange.items()}))
    rewrite(saved, base_model_name_or_path=evil, peft_version=evil, something_new={evil: evil}, **{evil: evil})
    for arguments in ([], ["--verbose"]):
        status, out, err = run("inspect", saved, *arguments)
        assert status == 1
        assert all(character.isprintable() or character == "\n" for character in out + err)
        assert "base model    q \\x1b[2J\n" in out


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["q", "", "a.q", "a..q", "h.0.q", "h.1.q", "base_layer.q", "q\0", "ü", "."])
ENDS = [
    "lora_A.weight",
    "lora_B.weight",
    "lora_magnitude_vector",
    "hira_A",
    "hira_B",
    "vera_lambda_d",
    "vera_lambda_b",
    "weight",
    "x",
    "lora_embedding_A",
    "base_layer.weight",
    "base_layer.bias",
    "hada_w1_a",
]
SHAPES = st.lists(st.integers(0, 3), max_size=3)
DTYPES = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
TENSORS = st.dictionaries(
    st.builds("{}{}.{}".format, st.sampled_from([PREFIX, PREFIX, "base_model.", ""]), NAMES, st.sampled_from(ENDS))
    | st.sampled_from(["base_model.vera_A", "base_model.vera_B"]),
    st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), SHAPES, DTYPES),
    max_size=6,
)
TYPES = st.sampled_from(["LORA", "LORA", "HIRA", "VERA", "LOHA"])
OPTIONS = [
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "use_rslora",
    "exclude_modules",
    "modules_to_save",
    "lora_dropout",
    "target_parameters",
    "base_model_name_or_path",
    "save_projection",
    "init_lora_weights",
    "peft_version",
]
SETTINGS = st.fixed_dictionaries(
    {"peft_type": TYPES | JSON, "target_modules": st.just(["q"]) | JSON},
    optional=dict.fromkeys(OPTIONS, JSON | st.sampled_from([1, 2, True, "q", ["q"], {"q": 2}])),
)


@pytest.fixture(scope="module")
def garbage(tmp_path_factory):
    return tmp_path_factory.mktemp("garbage")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    config=st.binary(max_size=20) | JSON.map(json.dumps).map(str.encode) | SETTINGS.map(json.dumps).map(str.encode),
    weights=st.binary(max_size=20) | TENSORS.map(save),
)
def test_garbage_never_raises(garbage, config, weights):
    (garbage / CONFIG).write_bytes(config)
    (garbage / WEIGHTS).write_bytes(weights)
    status, out, err = run("inspect", garbage, "--verbose")
    assert status in (0, 1)
    assert (out == "") == (err != "")
    assert err.count("\n") <= 1
    status, out, err = run("merge", garbage, garbage, "--by", "mix", "--out", garbage / "out", "--overwrite")
    assert status in (0, 1)
    assert (out == "") == (err != "")
    assert err.count("\n") <= 1
    assert (status == 0) == (garbage / "out").exists()
    shutil.rmtree(garbage / "out", ignore_errors=True)


# inspect: files of PEFT


PEFTS = {
    "lora": lambda peft: peft.LoraConfig(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4}),
    "rslora": lambda peft: peft.LoraConfig(target_modules="all-linear", use_rslora=True),
    "dora": lambda peft: peft.LoraConfig(target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"]),
    "pissa": lambda peft: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
    "embedding": lambda peft: peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]),
    "hira": lambda peft: peft.HiraConfig(target_modules=["q_proj"], r=4),
    "vera": lambda peft: peft.VeraConfig(target_modules=["q_proj", "down_proj"], r=4),
    "vera-without-a-and-b": lambda peft: peft.VeraConfig(target_modules=["q_proj"], r=4, save_projection=False),
    "loha": lambda peft: peft.LoHaConfig(target_modules=["q_proj"]),
    "ia3": lambda peft: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "prompt": lambda peft: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}
UNKNOWN = {"loha": "LOHA", "ia3": "IA3", "prompt": "PROMPT_TUNING"}


def llama(tf):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("method", PEFTS)
def test_files_of_peft(method, tf, peft, tmp_path):
    model = peft.get_peft_model(llama(tf), PEFTS[method](peft))
    train(model)
    model.save_pretrained(tmp_path)
    error = refused_by_both(llama(tf), tmp_path)
    assert bool(error) == (method in ("pissa", "embedding", *UNKNOWN))
    _, out, _ = run("inspect", tmp_path)
    name = UNKNOWN.get(method, {"rslora": "lora", "pissa": "lora", "embedding": "lora"}.get(method, method[:4]))
    assert f"method        {name}" in out
    assert "Frobenius norms" in out
    if method in UNKNOWN:
        assert f"{name}, which cotolora does not have" in out
        return
    for name, adapter in contents(tmp_path).adapters.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        if method == "vera":
            columns = 16  # those of down_proj
            shared = [model.base_model.vera_A["default"][:, :columns], model.base_model.vera_B["default"]]
            a = layer.vera_lambda_d["default"][:, None] * shared[0]
            product = layer.vera_lambda_b["default"][:, None] * (shared[1][: layer.out_features] @ a)
        elif method == "vera-without-a-and-b":
            assert adapter.norm is None
            continue
        elif method == "dora":
            product = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        elif method == "hira":
            product = layer.hira_B["default"] @ layer.hira_A["default"]
        else:
            product = layer.get_delta_weight("default")
        assert adapter.norm == pytest.approx(product.norm().item(), rel=1e-4)


# the plot


def drawn(monkeypatch, directory):
    from cotolora.commands import plot

    figures = []
    monkeypatch.setattr(plot, "save_picture", lambda figure, path, dpi: figures.append(figure))
    assert run("inspect", directory, "--plot", directory / "norms.png")[0] == 0
    (figure,) = figures
    return figure.axes


def test_the_plot_shows_the_norms_by_layer(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    written(tmp_path, targets=["q", "up", "head"], variant="dora")
    updates, magnitudes = drawn(monkeypatch, tmp_path)
    found = contents(tmp_path).adapters
    lines = {line.get_label(): line.get_ydata() for line in updates.lines}
    assert lines.keys() == {"q", "up", "single linears"}
    assert list(lines["q"][:11]) == pytest.approx([found[f"blocks.{i}.q"].norm for i in range(11)])
    assert lines["single linears"][11] == pytest.approx(found["head"].norm)
    assert [text.get_text() for text in updates.get_legend().get_texts()] == list(lines)
    assert magnitudes.lines[0].get_ydata()[11] == pytest.approx(found["head"].extra["lora_magnitude"])
    assert updates.get_ylabel() == "Frobenius norm"
    assert magnitudes.get_xlabel() == "layer"
    assert [label.get_text() for label in magnitudes.get_xticklabels()][10:] == ["blocks.10", "head"]


def test_the_plot_of_200_layers_has_room_for_its_labels(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    written(tmp_path, make=lambda: Blocks(200))
    (axis,) = drawn(monkeypatch, tmp_path)
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == [str(i) for i in range(0, 200, 10)]
    assert axis.get_xlabel() == "layer of blocks"
    assert len(axis.lines[0].get_ydata()) == 200


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plots_are_written(ending, tmp_path):
    pytest.importorskip("matplotlib")
    written(tmp_path)
    changed(tmp_path, lambda t: t.update({f"{PREFIX}$x_$.lora_{x}.weight": torch.full((2, 2), math.inf) for x in "AB"}))
    file = tmp_path / f"norms.{ending}"
    status, out, _ = run("inspect", tmp_path, "--plot", file)
    assert status == 1
    assert f"The plot is in {file}" in out
    assert file.read_bytes()[:4] == {"png": b"\x89PNG", "svg": b"<?xm", "pdf": b"%PDF"}[ending]


def test_a_plot_that_cannot_be_made_is_one_line(saved, monkeypatch):
    pytest.importorskip("matplotlib")
    status, _, err = run("inspect", saved, "--plot", saved / "nowhere" / "norms.png")
    assert (status, err.count("\n")) == (1, 1)
    (saved / WEIGHTS).unlink()
    status, _, err = run("inspect", saved, "--plot", saved / "norms.png")
    assert (status, err.count("\n")) == (1, 1)
    assert "--plot must have norms to draw" in err
    monkeypatch.delitem(sys.modules, "cotolora.commands.plot")
    monkeypatch.delattr(cotolora.commands, "plot")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "--plot needs matplotlib, of the extra cotolora[plot]" in error_of(
        1, "inspect", saved, "--plot", "norms.png"
    )


@pytest.mark.slow
def test_only_the_plot_imports_matplotlib(saved):
    code = (
        "import sys; from cotolora.commands.main import main\n"
        f"assert main(['inspect', {str(saved)!r}]) == 0\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


# merge


@pytest.fixture
def three(tmp_path):
    for seed in (1, 2, 3):
        written(tmp_path / str(seed), seed=seed, make=lambda: Blocks(2), trainable=["head"])
    return [tmp_path / str(seed) for seed in (1, 2, 3)]


MERGES = {
    "ties": (["--by", "ties"], lambda s: ties(s)),
    "ties-options": (
        ["--by", "ties", "--density", "0.4", "--weights=-1,2,0.5"],
        lambda s: ties(s, [-1, 2, 0.5], 0.4),
    ),
    "ties-of-products": (
        ["--by", "ties", "--of", "products", "--rank", "3"],
        lambda s: ties(s, of="products", rank=3),
    ),
    "mix": (["--by", "mix"], lambda s: mix(s)),
    "mix-options": (["--by", "mix", "--weights", "1,2,3", "--rank", "3"], lambda s: mix(s, [1, 2, 3], 3)),
    "fuse": (["--by", "fuse"], lambda s: fuse(s)),
    "fuse-options": (["--by", "fuse", "--weights", "0.5,0.2,0.3"], lambda s: fuse(s, [0.5, 0.2, 0.3])),
    "fuse-aligned": (["--by", "fuse", "--align"], lambda s: fuse([s[0], *(align(t, onto=s[0]) for t in s[1:])])),
    "lego": (["--by", "lego", "--rank", "3"], lambda s: lego(s, 3)),
    "lego-options": (
        ["--by", "lego", "--rank", "3", "--seed", "5", "--no-reweight"],
        lambda s: lego(s, 3, reweight=False, seed=5),
    ),
    "dare": (["--by", "dare"], lambda s: dare(s)),
    "dare-options": (["--by", "dare", "--drop", "0.3", "--seed", "7"], lambda s: dare(s, drop=0.3, seed=7)),
}


def held(directory):
    """What the two files of an adapter hold, bit for bit; safetensors orders its metadata as it likes."""
    with safe_open(directory / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    tensors = {key: (t.dtype, t.shape, t.numpy().tobytes()) for key, t in load_file(directory / WEIGHTS).items()}
    return (directory / CONFIG).read_text(), tensors, metadata


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", MERGES)
def test_merging_by_command_and_by_function_write_the_same_files(name, three, tmp_path):
    arguments, function = MERGES[name]
    status, out, err = run("merge", *three, *arguments, "--out", tmp_path / "command")
    assert (status, err) == (0, "")
    assert out.count("\n") == 1
    function([str(directory) for directory in three]).save(tmp_path / "function")
    assert held(tmp_path / "command") == held(tmp_path / "function")
    load_adapter(base(lambda: Blocks(2)), tmp_path / "command")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "command", "function"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_merging_files_of_peft(tf, peft, tmp_path):
    for i in (1, 2):
        model = peft.get_peft_model(llama(tf), peft.LoraConfig(target_modules=["q_proj"], r=2 * i))
        train(model, seed=i).save_pretrained(tmp_path / str(i))
    assert run("merge", tmp_path / "1", tmp_path / "2", "--by", "mix", "--out", tmp_path / "out")[0] == 0
    ours, theirs = contents(tmp_path / "out"), [AdapterState.from_directory(tmp_path / str(i)) for i in (1, 2)]
    for name, adapter in ours.adapters.items():
        expected = sum(state.factors[name].delta().double() for state in theirs) / 2
        assert adapter.norm == pytest.approx(expected.norm().item(), rel=1e-5)
    peft.PeftModel.from_pretrained(llama(tf), tmp_path / "out")


OUT_OF_RANGE = {
    "density": ["--by", "ties", "--density", "1.5"],
    "drop": ["--by", "dare", "--drop", "1"],
    "rank": ["--by", "mix", "--rank", "0"],
    "rank-of-factors": ["--by", "ties", "--rank", "2"],
    "seed": ["--by", "dare", "--seed", str(2**70)],
    "weights": ["--by", "mix", "--weights", "nan,1,1"],
    "weights-of-no-sum": ["--by", "mix", "--weights=1,-1,0"],
}


@pytest.mark.parametrize("arguments", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_values_out_of_range_exit_2_with_the_functions_words(arguments, three, tmp_path):
    error = error_of(2, "merge", *three, *arguments, "--out", tmp_path / "out")
    assert error.startswith(f"python -m cotolora merge: error: argument {arguments[2].partition('=')[0]} must ")
    assert not (tmp_path / "out").exists()


def test_refusals_are_the_functions_own(three, tmp_path):
    written(tmp_path / "smaller", targets=["q"])
    written(tmp_path / "dora", variant="dora")
    written(tmp_path / "scaled", make=lambda: Blocks(2), alpha=3.0, trainable=["head"])
    cases = [(fuse, "smaller"), (mix, "dora"), (fuse, "scaled"), (mix, "nowhere"), (ties, three[0] / WEIGHTS)]
    for function, other in cases:
        directories = [three[0], tmp_path / other]
        with pytest.raises((OSError, ValueError)) as caught:
            function(directories)
        error = error_of(1, "merge", *directories, "--by", function.__name__, "--out", tmp_path / "out")
        assert error == f"python -m cotolora merge: error: {caught.value}\n"
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", [what for what in DAMAGES if what != "config-edited"])
def test_damaged_directories_are_not_merged(what, three, tmp_path):
    damage(three[1], what)
    error_of(1, "merge", *three, "--by", "mix", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "adapter_model.bin"])
def test_an_adapter_is_overwritten_only_when_asked(name, three, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("there")
    (out / "notes").write_text("mine")
    merge = ["merge", *three, "--by", "mix", "--out", out]
    assert "--out must hold no adapter unless --overwrite is given" in error_of(1, *merge)
    assert files_of(out) == {name: b"there", "notes": b"mine"}
    assert run(*merge, "--overwrite")[0] == 0
    assert contents(out).refusal == ""
    assert (out / "notes").read_text() == "mine"


def test_one_of_the_inputs_can_be_overwritten(three, tmp_path):
    mix([str(directory) for directory in three]).save(tmp_path / "function")
    error_of(1, "merge", *three, "--by", "mix", "--out", three[0])
    assert run("merge", *three, "--by", "mix", "--out", three[0], "--overwrite")[0] == 0
    assert held(three[0]) == held(tmp_path / "function")


def test_parents_of_the_result_are_made_and_a_file_is_no_place(three, tmp_path):
    assert run("merge", *three, "--by", "mix", "--out", tmp_path / "a" / "b")[0] == 0
    (tmp_path / "file").write_text("mine")
    error_of(1, "merge", *three, "--by", "mix", "--out", tmp_path / "file" / "inside")
    assert "--out must be a directory" in error_of(1, "merge", *three, "--by", "mix", "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_new_directory_appears_when_it_is_whole(three, tmp_path, monkeypatch):
    save_state, seen = AdapterState.save, []

    def watched(state, directory):
        save_state(state, directory)
        seen.append((tmp_path / "out").exists())

    monkeypatch.setattr(AdapterState, "save", watched)
    assert run("merge", *three, "--by", "mix", "--out", tmp_path / "out")[0] == 0
    assert seen == [False]
    assert files_of(tmp_path / "out").keys() == {CONFIG, WEIGHTS}


@pytest.mark.parametrize("fails", ["save", "rename"])
def test_a_failed_write_leaves_nothing(fails, three, tmp_path, monkeypatch):
    save_state = AdapterState.save

    def half(state, directory):
        save_state(state, directory)
        raise OSError("no space left")

    def no_rename(*_):
        raise OSError("no rename")

    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        if fails == "save":
            patch.setattr(AdapterState, "save", half)
        else:
            patch.setattr(type(tmp_path), "rename", no_rename)
        error_of(1, "merge", *three, "--by", "mix", "--out", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupt_is_one_line(three, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterState, "save", interrupted)
    error_of(130, "merge", *three, "--by", "mix", "--out", tmp_path / "out")
