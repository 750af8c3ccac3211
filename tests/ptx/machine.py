"""Executes a kernel: all threads of a batch of thread blocks at once, with checks of memory accesses.

Errors are collected in `Machine.errors`: accesses outside the tensors or unaligned ones; reads of shared memory that
was not written, or that a cp.async or TMA copy has yet to write; and races, in which two warps of a block, or two
blocks, access the same byte without a barrier between them and at least one of them writes.
"""

from __future__ import annotations

import numpy as np
from numpy import where

from tests.ptx.translate import PARAMETER_BASE, Generator, Kernel

u1, u2, u4, u8 = (np.dtype(f"u{size}") for size in (1, 2, 4, 8))
i1, i2, i4, i8 = (np.dtype(f"i{size}") for size in (1, 2, 4, 8))
f2, f4, f8 = (np.dtype(f"f{size}") for size in (2, 4, 8))
UNSIGNED = {1: u1, 2: u2, 4: u4, 8: u8}
ONES = {1: u1.type(0xFF), 2: u2.type(0xFFFF), 4: u4.type(0xFFFFFFFF), 8: u8.type(0xFFFFFFFFFFFFFFFF)}
SPREAD = {1: 1, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}
MANY = 0xFF  # more than one warp
GUARD = 1024

# values


def from_bf16(u):
    return (u.astype(u4) << u4.type(16)).view(f4)


def from_f16(u):
    return u.view(f2).astype(f4)


def to_f16(f):
    return f.astype(f2).view(u2)


def to_bf16(f):
    u = np.ascontiguousarray(f, f4).view(u4)
    rounded = ((u + u4.type(0x7FFF) + ((u >> u4.type(16)) & u4.type(1))) >> u4.type(16)).astype(u2)
    return where(np.isnan(f), u2.type(0x7FFF), rounded)


def to_tf32(u):
    return (u + u4.type(0x1000)) & u4.type(0xFFFFE000)


def low(u):
    return u.astype(u2)


def high(u):
    return (u >> u4.type(16)).astype(u2)


def pack(lower, upper):
    return lower.astype(u4) | (upper.astype(u4) << u4.type(16))


def fma(a, b, c):
    return (a.astype(f8) * b + c).astype(a.dtype)


def mul_hi(a, b):
    if a.dtype.itemsize == 4:
        wide = i8 if a.dtype == i4 else u8
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(32)).astype(a.dtype)
    return np.array([(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)], dtype=a.dtype)


def truncated_div(a, b):
    quotient = np.floor_divide(a, b)
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)


def funnel(lower, upper, by, side, mode):
    by = np.minimum(by, u4.type(32)) if mode == "clamp" else by & u4.type(31)
    both = lower.astype(u8) | (upper.astype(u8) << u8.type(32))
    return (both >> by.astype(u8)).astype(u4) if side == "r" else ((both << by.astype(u8)) >> u8.type(32)).astype(u4)


def bit_field(value, at, count):
    wide = value.astype(i8 if value.dtype.kind == "i" else u8)
    at, count = (at & u4.type(0xFF)).astype(wide.dtype), (count & u4.type(0xFF)).astype(wide.dtype)
    field = (wide >> at) & ((wide.dtype.type(1) << count) - wide.dtype.type(1))
    if value.dtype.kind == "i":  # extends the sign of the field
        sign = wide.dtype.type(1) << np.maximum(count - 1, 0)
        field = (field ^ sign) - sign
    return field.astype(value.dtype)


def permute_bytes(a, b, selector):
    both, out = a.astype(u8) | (b.astype(u8) << u8.type(32)), np.zeros_like(a)
    for i in range(4):
        which = (selector >> u4.type(4 * i)) & u4.type(0xF)
        byte = ((both >> (u8.type(8) * (which & u4.type(7)))) & u8.type(0xFF)).astype(u4)
        byte = where(which & u4.type(8), where(byte & u4.type(0x80), u4.type(0xFF), u4.type(0)), byte)
        out |= byte << u4.type(8 * i)
    return out


