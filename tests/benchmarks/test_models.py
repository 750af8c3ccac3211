"""The outcomes of `python -m benchmarks models` for working models and for faults of the library, and a whole run."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import cotolora
from benchmarks import models, report
from benchmarks.models import tiny, trial
from benchmarks.models.trial import NOT_BUILT, REFUSED, WARNED, WORKS, WRONG, NotBuiltError, Subject
from cotolora import weights
from tests.support.repository import ROOT

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


class Net(nn.Module):
    """Blocks of one linear each; with `reads`, one weight is used without calling its linear."""

    def __init__(self, reads=False):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.dropout, self.reads = nn.Dropout(0.3), reads

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = x + (torch.tanh(x @ block[0].weight.T) if self.reads and i == 1 else self.dropout(block(x)))
        return {"x": x, "several": [x.mean(), (torch.cat([x, torch.full_like(x, -torch.inf)]),)]}


def tried(tmp_path, model=None):
    torch.manual_seed(0)
    return trial.tried(lambda: Subject(Net() if model is None else model(), {"x": torch.randn(4, 6)}), tmp_path)


def test_a_model_that_works(tmp_path):
    row = tried(tmp_path)
    assert (row["outcome"], row["reason"], row["peft"]) == (WORKS, "", "equal")
    assert (row["adapters"], row["parameters"], row["warnings"]) == (3, 3 * 42, 0)
    assert row["difference"] < 1e-6


def test_a_model_that_reads_a_weight_without_calling_its_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_traced", False)  # as in a process that has not compiled anything
    row = tried(tmp_path, lambda: Net(reads=True))
    assert (row["outcome"], row["told"]) == (WARNED, "unreached | merged uncalled")
    assert "blocks.1.0" in row["reason"]
    assert "outputs differ after merging, as warned" in row["notes"]


class Attention(nn.Module):
    """Attention whose output projection is never called."""

    def __init__(self):
        super().__init__()
        self.attention, self.up = nn.MultiheadAttention(6, 2, batch_first=True), nn.ModuleList([nn.Linear(6, 6)] * 1)
        self.down = nn.Linear(6, 6)

    def forward(self, x):
        x = x[None]
        return self.down(self.up[0](self.attention(x, x, x, need_weights=False)[0]))


def test_a_refused_layer_is_excluded_as_the_error_advises(tmp_path):
    row = tried(tmp_path, Attention)
    assert (row["outcome"], row["stage"], row["adapters"]) == (REFUSED, "inject", 2)
    assert "attention.out_proj must not be adapted" in row["reason"]


def test_a_model_that_cannot_be_compared_is_not_built(tmp_path):
    class Random(Net):
        def forward(self, x):
            return super().forward(x)["x"] + torch.rand(6, generator=self.generator)

    def random():
        model = Random()
        model.generator = torch.Generator()
        return model

    assert tried(tmp_path, random)["reason"].startswith("its outputs differ from call to call")

    def fail():
        raise NotBuiltError("too large")

    row = trial.tried(fail, tmp_path)
    assert (row["outcome"], row["reason"]) == (NOT_BUILT, "too large")
    row = trial.tried(lambda: {}["config"], tmp_path)
    assert (row["outcome"], row["reason"]) == (NOT_BUILT, "building it raises KeyError: 'config'")


def test_a_model_that_is_random_only_in_train_mode(tmp_path):
    class Random(Net):
        def forward(self, x):
            return super().forward(x)["x"] + (next(self.numbers) if self.training else 0)

    def random():
        model = Random()
        model.numbers = Numbers()
        return model

    class Numbers:
        count = 0

        def __next__(self):
            Numbers.count += 1
            return Numbers.count

    row = tried(tmp_path, random)
    assert (row["outcome"], row["notes"]) == (WORKS, "its outputs in train mode differ from call to call")


class Reversible(torch.autograd.Function):
    """Like Reformer's layers, runs a backward only if its input requires grad."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer(x)

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            ctx.layer(x).backward(dy)
        return x.grad, None


