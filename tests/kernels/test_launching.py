"""Replayed launches: which calls are replayed (tested with kernels that copy memory), and what they launch."""

import ctypes
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import host
from cotolora.kernels import launching
from cotolora.kernels.launching import launch, replayed
from tests.support.repository import ROOT


class Compiled:
    """Copies `size` bytes from one address to another and records the streams of its launches."""

    function, packed_metadata = 3, (1, 1, 0)

    def __init__(self):
        self.streams = []

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, source, to, size):
        assert (x, y, z, function, packed, metadata, enter, leave) == (5, 1, 1, 3, (1, 1, 0), None, None, None)
        self.streams.append(stream)
        ctypes.memmove(to, source, size)


class Kernel:
    """Stands for a Triton kernel; a launch by JIT also copies."""

    arg_names = ("source_ptr", "to_ptr", "SIZE")

    def __init__(self):
        self.compiled = Compiled()

    def __getitem__(self, grid):
        def call(source, to, SIZE):
            ctypes.memmove(to.data_ptr(), source.data_ptr(), SIZE)
            return self.compiled

        return call


@pytest.fixture
def kernel(monkeypatch):
    """A kernel on a mocked GPU whose current stream is 7."""
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))
    return Kernel()


class Copier:
    """A launcher that copies through a temporary and counts its calls."""

    def __init__(self, kernel):
        self.kernel, self.calls, self.replays = kernel, 0, {}
        self.run = replayed(self.launcher, self.replays, elsewhere=lambda *args: "elsewhere")

    def launcher(self, x, gate=None, *rest):
        self.calls += 1
        if x.numel() == 0:
            return x.new_empty(x.shape), None
        size = x.numel() * x.element_size()
        between, out = x.new_empty(x.shape), x.new_empty(x.shape)
        for source, to in ((x, between), (between[None], out.T)):
            launch(self.kernel, (5,), source, to, SIZE=size)
        return out, None


@pytest.fixture
def copier(kernel):
    return Copier(kernel)


def test_launches_are_replayed_on_other_tensors(copier):
    for calls in range(3):
        x = torch.randn(6, 8)
        out, nothing = copier.run(x)
        assert torch.equal(out, x)
        assert nothing is None
        assert copier.kernel.compiled.streams == [7] * 2 * calls
    assert copier.calls == 1


