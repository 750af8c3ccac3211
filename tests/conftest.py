"""Shared by all tests: Triton's interpreter if there is no GPU, and uninitialised memory that reads as NaN."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # before anything imports triton: kernels decorated earlier would be compiled for a GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("tests.conformance", "tests.support.saving", "tests.support.training")

# sizes are small, and on a shared machine waiting for other threads costs more than they save
torch.set_num_threads(1)


@pytest.fixture
def poison_empty(monkeypatch):
    """Uninitialised memory reads as NaN, so code that leaves part of its output unwritten is caught."""
    empty, empty_like = torch.empty, torch.empty_like
    new_empty = torch.Tensor.new_empty

    def poisoned(make):
        def filled(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return filled

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))


@pytest.fixture
def tf():
    return pytest.importorskip("transformers", reason="compares with transformers' models")


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="compares with PEFT")


@pytest.fixture
def saved(tmp_path):
    """An adapter on blocks.0.fc, blocks.1.fc and fc of `tests.support.saving.Net`, rank 2, alpha 16."""
    from cotolora import save_adapter
    from tests.support.saving import base, tuned

    save_adapter(tuned(base(), ["fc"], rank=2), tmp_path)
    return tmp_path


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if request.param == "interpreter" and not interpreted:
        pytest.skip("TRITON_INTERPRET is not set, so kernels are compiled")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cuda" and interpreted:
        pytest.skip("TRITON_INTERPRET is set, so kernels are not compiled")
    return torch.device("cpu" if request.param == "interpreter" else "cuda")


# in the interpreter float16 runs the same code as float32, only with less precision
@pytest.fixture(params=[torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def dtype(request, device):
    if request.param == torch.bfloat16 and device.type == "cpu":
        pytest.skip("bfloat16 tl.dot is wrong in Triton's interpreter")
    return request.param
