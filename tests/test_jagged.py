"""Jagged nested tensors (samples of different lengths), with every variant, backend and kind of base."""

import os

import pytest
import torch
from torch import nn

from cotolora import CoToLoRALinear, coto_lora_linear, inject, set_backend
from cotolora.backends.fused.common import has_triton
from cotolora.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and has_triton()
LENGTHS = (2, 5, 0)
GATES = {
    "on": True,
    "device-on": torch.tensor(1),
    "device-off": torch.tensor(0),
    "rows": torch.tensor([1, 0, 1]),
}


def backends_of(variant):
    return ["reference", "addmm", *(["triton"] if INTERPRETED and VARIANTS[variant].fused else [])]


def layer_of(variant="lora", **options):
    torch.manual_seed(0)
    layer = CoToLoRALinear(8, 6, rank=2, variant=variant, **options)
    for parameter in layer.adapter_parameters:
        nn.init.normal_(parameter, std=0.3)
    return layer


def samples(width=8):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(length, width, generator=g) for length in LENGTHS]


def jagged(parts, **options):
    return torch.nested.nested_tensor(parts, layout=torch.jagged, **options)


def one_by_one(layer, gate, parts):
    """The layer's result for each sample separately."""
    rows = []
    for i, part in enumerate(parts):
        layer.gate = gate[i] if isinstance(gate, torch.Tensor) and gate.dim() else gate
        rows.append(layer(part))
    layer.gate = gate
    return torch.cat(rows)


def gradients(y, leaves):
    return torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_jagged_tensor_is_computed_sample_by_sample(variant, gate):
    layer, gate = layer_of(variant), GATES[gate]
    for backend in backends_of(variant):
        for seen in (False, True):  # without and with a cached plan for such calls
            x, parts = jagged(samples(), requires_grad=True), [part.requires_grad_() for part in samples()]
            with set_backend(backend):
                if seen:
                    layer_of(variant)(parts[0])
                layer.gate = gate
                y, expected = layer(x), one_by_one(layer, gate, parts)
                found = gradients(y.values(), [x, *layer.adapter_parameters])
                of_parts = gradients(expected, [*parts, *layer.adapter_parameters])
            torch.testing.assert_close(y.values(), expected)
            torch.testing.assert_close(found[0].values(), torch.cat(of_parts[:3]))
            for one, other in zip(found[1:], of_parts[3:], strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["reference", "addmm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_draws_the_same_mask_as_for_dense_rows(variant, backend):
    layer, x = layer_of(variant, dropout=0.5), jagged(samples())
    with set_backend(backend):
        torch.manual_seed(3)
        y = layer(x)
        torch.manual_seed(3)
        assert torch.equal(y.values(), layer(x.values()))
    assert not torch.equal(y.values(), layer.eval()(x.values()))


def test_the_output_has_the_structure_of_the_input():
    layer, x = layer_of(), jagged(samples())
    x._get_max_seqlen()
    y = layer(x)
    assert y.offsets() is x.offsets()
    assert y.shape[:2] == x.shape[:2]
    assert y._maybe_max_seqlen == 5
    assert (y + nn.Linear(8, 6)(x)).shape == y.shape
    holes = torch.nested.nested_tensor_from_jagged(
        torch.cat(samples()), torch.tensor([0, 2, 7]), lengths=torch.tensor([1, 3])
    )
    y, rows = layer(holes), layer(holes.values())
    assert [part.shape[0] for part in y.unbind()] == [1, 3]
    torch.testing.assert_close(y.unbind()[1], rows[2:5])
    layer.gate = torch.tensor([0, 1])
    torch.testing.assert_close(layer(holes).unbind()[1], rows[2:5])


@pytest.mark.parametrize("off", ["gate", "merged"])
def test_host_off_and_merged_are_the_plain_linear(off):
    layer, x = layer_of(), jagged(samples())
    if off == "gate":
        layer.gate = False
    else:
        layer.merge()
    assert torch.equal(layer(x).values(), nn.functional.linear(x, layer.weight, layer.bias).values())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("variant", [name for name, kind in VARIANTS.items() if kind.addition is not None])
def test_a_base_that_is_called_with_a_jagged_tensor(variant, gate):
    class Squashed(nn.Linear):
        def forward(self, x):
            return super().forward(x).sigmoid()

    torch.manual_seed(0)
    layer, gate = CoToLoRALinear.from_linear(Squashed(8, 6), rank=2, variant=variant), GATES[gate]
    for parameter in layer.adapter_parameters:
        nn.init.normal_(parameter)
    for backend in ("reference", "addmm"):
        with set_backend(backend):
            x, parts = jagged(samples(), requires_grad=True), [part.requires_grad_() for part in samples()]
            layer.gate = gate
            y, expected = layer(x), one_by_one(layer, gate, parts)
            torch.testing.assert_close(y.values(), expected)
            found, of_parts = gradients(y.values(), [x]), gradients(expected, parts)
            torch.testing.assert_close(found[0].values(), torch.cat(of_parts))


@torch.no_grad()
def test_jagged_in_a_later_dimension():
    layer, x = layer_of(), jagged(samples())
    deeper = jagged([part[:, None].expand(-1, 3, -1) for part in samples()])
    for nested in (deeper, deeper.transpose(1, 2)):
        assert torch.equal(layer(nested).values(), layer(nested.values()))
    layer.gate = torch.tensor([1, 0, 1])
    assert torch.equal(layer(deeper).values()[:, 0], layer(x).values())
    with pytest.raises(
        ValueError, match=r"row gate \[batch\] needs x jagged in dimension 1; got x jagged in dimension 2"
    ):
        layer(deeper.transpose(1, 2))


@pytest.mark.parametrize("backend", [None, "reference", "addmm"])
def test_unsupported_nested_tensors_are_refused(backend):
    layer = layer_of()
    strided = torch.nested.nested_tensor(samples())
    calls = (
        layer,
        lambda x: coto_lora_linear(x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, scale=1.0),
    )
    with set_backend(backend):
        for call in calls:
            with pytest.raises(TypeError, match=r"x must be dense, or nested with layout=torch.jagged; got"):
                call(strided)
            with pytest.raises(ValueError, match=r"x must be \[..., 8\] to fit weight"):
                call(jagged(samples(7)))
    model = nn.Sequential(nn.Linear(8, 6))
    inject(model)
    with pytest.raises(TypeError, match=r"^0: x must be dense, or"):
        model(strided)


def test_torch_compile_traces_it():
    layer, x = layer_of(), jagged(samples())
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y.values(), layer(x).values())
    found, expected = (gradients(f(x).values(), layer.adapter_parameters) for f in (compiled, layer))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.compiler.reset()
