"""``python -m cotolora.demo`` with few steps."""

import json
import sys

import matplotlib.image
import pytest
import torch

import cotolora
from cotolora import demo
from cotolora.results import rounded

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "PRETRAIN_STEPS", 30)
        assert demo.main(["--out", str(out), "--seeds", "2", "--steps", "20", "--device", "cpu"]) == 0
    return out


@pytest.fixture(scope="module")
def report(finished):
    return json.loads((finished / "report.json").read_text())


def test_the_report_has_every_figure_for_each_seed(report):
    assert set(report["results"]) == {"LoRA", "CoTo"}
    for result in report["results"].values():
        assert len(result["accuracy"]) == len(result["every_other_layer"]) == len(result["fused"]) == 2
        assert all(0 <= value <= 100 for value in result["accuracy"] + result["every_other_layer"])
        assert all(len(curve) == len(report["lambdas"]) for curve in result["interpolation"])
        # the ends of a curve are the two seeds themselves
        assert result["interpolation"][0][-1] == pytest.approx(result["accuracy"][0])
        assert result["interpolation"][0][0] == pytest.approx(result["accuracy"][1])


def test_skipped_compute_matches_the_gates(report):
    assert report["results"]["LoRA"]["adapter_compute_skipped"] == [0, 0]
    for seed, skipped in enumerate(report["results"]["CoTo"]["adapter_compute_skipped"]):
        model = demo.VisionTransformer()
        cotolora.inject(model, demo.PARTS)
        coto = cotolora.CoTo(model, 20, seed=seed)
        on = []
        for step in range(20):
            coto.set_step(step)
            on.append(coto.mask.float().mean())
        assert skipped == pytest.approx(100 * (1 - torch.stack(on).mean().item()))


def test_the_relative_time_of_lora_is_one(report):
    assert report["results"]["LoRA"]["time_per_step_over_lora"] == [1, 1]
    assert all(value > 0 for value in report["results"]["CoTo"]["time_per_step_over_lora"])


def test_saved_adapters_reproduce_the_accuracy(finished, report, monkeypatch):
    monkeypatch.setattr(demo, "PRETRAIN_STEPS", 30)
    device = torch.device("cpu")
    data = demo.load_data(device)
    base = demo.pretrain(data, device, progress=_Silent())
    for method, result in report["results"].items():
        model = demo.VisionTransformer()
        model.load_state_dict(base.state_dict())
        cotolora.load_adapter(model, finished / "adapters" / f"{method.lower()}-seed1")
        assert rounded(demo.accuracy(model, data.test)) == result["accuracy"][1]


def test_the_figure_is_not_empty(finished):
    picture = matplotlib.image.imread(finished / "coto.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > 800
    assert picture.std() > 0.05


def test_table_names_each_figure():
    result = {
        "learning_rate": 0.01, "accuracy": [90.0, 92.0], "fused": [80.0, 82.0], "every_other_layer": [70.0, 70.0],
        "adapter_compute_skipped": [0.0, 0.0], "mean_time_per_step_over_lora": [1.0, 1.0],
    }  # fmt: skip
    text = demo.table({"LoRA": result, "CoTo": result}, 45.0)
    assert "91.0 ± 1.4" in text
    assert "dropped" in text
    assert "45.0 %" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(["--seeds", "1"], "--seeds", id="nothing-to-fuse"),
        pytest.param(["--steps", "3"], "--steps", id="too-short-a-run"),
        pytest.param(["--device", "abacus"], "--device", id="no-such-device"),
    ],
)
def test_bad_arguments_are_named(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["einops", "matplotlib", "sklearn"])
def test_a_missing_package_is_named_with_its_extra(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit):
        demo.main([])
    assert f'the demo needs {missing}; install it with: pip install "cotolora[demo]"' in capsys.readouterr().err


class _Silent:
    def update(self):
        pass


@pytest.mark.parametrize("kind", demo.KINDS)
def test_every_kind_of_adapter_learns_with_coto(kind):
    torch.manual_seed(0)
    base = demo.VisionTransformer(width=16, depth=2, heads=2)
    run = demo.start("CoTo", base, 0, 1e-2, 30, kind)
    x, y = torch.rand(64, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10
    losses = []
    for _ in range(30):
        losses.append(torch.nn.functional.cross_entropy(run.model(x), y).item())
        run.step(x, y)
    assert losses[-1] < losses[0] - 0.1
    layer = next(iter(cotolora.adapters(run.model).values()))
    assert (layer.variant, layer.init) == (
        {"dora": "dora", "hira": "hira"}.get(kind, "lora"),
        kind if kind in ("pissa", "olora") else "kaiming",
    )