X = torch.randn(8, 8)
GATE = torch.ones(8, dtype=torch.int32)
CHANGES = {
    "shape": (torch.randn(4, 16),),
    "strides": (X.T,),
    "dtype": (X.bfloat16(),),
    "address": (torch.randn(65)[1:].view(8, 8),),
    "a gate": (X, GATE[0]),
    "row gates": (X, GATE),
    "a gate's address": (X, GATE[1]),
    "a gate's dtype": (X, GATE[0].bool()),
    "a gate's device": (X, GATE[0].to("meta")),
    "a number": (X, None, 2.0),
    "another number": (X, None, 3.0),
    "another dtype to write": (X, None, torch.float16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_kind_of_call_is_not_replayed(copier, change):
    others = [(X,), *(arguments for name, arguments in CHANGES.items() if name != change)]
    for arguments in others:
        copier.run(*arguments)
    before = copier.calls
    for _ in range(2):
        copier.run(*CHANGES[change])
    assert copier.calls == before + 1
    for arguments in others:
        copier.run(*arguments)
    assert copier.calls == before + 1


def test_float32_precision_is_part_of_the_kind(copier):
    before = torch.get_float32_matmul_precision()
    try:
        for precision, calls in (("highest", 1), ("high", 2), ("highest", 2)):
            torch.set_float32_matmul_precision(precision)
            copier.run(X)
            assert copier.calls == calls
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("knobs", "switch", "value"),
    [("runtime", "debug", True), ("compilation", "instrumentation_mode", "fpsan")],
)
def test_tritons_compile_options_are_part_of_the_kind(copier, monkeypatch, knobs, switch, value):
    copier.run(X)
    with monkeypatch.context() as patch:
        patch.setattr(getattr(launching.knobs, knobs), switch, value)
        for _ in range(2):
            copier.run(X)
    copier.run(X)
    assert copier.calls == 2


def test_hooks_that_decide_compilation_are_called_at_each_launch(copier, monkeypatch):
    copier.run(X)
    with monkeypatch.context() as patch:
        patch.setattr(launching.knobs.runtime, "add_stages_inspection_hook", lambda: ("key", "hash"))
        for calls in (2, 3):
            copier.run(X)
            assert copier.calls == calls
    copier.run(X)
    assert copier.calls == 3


def test_tensors_may_overlap_at_a_later_call(kernel):
    def both(x, other):
        made = torch.empty_like(x), torch.empty_like(x)
        for source, to in zip((x, other), made, strict=True):
            launch(kernel, (5,), source, to, SIZE=4 * x.numel())
        return made

    run, memory = replayed(both, {}, elsewhere=None), torch.randn(64)
    for x, other in ((memory[:24], memory[32:56]), (memory[:24], memory[:24]), (memory[:24], memory[4:28])):
        assert all(map(torch.equal, run(x, other), (x, other)))
    assert len(kernel.compiled.streams) == 4


def test_a_launcher_that_raises_is_not_replayed(copier):
    """A failed call leaves no recording and no dispatch mode behind."""
    fails = [True]

    def failing(x):
        made = copier.launcher(x)
        if fails.pop():
            raise LookupError
        return made

    run, depth = replayed(failing, replays := {}, elsewhere=None), torch._C._len_torch_dispatch_stack()
    with pytest.raises(LookupError):
        run(X)
    assert not replays
    assert torch._C._len_torch_dispatch_stack() == depth
    assert launching._thread.recording is None
    fails.append(False)
    for _ in range(2):
        x = torch.randn(8, 8)
        assert torch.equal(run(x)[0], x)
    assert copier.calls == 2
    assert len(copier.kernel.compiled.streams) == 2


def test_recordings_keep_no_tensor_alive(copier):
    held = weakref.ref(made := torch.randn(8, 8)), weakref.ref(copier.run(made)[0].untyped_storage())
    del made
    assert copier.replays
    assert all(ref() is None for ref in held)


def computes_by_torch(copier, x):
    return copier.launcher(x.add(1) if x.sum() else x)


def writes_by_torch(copier, x):
    return copier.launcher(x)[0].zero_()


def returns_its_input(copier, x):
    copier.launcher(x)
    return x


def returns_a_part(copier, x):
    return copier.launcher(x)[0][:1]


def launches_on_a_part(copier, x):
    return copier.launcher(x[1:])


@pytest.mark.parametrize(
    "body", [computes_by_torch, writes_by_torch, returns_its_input, returns_a_part, launches_on_a_part]
)
def test_a_launcher_that_does_more_than_launch_is_called_every_time(copier, body):
    run = replayed(lambda x: body(copier, x), {}, elsewhere=None)
    for calls in (1, 2, 3):
        run(torch.randn(8, 8))
        assert copier.calls == calls


def test_two_tensors_at_one_address_are_not_replayed(kernel):
    copier = Copier(kernel)
    for calls in (1, 2):
        copier.run(X, X)
        assert copier.calls == calls


def test_a_kernel_that_was_not_compiled_is_called_every_time(copier, monkeypatch):
    """This is the case when Triton's launches are intercepted, for which no driver is needed."""
    copier.kernel.compiled = None
    monkeypatch.setattr(launching, "driver", None)
    for calls in (1, 2):
        assert torch.equal(copier.run(X)[0], X)
        assert copier.calls == calls


def test_a_profiler_sees_the_launches(copier):
    copier.run(X)
    hooks, seen = launching.knobs.runtime.launch_enter_hook, lambda metadata: None
    hooks.add(seen)
    try:
        copier.run(X)
        assert copier.calls == 2
    finally:
        hooks.remove(seen)
    copier.run(X)
    assert copier.calls == 2


def test_unaligned_memory_is_not_passed_to_a_kernel_compiled_for_aligned_memory(copier, monkeypatch):
    copier.run(X)
    monkeypatch.setattr(torch, "empty_strided", lambda *args, **kwargs: torch.empty(65)[1:].view(8, 8))
    assert torch.equal(copier.run(X)[0], X)
    assert copier.calls == 2


def test_tensors_that_are_not_plain_memory_use_the_fallback(copier):
    copier.run(X)
    negated = torch.complex(X, -X).conj().imag
    assert torch.equal(negated, X)
    for t in (X.as_subclass(type("Own", (torch.Tensor,), {})), negated, X.to_sparse()):
        assert copier.run(t) == "elsewhere"


def test_missing_is_called_before_any_launch(copier):
    def missing():
        raise LookupError

    prepared = replayed(copier.launcher, copier.replays, elsewhere=None, missing=missing)
    copier.run(X)
    prepared(X)
    with pytest.raises(LookupError):
        prepared(X, GATE)
    assert copier.calls == 1


def test_a_launcher_that_launches_nothing_is_called_every_time(copier):
    for _ in range(2):
        assert copier.run(X[:0])[0].shape == (0, 8)
    assert copier.calls == 2


@pytest.mark.slow
@pytest.mark.skipif(host.compiler() is None, reason="needs a C compiler")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of a GPU cannot be replaced")
def test_replayed_launches_have_the_arguments_of_jit_launches():
    pytest.importorskip("triton.backends.nvidia", reason="needs Triton with its backend for NVIDIA")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.replays"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "325 of 325 kinds launched again" in done.stdout