def test_a_model_whose_inputs_must_require_grad(tmp_path):
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Identity()

        def enable_input_require_grads(self):
            self.embedding.register_forward_hook(lambda module, args, x: x.detach().requires_grad_())

        def forward(self, x):
            x = self.embedding(x)
            for block in self.blocks:
                x = Reversible.apply(x, block)
            return x

    row = tried(tmp_path, Model)
    assert (row["outcome"], row["notes"]) == (
        WORKS, "no output requires grad without enable_input_require_grads()")  # fmt: skip


class Drifting(cotolora.CoTo):
    """Changes a frozen parameter."""

    def __init__(self, model, steps):
        super().__init__(model, steps)
        self.frozen = model.blocks[2][0].bias

    def step(self):
        super().step()
        with torch.no_grad():
            self.frozen.add_(1)


def at_fault(monkeypatch, fault):
    layer = cotolora.CoToLoRALinear
    if fault == "off":
        monkeypatch.setattr(layer, "active", property(lambda self: True))
    elif fault == "train":
        monkeypatch.setattr(cotolora, "CoTo", Drifting)
    elif fault == "save":
        monkeypatch.setattr(layer, "scale", property(lambda self: 3.0))
    elif fault == "load":
        monkeypatch.setattr(cotolora, "load_adapter", lambda model, path: cotolora.inject(model, rank=4, alpha=8))
    elif fault == "merge":
        monkeypatch.setattr(cotolora, "eject", lambda model, merge=True, eject=cotolora.eject: eject(model, False))
    else:
        monkeypatch.setattr(cotolora, "inject", lambda *args, **options: 1 / 0)


FAULTS = {
    "off": "outputs with adapters disabled differ",
    "train": "blocks.2.0.bias changed although it is frozen",
    "save": "PEFT's outputs with our file differ",
    "load": "outputs with a loaded adapter differ",
    "merge": "outputs differ after merging",
    "inject": "ZeroDivisionError",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_library_is_wrong(fault, monkeypatch, tmp_path):
    at_fault(monkeypatch, fault)
    row = tried(tmp_path)
    assert (row["outcome"], row["stage"]) == (WRONG, fault)
    assert row["reason"].startswith(FAULTS[fault])


def test_an_error_must_name_the_layer(monkeypatch, tmp_path):
    for message, outcome in (("something is bad", WRONG), ("blocks.1.0 is bad", REFUSED)):

        def fail(*args, message=message, **options):
            raise ValueError(message)

        monkeypatch.setattr(cotolora, "save_adapter", fail)
        row = tried(tmp_path)
        assert (row["outcome"], row["stage"]) == (outcome, "save")


def test_distances():
    nan, one = torch.tensor([torch.nan, 1.0, -torch.inf]), torch.tensor([torch.nan, 1.5, -torch.inf])
    assert trial.distance([one], [nan]) == 0.5
    assert trial.distance([one], [one[:2]]) == trial.distance([one], [one.nan_to_num()]) == float("inf")
    assert trial.same([nan], [nan.clone()])
    assert not trial.same([nan], [one])
    assert not trial.same([nan], [nan, one])


def test_a_config_is_made_smaller_by_the_names_of_its_settings():
    config = transformers.LlavaConfig()
    before = config.text_config.hidden_size // config.text_config.num_attention_heads
    tiny.Shrinking(config, "heads")
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_attention_heads, text.num_hidden_layers) == (64, 4, 2)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size) == (64, 2, 4 * vision.patch_size)
    assert text.vocab_size == tiny.VOCABULARY > config.image_token_index
    assert before == 128


def test_layers_of_every_kind_are_kept():
    config = transformers.Qwen3NextConfig()
    kinds = set(config.layer_types)
    tiny.Shrinking(config, "heads")
    assert set(config.layer_types) == kinds
    assert len(config.layer_types) == config.num_hidden_layers <= 4