def lop3(a, b, c, table):
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def to_integer(f, dtype):
    info = np.iinfo(dtype)
    top = np.nextafter(f8.type(info.max), 0) if dtype.itemsize == 8 else info.max
    return np.clip(np.nan_to_num(f, nan=0, posinf=top, neginf=info.min), info.min, top).astype(dtype)


# memory


class Arena:
    """Global memory: the storages of a launch's tensors, at emulated addresses with gaps between them.

    Only the elements of the tensors may be accessed, not the rest of their storages.
    """

    BASE = 1 << 40

    def __init__(self, tensors) -> None:
        self.storages, size = {}, GUARD
        for t in tensors:
            storage = t.untyped_storage()
            if storage.data_ptr() not in self.storages:
                size += storage.data_ptr() % 128  # keeps the alignment of the tensor
                self.storages[storage.data_ptr()] = (size, storage)
                size = -(-(size + storage.nbytes() + GUARD) // 128) * 128
        self.bytes, self.valid = np.zeros(size, u1), np.zeros(size, u1)
        self.writer = np.zeros(size // 2, np.int64)  # block, its barrier count and warp of the last write, per 2 bytes
        for start, storage in self.storages.values():
            self.bytes[start : start + storage.nbytes()] = _view(storage)
        for t in tensors:
            start, element = self.address(t) - self.BASE, np.arange(t.element_size())
            offsets = sum(
                (np.arange(n) * s).reshape(-1, *[1] * (t.dim() - 1 - d))
                for d, (n, s) in enumerate(zip(t.shape, t.stride(), strict=True))
            )
            flat = np.asarray(offsets).reshape(-1, 1) if t.numel() else np.zeros((0, 1), int)
            self.valid[start + flat * t.element_size() + element] = 0xFF

    def address(self, t) -> int:
        start, storage = self.storages[t.untyped_storage().data_ptr()]
        return self.BASE + start + t.data_ptr() - storage.data_ptr()

    def write_back(self) -> None:
        for start, storage in self.storages.values():
            _view(storage)[:] = self.bytes[start : start + storage.nbytes()]


def _view(storage):
    import torch

    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


class Program:
    """A kernel whose basic blocks are compiled when they are first reached."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.generator, self.functions = kernel, Generator(kernel), {}

    def function(self, number: int, masked: bool):
        key = number, masked
        if key not in self.functions:
            source = self.generator.block(number, masked)
            scope = dict(globals())
            exec(compile(source, f"<{self.kernel.name} block {number}>", "exec"), scope)
            self.functions[key] = scope["block"]
        return self.functions[key]


class HangError(RuntimeError):
    """Threads wait for a barrier that others never reach."""


class Machine:
    """Runs several thread blocks (`ctaids` [blocks, 3]) of `threads` threads each at the same time.

    If `staggered`, the groups of four warps of a block run one after the other between barriers.
    """

    staggered = False

    def __init__(self, program, arena, parameters, grid, ctaids, threads, shared_bytes, errors) -> None:
        self.program, self.arena, self.parameters, self.errors = program, arena, parameters, errors
        self.blocks, self.threads, self.n = len(ctaids), threads, len(ctaids) * threads
        n, blocks = self.n, self.blocks
        self.block = np.repeat(np.arange(blocks), threads)
        self.tid = np.tile(np.arange(threads), blocks)
        self.lane, self.warp = self.tid % 32, self.tid // 32
        self.warps = threads // 32
        self.first_lane = np.arange(n) // 32 * 32
        self.cta = np.repeat(ctaids[:, 0] + grid[0] * (ctaids[:, 1] + grid[1] * ctaids[:, 2]), threads)
        self.special = {"%laneid": self.lane, "%warpid": self.warp, "%tid.x": self.tid}
        for d, axis in enumerate("xyz"):
            self.special[f"%ctaid.{axis}"] = np.repeat(ctaids[:, d], threads)
            self.special[f"%nctaid.{axis}"] = np.full(n, grid[d])
            self.special[f"%ntid.{axis}"] = np.full(n, threads if d == 0 else 1)
            self.special.setdefault(f"%tid.{axis}", np.zeros(n, int))
        self.bools = (np.zeros(n, bool), np.ones(n, bool))
        # shared memory of each block, followed by a gap; tag per byte since the last barrier: 0 for none, else the warp
        self.shared_bytes = shared_bytes
        self.pitch = -(-(shared_bytes + 16) // 1024) * 1024
        size = blocks * self.pitch
        self.shared = np.full(size, 0xFF, u1)
        self.written, self.readers, self.writers = np.zeros(size, u1), np.zeros(size, u1), np.zeros(size, u1)
        self.pending = np.zeros(size, u1)
        self.tag = (self.warp + 1).astype(u1)
        self.epoch = np.zeros(blocks, np.int64)
        self.shared_base = self.block * self.pitch
        self.copies, self.group = [], np.zeros(n, int)
        self.stored, self.at = False, ""
        self.special_init()

    def special_init(self) -> None:
        pass

    # control

    def run(self, most_steps: int = 2_000_000) -> None:
        n, kernel = self.n, self.program.kernel
        registers = [None] * len(kernel.registers)
        for index, width in kernel.registers.values():
            registers[index] = self.bools[0] if width == 1 else _poison(n, width)
        constants = _Constants(self.program.generator.constants, n)
        pc, waiting = np.zeros(n, np.int64), np.zeros(n, bool)
        last = len(kernel.blocks)
        current, steps = 0, 0
        staggered = self.staggered and self.warps > 4
        together = not staggered  # all threads are at `current`
        with np.errstate(all="ignore"):
            while True:
                steps += 1
                if steps > most_steps:
                    raise HangError("too many steps")
                if not together:
                    ready = (pc < last) & ~waiting
                    if not ready.any():
                        if (pc >= last).all():
                            break
                        raise HangError("a barrier that not all threads of a block reach")
                    if staggered:
                        groups = ready.reshape(self.blocks, -1, 128).any(2)
                        first = groups & (groups.cumsum(1) == 1)
                        ready &= np.repeat(first.reshape(-1), 128)
                    current = int(pc[ready].min())
                    mask = ready & (pc == current)
                    if mask.all():
                        together = True
                if together:
                    mask = None
                elif current >= last:
                    break
                if current >= last:
                    break
                outcome = self.program.function(current, mask is not None)(self, registers, constants, mask)
                if outcome is None:
                    if together:
                        current += 1
                    else:
                        pc[mask] = current + 1
                    continue
                kind, *rest = outcome
                if kind == "bar":
                    if together:
                        self.barrier(np.arange(self.blocks))
                        current += 1
                        continue
                    pc[mask] = current + 1
                    waiting |= mask
                elif kind == "ret":
                    gone = rest[0]
                    if gone is None and together:
                        break
                    if together:
                        pc[:], together = current, False
                    gone = gone if gone is not None else mask
                    stay = (mask if mask is not None else self.bools[1]) & ~gone
                    pc[stay] = current + 1
                    pc[gone] = last
                else:
                    target, taken = rest
                    if taken is None:
                        if together:
                            current = target
                        else:
                            pc[mask] = target
                        continue
                    if together:
                        if taken.all():
                            current = target
                            continue
                        if not taken.any():
                            current += 1
                            continue
                        pc[:], together = where(taken, target, current + 1), False
                    else:
                        pc[mask] = where(taken, target, current + 1)[mask]
                    continue
                # waiting threads continue once all live threads of their block have arrived
                if waiting.any():
                    alive = (pc < last).reshape(self.blocks, -1)
                    w = waiting.reshape(self.blocks, -1)
                    free = (w | ~alive).all(1) & w.any(1)
                    if free.any():
                        self.barrier(np.flatnonzero(free))
                        w[free] = False
        if self.copies:
            self.report("copies that nothing waited for", None)
        self.finish()

    def finish(self) -> None:
        pass

    def barrier(self, blocks) -> None:
        self.epoch[blocks] += 1
        if len(blocks) == self.blocks:
            self.readers[:] = 0
            self.writers[:] = 0
        else:
            for b in blocks:
                part = slice(b * self.pitch, (b + 1) * self.pitch)
                self.readers[part] = 0
                self.writers[part] = 0

    def report(self, what: str, bad) -> None:
        at = ""
        if bad is not None:
            i = int(np.flatnonzero(bad)[0])
            at = f": block {self.cta[i]}, thread {self.tid[i]}, {int(bad.sum())} threads"
        message = f"{self.program.kernel.name}: {what}{at}, in {self.at}"
        if len(self.errors) < 50:
            self.errors.append(message)

    def trap(self, mask) -> None:
        self.report("trap", self.bools[1] if mask is None else mask)

    def param(self, name, offset, dtype):
        return np.full(self.n, np.frombuffer(self.parameters[name], dtype, 1, offset)[0])

    def param_at(self, addresses, offset, dtype):
        """As `param`, for parameters that the kernel accesses by address."""
        numbers, of = np.unique((addresses - PARAMETER_BASE) // 256, return_inverse=True)
        names = [self.program.kernel.params[number][0] for number in numbers]
        return np.array([np.frombuffer(self.parameters[name], dtype, 1, offset)[0] for name in names])[of]

    def together(self, mask, what) -> None:
        if mask is not None:
            w = mask.reshape(-1, 32)
            if (w.any(1) & ~w.all(1)).any():
                self.report(f"{what} by part of a warp", mask)

    # global memory

    def _global_index(self, address, offset, size, count, mask, what):
        at = address.astype(i8) + (offset - Arena.BASE)
        inside = (at >= 0) & (at <= len(self.arena.bytes) - size * count)
        on = self.bools[1] if mask is None else mask
        if (on & ~inside).any():
            self.report(f"{what} outside every tensor, {size * count} bytes", on & ~inside)
        if (on & (at % (size * count) != 0)).any():
            self.report(f"unaligned {what} of {size * count} bytes", on & (at % (size * count) != 0))
        at = where(on & inside, at, 0)
        return at // size, on & inside

    def load_global(self, address, offset, size, count, mask):
        first, on = self._global_index(address, offset, size, count, mask, "read")
        dtype = UNSIGNED[size]
        values, valid = self.arena.bytes.view(dtype), self.arena.valid.view(dtype)
        out = []
        for k in range(count):
            index = first + k
            bad = on & (valid[index] != ONES[size])
            if bad.any():
                self.report(f"read of {size} bytes outside the tensors", bad)
            if self.stored:
                for part in range(max(1, size // 2)):
                    self._check_writer(index * size // 2 + part, on, "read", None, None)
            out.append(values[index])
        return out

    def _stamp(self):
        return (self.cta.astype(np.int64) + 1) << 32 | (self.epoch[self.block] << 8) | (self.warp + 1)

    def _check_writer(self, halfword, on, what, same, stamp) -> None:
        by = self.arena.writer[halfword]
        mine = self._stamp() if stamp is None else stamp
        ordered = ((by >> 32) == (mine >> 32)) & (((by >> 8) != (mine >> 8)) | (by == mine))
        bad = on & (by != 0) & ~ordered
        if same is not None:
            bad &= ~same
        if bad.any():
            self.report(f"race: {what} of global memory that another warp or block has written", bad)

    def store_global(self, address, offset, size, values, mask) -> None:
        first, on = self._global_index(address, offset, size, len(values), mask, "write")
        dtype = UNSIGNED[size]
        memory, valid = self.arena.bytes.view(dtype), self.arena.valid.view(dtype)
        stamp = self._stamp()
        for k, value in enumerate(values):
            index = first + k
            bad = on & (valid[index] != ONES[size])
            if bad.any():
                self.report(f"write of {size} bytes outside the tensors", bad)
            good = on & ~bad
            index, value = index[good], value[good]
            same = np.ones(self.n, bool)
            same[good] = ~_differ(memory[index], value)
            memory[index] = value
            lost = np.zeros(self.n, bool)
            lost[good] = _differ(memory[index], value)
            if lost.any():
                self.report("race: threads write different values to one place", lost)
            for part in range(max(1, size // 2)):
                halfword = (first + k) * size // 2 + part
                self._check_writer(halfword, good, "write", same, stamp)
                self.arena.writer[halfword[good]] = stamp[good]
        self.stored = True

    # shared memory

    def _shared_index(self, address, offset, size, count, mask, what):
        at = address.astype(i8) + offset
        on = self.bools[1] if mask is None else mask
        inside = (at >= 0) & (at <= self.shared_bytes - size * count)
        if (on & ~inside).any():
            self.report(f"{what} outside shared memory", on & ~inside)
        if (on & (at % (size * count) != 0)).any():
            self.report(f"unaligned {what} of shared memory", on & (at % (size * count) != 0))
        on = on & inside
        return where(on, at + self.shared_base, self.shared_base) // size, on

    def _read(self, index, size, on, tag):
        """The elements of `size` bytes at `index`, read by warps `tag`."""
        dtype = UNSIGNED[size]
        bad = on & (self.pending.view(dtype)[index] != 0)
        if bad.any():
            self.report("read of shared memory that a copy is still to write", self._threads(bad))
        bad = on & (self.written.view(dtype)[index] != ONES[size])
        if bad.any():
            self.report("read of shared memory that nothing has written", self._threads(bad))
        mine = tag.astype(dtype) * dtype.type(SPREAD[size])
        by = self.writers.view(dtype)[index]
        bad = on & (by & ~mine != 0) | on & (by & mine != by)
        if bad.any():
            bad = self._by_others(by, mine, size) & on
            if bad.any():
                self.report(
                    "race: read of shared memory that another warp has written since the last barrier",
                    self._threads(bad),
                )
        index, mine = index[on], mine[on]
        readers = self.readers.view(dtype)
        before = readers[index]
        readers[index] = mine
        several = (readers[index] != mine) | ((before != 0) & (before != mine))
        readers[index[several]] = ONES[size]

    def _by_others(self, by, mine, size):
        """Whether any byte of a tag belongs to another warp."""
        a, b = (np.ascontiguousarray(t).view(u1).reshape(*t.shape, size) for t in (by, mine))
        return ((a != 0) & (a != b)).any(-1)

    def _write(self, index, size, value, on, tag) -> None:
        dtype = UNSIGNED[size]
        memory, writers, readers = (a.view(dtype) for a in (self.shared, self.writers, self.readers))
        mine = tag.astype(dtype) * dtype.type(SPREAD[size])
        index, value, mine = index[on], value[on], mine[on]
        if (self.pending.view(dtype)[index] != 0).any():
            self.report("write of shared memory that a copy is still to write", None)
        by = readers[index]
        if ((by != 0) & (by != mine)).any() and self._by_others(by, mine, size).any():
            self.report("race: write of shared memory that another warp has read since the last barrier", None)
        by = writers[index]
        other = (by != 0) & (by != mine)
        if other.any() and (self._by_others(by, mine, size) & _differ(memory[index], value)).any():
            self.report("race: write of shared memory that another warp has written since the last barrier", None)
        memory[index] = value
        if _differ(memory[index], value).any():
            self.report("race: threads write different values to one place of shared memory", None)
        writers[index] = mine
        self.written.view(dtype)[index] = ONES[size]

    def _threads(self, bad):
        """The mask of threads from a mask that may have more dimensions."""
        return bad if bad.shape == (self.n,) else np.resize(bad.reshape(len(bad), -1).any(1), self.n)

    def load_shared(self, address, offset, size, count, mask):
        first, on = self._shared_index(address, offset, size, count, mask, "read")
        out = []
        for k in range(count):
            self._read(first + k, size, on, self.tag)
            out.append(self.shared.view(UNSIGNED[size])[first + k])
        return out

    def store_shared(self, address, offset, size, values, mask) -> None:
        first, on = self._shared_index(address, offset, size, len(values), mask, "write")
        for k, value in enumerate(values):
            self._write(first + k, size, value, on, self.tag)

    # asynchronous copies

    def copy_async(self, to, to_offset, source, offset, size, length, mask) -> None:
        to, on = self._shared_index(to, to_offset, size, 1, mask, "copy to")
        to = to * size
        data = np.zeros((self.n, size), u1)
        full, none = on & (length == size), on & (length == 0)
        if (on & ~full & ~none).any():
            self.report("a copy that is shorter than its size", on & ~full & ~none)
        if full.any():
            words = self.load_global(source, offset, 4, size // 4, full)
            unaligned = full & ((source.astype(i8) + offset) % size != 0)
            if unaligned.any():
                self.report(f"unaligned copy of {size} bytes", unaligned)
            loaded = np.stack(words, 1).view(u1)
            data[full] = loaded[full]
        bytes_ = to[on, None] + np.arange(size)
        tag = self.tag[on, None]
        readers, writers = self.readers[bytes_], self.writers[bytes_]
        if ((readers != 0) & (readers != tag)).any():
            self.report("race: copy to shared memory that another warp has read since the last barrier", None)
        if ((writers != 0) & (writers != tag)).any():
            self.report("race: copy to shared memory that another warp has written since the last barrier", None)
        if self.in_use(bytes_):
            self.report("copy to shared memory that wgmma or TMA is still to read", None)
        if self.pending[bytes_].any():
            self.report("two copies to one place of shared memory at the same time", None)
        self.pending[bytes_], self.shared[bytes_] = 1, 0xFF
        threads = np.flatnonzero(on)
        self.copies.append((threads, self.group[threads], bytes_, data[on]))

    def commit(self, mask) -> None:
        self.group += 1 if mask is None else mask

    def wait(self, left, mask) -> None:
        """Completes all but the last `left` groups of each thread."""
        rest = []
        for threads, group, bytes_, data in self.copies:
            done = group < self.group[threads] - left
            if mask is not None:
                done &= mask[threads]
            if done.any():
                at = bytes_[done]
                self.pending[at], self.shared[at], self.written[at] = 0, data[done], 0xFF
                self.writers[at] = self.tag[threads[done], None]
                self._arrived(at)
            if not done.all():
                rest.append((threads[~done], group[~done], bytes_[~done], data[~done]))
        self.copies = rest

    def _arrived(self, bytes_) -> None:
        pass

    def in_use(self, bytes_) -> bool:
        return False

    # warps

    def load_matrices(self, address, offset, count, transposed, mask):
        self.together(mask, "ldmatrix")
        first, on = self._rows(address, offset, count, mask, "ldmatrix")
        at = (first.reshape(-1, 32)[:, : 8 * count, None] * 8 + np.arange(8)).reshape(-1, count, 8, 8)
        words = first.reshape(-1, 32)[:, : 8 * count, None] * 2 + np.arange(2)
        ok = np.broadcast_to(on.reshape(-1, 32)[:, : 8 * count, None], words.shape)
        tag = np.broadcast_to(self.tag.reshape(-1, 32)[:, :1, None], words.shape)
        self._read(words, 8, ok, tag)
        values = self.shared.view(u2)[at]
        values = np.ascontiguousarray(values.swapaxes(-1, -2) if transposed else values).view(u4)
        return [np.ascontiguousarray(values[:, k]).reshape(-1) for k in range(count)]

    def _rows(self, address, offset, count, mask, what):
        used = self.lane < 8 * count
        return self._shared_index(address, offset, 16, 1, used if mask is None else used & mask, what)

    def store_matrices(self, address, offset, values, transposed, mask) -> None:
        self.together(mask, "stmatrix")
        count = len(values)
        first, on = self._rows(address, offset, count, mask, "stmatrix")
        data = np.stack([v.reshape(-1, 32) for v in values], 1).reshape(-1, count, 8, 4).view(u2)
        data = np.ascontiguousarray(data.swapaxes(-1, -2) if transposed else data)
        words = first.reshape(-1, 32)[:, : 8 * count, None] * 2 + np.arange(2)
        ok = np.broadcast_to(on.reshape(-1, 32)[:, : 8 * count, None], words.shape)
        tag = np.broadcast_to(self.tag.reshape(-1, 32)[:, :1, None], words.shape)
        self._write(words, 8, data.view(u8).reshape(words.shape), ok, tag)

    def mma(self, shape, kind, a, b, c, mask):
        self.together(mask, "mma")
        k = int(shape.rsplit("k")[1])
        a, b = (np.stack(r).reshape(len(r), -1, 8, 4) for r in (a, b))
        if kind == "tf32":
            a, b = ((t & u4.type(0xFFFFE000)).view(f4) for t in (a, b))
            a = a.reshape(k // 4, 2, -1, 8, 4).transpose(2, 1, 3, 0, 4)
            b = b.transpose(1, 0, 3, 2)
        else:
            a, b = (halves(t, kind) for t in (a, b))  # [regs, warps, 8, 4, 2]
            a = a.reshape(k // 8, 2, -1, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5)
            b = b.transpose(1, 0, 3, 4, 2)
        product = a.reshape(-1, 16, k) @ b.reshape(-1, k, 8)
        product = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        return [(p + r.view(f4)).view(u4) for p, r in zip(product, c, strict=True)]

    def shuffle(self, mode, value, b, c, mask):
        b, clamp, segment = (b & 31).astype(int), (c & 31).astype(int), ((c >> 8) & 31).astype(int)
        lowest = self.lane & segment
        highest = lowest | (clamp & ~segment)
        source = {
            "idx": lowest | (b & ~segment), "bfly": self.lane ^ b, "up": self.lane - b, "down": self.lane + b
        }[mode]  # fmt: skip
        ok = source >= highest if mode == "up" else source <= highest
        source = where(ok, source, self.lane)
        if mask is not None:
            absent = mask & ~mask[self.first_lane + source]
            if absent.any():
                self.report("shuffle from a thread that is not there", absent)
        return value[self.first_lane + source], ok

    def reduce(self, kind, value, mask):
        self.together(mask, "redux")
        f = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }
        return np.repeat(f[kind].reduce(value.reshape(-1, 32), 1, value.dtype), 32)

    def vote(self, kind, p, mask):
        p = p.reshape(-1, 32)
        if kind == "ballot":
            bits = (p.astype(u8) << np.arange(32, dtype=u8)).sum(1).astype(u4)
            return np.repeat(bits, 32)
        return np.repeat({"any": p.any(1), "all": p.all(1)}[kind], 32)


def _differ(a, b):
    """Where two values differ by more than rounding.

    Triton may compute the same element in several threads, with and without fused multiply-adds.
    """
    if a.dtype.itemsize == 8:
        a, b = (np.ascontiguousarray(np.broadcast_to(t, np.shape(b))).view(u4).reshape(-1, 2) for t in (a, b))
        return _differ(a, b).any(1)
    differ = a != b
    if differ.any() and a.dtype.itemsize == 4:
        a, b = a.view(f4), b.view(f4)
        tolerance = 1e-6 * float(np.abs(b[np.isfinite(b)]).max(initial=0))
        differ &= ~np.isclose(a, b, rtol=1e-5, atol=tolerance, equal_nan=True)
    elif a.dtype.itemsize == 2:
        differ &= np.abs(a.astype(i4) - b) > 1
    return differ


def halves(registers, kind):
    halves = np.ascontiguousarray(registers).view(u2).reshape(*registers.shape, 2)
    return from_bf16(halves) if kind == "bf16" else halves.view(f2).astype(f4)


def _poison(n, width):
    return np.full(n, ONES[width // 8], UNSIGNED[width // 8])


class _Constants:
    """K[i] is the i-th constant for every thread; constants are added while blocks are compiled."""

    def __init__(self, table, n) -> None:
        self.table, self.n, self.made = table, n, {}

    def __getitem__(self, i):
        if i not in self.made:
            value, dtype = list(self.table)[i]
            self.made[i] = np.full(self.n, value, dtype)
        return self.made[i]
