"""Launches kernels, and replays recorded launches with little Python, because small layers are limited by the host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from cotolora.kernels.dropout import VERSION
from cotolora.kernels.tiles import dot_precision

ALIGNMENT = 16  # bytes; Triton specialises kernels on pointers with this alignment
_MOST = 4096  # kinds of call that are recorded
_NEW: Any = object()  # marks a kind that has not been launched
_PLAIN = (Tensor, torch.nn.Parameter)
_ALLOCATIONS = frozenset(
    (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default)
)
_thread = threading.local()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` on the device of its tensors, not on the current one as Triton would."""
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
        compiled = kernel[grid](*args, **constants)
    if (recording := getattr(_thread, "recording", None)) is not None:
        recording.note(compiled, grid, [*args, *(constants[name] for name in kernel.arg_names[len(args) :])])


def replayed(
    launcher: Callable[..., Any], replays: dict[tuple[Any, ...], Replay | None],
    elsewhere: Callable[..., Any], missing: Callable[[], None] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Records the launches of `launcher` at the first call of a kind, and replays them at later calls of that kind.

    The kind of a call is everything that a launcher and Triton's specialisation may depend on: shape, strides, dtype,
    device and alignment of every tensor, the float32 matmul precision, Triton's compilation options, and the arguments
    that are not tensors. The launches must depend only on these, and the results only on the launches. The launcher is
    called every time if it runs other operations, if Triton returns no compiled kernel, if it launches nothing, or if
    two of its tensors share an address.

    Args:
        launcher: takes positional arguments, the first of them a tensor; returns a new tensor, or a tuple of these and
            None.
        replays: the recorded launches by kind.
        elsewhere: called instead for tensors that are not plain memory: subclasses, negated views, tensors in vmap.
        missing: called before a kind is launched for the first time; may raise.
    """

    def run(*args: Any) -> Any:
        first = args[0]
        device, dtype = first.device, first.dtype
        key: list[Any] = [
            dot_precision(dtype, device) if dtype is torch.float32 else None,
            knobs.runtime.debug, knobs.runtime.add_stages_inspection_hook, knobs.compilation.instrumentation_mode,
        ]  # fmt: skip
        inputs, pointers = [], []
        for arg in args:
            if type(arg) in _PLAIN and not arg.is_neg():
                try:
                    pointer = arg.data_ptr()
                except RuntimeError:
                    return elsewhere(*args)
                # the device, because Triton checks that a tensor is on the GPU, but cannot check an address
                key += arg.shape, arg.stride(), arg.dtype, arg.device, pointer % ALIGNMENT == 0
                inputs.append(arg)
                pointers.append(pointer)
            elif isinstance(arg, Tensor):
                return elsewhere(*args)
            else:
                key.append(arg)
        kind = tuple(key)
        replay = replays.get(kind, _NEW)
        if replay is _NEW:
            if missing is not None:
                missing()
            if len(replays) >= _MOST:
                replays.clear()
            return _recorded(launcher, args, inputs, kind, replays)
        if replay is None or _watched():
            return launcher(*args)
        active = driver.active
        current = active.get_current_device()
        if device.index not in (None, current):
            return launcher(*args)
        outputs = replay.run(inputs, pointers, active.get_current_stream(current))
        return launcher(*args) if outputs is None else outputs

    return run


def _watched() -> bool:
    """Whether hooks observe launches, as profilers do, or change the compilation at each launch."""
    runtime = knobs.runtime
    # not any(), because a generator would take longer than this loop
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook, runtime.add_stages_inspection_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


_STREAM = 3  # index of the stream among the arguments of `CompiledKernel.run`


class RecordedLaunch(NamedTuple):
    """A compiled kernel, and the arguments of its ``run`` without the stream and the tensors.

    pointers: position and tensor number of each argument that is an address.
    descriptors: the same for TMA descriptors, with their other fields.
    compiled: a reference that keeps the kernel loaded.
    """

    run: Callable[..., None]
    arguments: list[Any]
    pointers: list[tuple[int, int]]
    descriptors: list[tuple[int, int, dict[str, Any]]]
    compiled: Any


class Replay(NamedTuple):
    """The launches of one kind of call. Tensors are numbered in the order inputs, outputs, temporaries.

    outputs: sizes, strides and dtype of each output, or None.
    offsets: offsets of the temporaries in one allocation of `workspace` bytes.
    single: whether the launcher returns a tensor instead of a tuple.
    """

    launches: list[RecordedLaunch]
    outputs: list[tuple[torch.Size, tuple[int, ...], torch.dtype] | None]
    offsets: list[int]
    workspace: int
    single: bool
    device: torch.device

    def run(self, inputs: list[Tensor], pointers: list[int], stream: int) -> Any:
        """Replays the launches; returns the outputs, or None if new memory is not aligned."""
        empty, device = torch.empty_strided, self.device
        outputs = [None if o is None else empty(o[0], o[1], dtype=o[2], device=device) for o in self.outputs]
        made = [0 if t is None else t.data_ptr() for t in outputs]
        if self.offsets:
            workspace = torch.empty(self.workspace, dtype=torch.uint8, device=self.device)
            address = workspace.data_ptr()
            made += [address + offset for offset in self.offsets]
        for pointer in made:
            if pointer % ALIGNMENT:
                return None
        pointers += made
        for run, recorded, addresses, descriptors, _ in self.launches:
            arguments = recorded.copy()
            arguments[_STREAM] = stream
            for position, whose in addresses:
                arguments[position] = pointers[whose]
            for position, whose, fields in descriptors:
                descriptor = object.__new__(TensorDescriptor)  # skips the checks of its constructor, which hold
                tensor = inputs[whose] if whose < len(inputs) else outputs[whose - len(inputs)]
                descriptor.__dict__.update(fields, base=tensor)
                arguments[position] = descriptor
            run(*arguments)
        return outputs[0] if self.single else tuple(outputs)


class _Recording(TorchDispatchMode):
    """Records allocations and launches of a launcher; `faithful` is True while it does nothing else."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.inputs = {t.data_ptr(): i for i, t in enumerate(inputs)}
        # on AMD, Triton also specialises on the size of the memory; later versions may differ
        self.faithful = len(self.inputs) == len(inputs) and torch.version.hip is None and VERSION <= (3, 9)
        self.made: dict[int, Tensor] = {}  # by storage, which views share; kept alive, so that no address is reused
        self.noted: list[tuple[Any, tuple[int, ...], list[Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.made[out.untyped_storage()._cdata] = out
        elif not func.is_view:
            self.faithful = False
        return out

    def note(self, compiled: Any, grid: tuple[int, ...], arguments: list[Any]) -> None:
        """Records a launch."""
        self.faithful &= all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata"))
        self.noted.append((compiled, grid, arguments))

    def replay(self, results: Sequence[Tensor | None], single: bool, device: torch.device) -> Replay | None:
        """The recorded launches with numbers in place of tensors; None if the launcher did anything else."""
        self.faithful &= bool(self.noted)  # without a launch there may be no driver, as under the interpreter
        made = dict(self.made)
        for t in results:
            if t is not None:
                whole = made.pop(t.untyped_storage()._cdata, None)
                self.faithful &= whole is not None and whole.numel() == t.numel()
        temporary = [t for t in made.values() if t.numel()]
        offsets, workspace = [], 0
        for t in temporary:
            offsets.append(workspace)
            workspace += -(-t.untyped_storage().nbytes() // 512) * 512
        after = enumerate((*results, *temporary), len(self.inputs))
        numbers = {t.untyped_storage()._cdata: i for i, t in after if t is not None}

        def number(t: Tensor) -> int:
            found = numbers.get(t.untyped_storage()._cdata)
            if found is not None:
                self.faithful &= t.storage_offset() == 0 and t.data_ptr() % ALIGNMENT == 0
                return found
            self.faithful &= t.data_ptr() in self.inputs
            return self.inputs.get(t.data_ptr(), -1)

        launches = []
        for compiled, grid, arguments in self.noted if self.faithful else ():
            # as in CompiledKernel.__getitem__: the grid, the stream, and None for the arguments of hooks
            head = [*(*grid, 1, 1)[:3], None, compiled.function, compiled.packed_metadata, None, None, None]
            recorded, pointers, descriptors = head + arguments, [], []
            for i, argument in enumerate(arguments, len(head)):
                if isinstance(argument, Tensor):
                    pointers.append((i, number(argument)))
                    recorded[i] = None
                elif isinstance(argument, TensorDescriptor):
                    descriptors.append((i, number(argument.base), {**vars(argument), "base": None}))
                    self.faithful &= descriptors[-1][1] < len(self.inputs) + len(results)
                    recorded[i] = None
            launches.append(RecordedLaunch(compiled.run, recorded, pointers, descriptors, compiled))
        if not self.faithful:
            return None
        outputs = [None if t is None else (t.shape, t.stride(), t.dtype) for t in results]
        return Replay(launches, outputs, offsets, workspace, single, device)


def _recorded(
    launcher: Callable[..., Any], args: tuple[Any, ...], inputs: list[Tensor], kind: tuple[Any, ...],
    replays: dict[tuple[Any, ...], Replay | None],
) -> Any:  # fmt: skip
    """Calls `launcher` and records its launches; returns its result."""
    recording = _Recording(inputs)
    _thread.recording = recording
    try:
        with recording:
            results = launcher(*args)
    finally:
        _thread.recording = None
    single = isinstance(results, Tensor)
    replays[kind] = recording.replay([results] if single else results, single, args[0].device)
    return results