def test_settings_that_list_n_layers_keep_n_layers():
    config = transformers.DPTConfig()
    assert list(config.backbone_out_indices) == [2, 5, 8, 11]
    tiny.Shrinking(config, "heads")
    assert (config.num_hidden_layers, list(config.backbone_out_indices)) == (4, [0, 1, 2, 3])


def test_stages_are_kept():
    config = transformers.GLPNConfig()
    tiny.Shrinking(config, "heads")
    assert config.num_encoder_blocks == len(config.depths) == len(config.hidden_sizes) == 4


@pytest.fixture
def three(monkeypatch):
    """Three architectures, and the list of those that were tried."""
    done = []

    def row_of(library, key, name):
        done.append(name)
        row = dict.fromkeys(("parameters", "adapters", "peft", "difference", "warnings", "told", "notes"))
        outcome, why = (WORKS, "") if key == "a" else (WRONG, "bad")
        return {**row, "library": library, "type": key, "architecture": name, "outcome": outcome, "stage": "",
                "reason": why, "seconds": 1.0}  # fmt: skip

    monkeypatch.setattr(models, "architectures", lambda: [("transformers", key, key.upper()) for key in "abc"])
    monkeypatch.setattr(models, "row_of", row_of)
    return done


def test_existing_rows_are_not_made_again(three, monkeypatch, tmp_path, capsys):
    assert models.main(["--only", "a", "--out", str(tmp_path)]) == 0
    assert models.main(["--out", str(tmp_path)]) == 1
    assert three == ["A", "B", "C"]
    (result,) = report.read(tmp_path / "models.json")
    assert [row["type"] for row in result.rows] == ["a", "b", "c"]
    assert (tmp_path / "models.md").read_text().count("\n- B, C: bad") == 1
    models.main(["--only", "B", "--again", "--out", str(tmp_path)])
    assert three == ["A", "B", "C", "B"]
    monkeypatch.setattr(report, "version_of", lambda name: "another")
    models.main(["--only", "a", "--out", str(tmp_path)])
    assert three == ["A", "B", "C", "B", "A"]


def test_rows_of_another_commit_are_kept_on_request(three, monkeypatch, tmp_path, capsys):
    models.main(["--out", str(tmp_path)])
    machine = report.machine
    monkeypatch.setattr(report, "machine", lambda device: machine(device) | {"cotolora": "0 other+changes"})
    models.main(["--keep", "--only", "B", "--again", "--out", str(tmp_path)])
    assert three == ["A", "B", "C", "B"]
    models.main(["--keep", "--out", str(tmp_path)])
    assert three == ["A", "B", "C", "B"]
    assert "\n2 rows are of cotolora" in (tmp_path / "models.md").read_text()
    models.main(["--out", str(tmp_path)])
    assert three == ["A", "B", "C", "B", "A", "C"]
    assert "rows are of" not in (tmp_path / "models.md").read_text()


def test_unknown_architectures_are_named(three, capsys):
    assert models.main(["--only", "d"]) == 2
    assert "no architecture is named d" in capsys.readouterr().out


@pytest.mark.slow
def test_a_process_that_dies_is_a_row(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    row = models.row_of("transformers", "llama", "NoSuchModel")
    assert (row["outcome"], row["architecture"]) == (NOT_BUILT, "NoSuchModel")
    monkeypatch.setattr(models, "child", dies)
    row = models.row_of("transformers", "llama", "LlamaForCausalLM")
    assert (row["outcome"], row["reason"]) == (WRONG, "its process was ended by SIGTERM")


def dies(*args):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_the_quick_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "models", "--quick", "--out", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (result,) = json.loads((tmp_path / "models.json").read_text())["results"]
    outcomes = {row["type"]: row["outcome"] for row in result["rows"]}
    assert len(outcomes) >= 10
    assert set(outcomes.values()) <= {WORKS, WARNED, REFUSED}, process.stdout
    assert [outcomes[key] for key in ("llama", "mamba", "falcon")] == [WORKS, WARNED, REFUSED]
