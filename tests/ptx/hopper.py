"""Features of sm_90: wgmma on shared memory, mbarriers, TMA copies, and the fences between the two memory proxies.

It also reports wgmma results that are used before the wait (they hold NaN until then), and shared memory that is
written while wgmma or a TMA store still reads it, or that they read without a fence.proxy.async after a store.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy import where

from tests.ptx.machine import ONES, UNSIGNED, Arena, Machine, f4, from_bf16, halves, i8, u1, u4
from tests.ptx.translate import UnknownError

SPAN = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes of the swizzle span, by the two top bits of a matrix descriptor
TMA_SPAN = {0: 0, 1: 32, 2: 64, 3: 128}


def swizzled(address, span):
    return address ^ ((address >> 3) & (span - 16 & 0x70)) if span else address


@dataclass
class TensorMap:
    """The contents of a TMA descriptor; sizes outermost first, strides in elements."""

    base: int
    shape: list[int]
    strides: list[int]
    element: int
    box: list[int]
    span: int


class Barrier:
    def __init__(self, count: int) -> None:
        self.count = self.left = count
        self.phase = self.expected = self.got = 0
        self.copies = []


class Hopper(Machine):
    def special_init(self) -> None:
        self.tensor_maps: dict[int, TensorMap] = {}  # by the address of the descriptor
        size = len(self.shared)
        self.unfenced, self.busy = np.zeros(size, u1), np.zeros(size, u1)
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.accumulators: dict[int, list] = {}  # register → value, threads, group
        self.reads = []  # reads by wgmma: threads, groups, elements of shared memory and their size
        self.wgmma_group = np.zeros(self.n, int)
        self.deferred = []  # wgmma of staggered warp groups, which read memory as late as allowed
        self.stores, self.bulk_group = [], np.zeros(self.n, int)  # TMA stores: thread, group, elements, size

    def finish(self) -> None:
        if any(b.copies for b in self.barriers.values()):
            self.report("TMA loads that nothing waited for", None)
        if self.stores:
            self.report("TMA stores that still read shared memory at the end", None)
        if self.accumulators:
            self.report("wgmma that nothing waited for", None)

    def _write(self, index, size, value, on, tag) -> None:
        if self.busy.view(UNSIGNED[size])[index[on]].any():
            self.report("write of shared memory that wgmma or TMA is still to read", None)
        super()._write(index, size, value, on, tag)
        self.unfenced.view(UNSIGNED[size])[index[on]] = self.writers.view(UNSIGNED[size])[index[on]]

    def _arrived(self, bytes_) -> None:
        self.unfenced[bytes_] = 0  # like Triton, assumes that cp.async needs no fence

    def in_use(self, bytes_) -> bool:
        return self.busy[bytes_].any()

    def _mark_busy(self) -> None:
        self.busy[:] = 0
        for *_, elements, size in (*self.reads, *self.stores):
            self.busy.view(UNSIGNED[size])[elements] = ONES[size]

    def _async_read(self, index, size, what) -> None:
        for array, fault in (
            (self.pending, "that a copy is still to write"),
            (self.writers, "that a warp has written since the last barrier"),
            (self.unfenced, "that was written with no fence.proxy.async since"),
        ):
            if array.view(UNSIGNED[size])[index].any():
                self.report(f"{what} reads shared memory {fault}", None)
        if (self.written.view(UNSIGNED[size])[index] != ONES[size]).any():
            self.report(f"{what} reads shared memory that nothing has written", None)

    def fence(self, kind, mask) -> None:
        """Lets wgmma and TMA read what the fencing warps have written and what was written before the last barrier."""
        if kind.startswith("proxy.async"):
            fenced = (np.ones(self.n, bool) if mask is None else mask).reshape(self.blocks, -1, 32).all(2)
            arrays = (self.unfenced, self.writers)
            for unfenced, writers, warps in zip(*(a.reshape(self.blocks, -1) for a in arrays), fenced, strict=True):
                tags = np.zeros(256, bool)
                tags[1 + np.flatnonzero(warps)] = True
                unfenced[tags[unfenced] | ((writers == 0) & warps.any())] = 0

    # wgmma

    def wgmma_fence(self, mask) -> None:
        pass

    def wgmma_commit_group(self, mask) -> None:
        self.wgmma_group += 1 if mask is None else mask

    def wgmma_wait(self, registers, left, mask) -> None:
        on = self.bools[1] if mask is None else mask
        now, later = self.wgmma_group, []
        for threads, group, arguments in self.deferred:
            done = threads & on & (group < now - left)
            if done.any():
                self.wgmma_group = group
                self._multiply(registers, *arguments, done)
            if (threads & ~done).any():
                later.append((threads & ~done, group, arguments))
        self.deferred, self.wgmma_group = later, now
        for index, (value, alive, group) in list(self.accumulators.items()):
            done = alive & on & (group < self.wgmma_group - left)
            if done.any():
                registers[index] = where(done, value, registers[index])
                alive &= ~done
                if not alive.any():
                    del self.accumulators[index]
        rest = []
        for threads, group, elements, size in self.reads:
            done = on[threads] & (group < self.wgmma_group[threads] - left)
            # complete for all four warps of a group, as Triton also assumes; other groups need a barrier
            if self.warps > 4:
                self.readers.view(UNSIGNED[size])[elements[done]] = ONES[size]
            if not done.all():
                rest.append((threads[~done], group[~done], elements[~done], size))
        self.reads = rest
        self._mark_busy()

    def _matrix(self, descriptor, rows, k, size, transposed, groups, on):
        """The [groups, rows, k] operand that a descriptor points to, with K as columns."""
        d = descriptor.reshape(groups, 128)
        if (d[on] != d[on, :1]).any():
            self.report("wgmma whose threads give different descriptors", None)
        d = d[:, 0].astype(i8)
        span = SPAN[int(d[on][0] >> 62 & 3)]
        start, leading, stride = (((d >> at & 0x3FFF) << 4)[:, None, None] for at in (0, 16, 32))
        if (d[on] >> 49 & 7).any():
            raise UnknownError("wgmma with a base offset")
        r, c = np.arange(rows)[:, None], np.arange(k)
        if not transposed:
            c = c * size
            offset = (r % 8) * (span or 16) + (r // 8) * stride
            offset = offset + (c if span else c // 16 * leading + c % 16)
        elif span:
            atom = span // size
            offset = (r % atom) * size + r // atom * leading + (c % 8) * span + c // 8 * stride
        else:
            offset = (r % 8) * size + r // 8 * stride + (c % 8) * 16 + c // 8 * leading
        address = swizzled(start + offset, span)
        outside = (address >= self.shared_bytes).any((1, 2)) & on
        if outside.any():
            self.report("wgmma reads outside shared memory", None)
        address = where(address < self.shared_bytes, address, 0) + self.shared_base.reshape(groups, 128)[:, :1, None]
        index = address // size
        self._async_read(index[on], size, "wgmma")
        first = np.arange(groups) * 128
        self.reads.append((first[on], self.wgmma_group[first[on]], index[on], size))
        self.busy.view(UNSIGNED[size])[index[on]] = ONES[size]
        return self.shared.view(UNSIGNED[size])[index]

    def wgmma(self, registers, shape, kind, out, a, b, keeps, flags, mask) -> None:
        if self.staggered:
            threads = self.bools[1] if mask is None else mask
            self.deferred.append((threads, self.wgmma_group.copy(), (shape, kind, out, a, b, keeps, flags)))
        else:
            self._multiply(registers, shape, kind, out, a, b, keeps, flags, mask)

    def _multiply(self, registers, shape, kind, out, a, b, keeps, flags, mask) -> None:
        rows, n, k = map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", shape).groups())
        groups, size = self.n // 128, 4 if kind == "tf32" else 2
        on = np.ones(groups, bool) if mask is None else mask.reshape(groups, 128).all(1)
        if mask is not None and (mask.reshape(groups, 128).any(1) & ~on).any():
            self.report("wgmma by part of a warp group", mask)
        if rows != 64 or flags[:2] != [1, 1]:
            raise UnknownError(f"wgmma {shape} with flags {flags}")
        transposed = [*flags[2:], 0, 0]

        def numbers(t):
            if kind == "tf32":
                return (t & u4.type(0xFFFFE000)).view(f4)
            return from_bf16(t) if kind == "bf16" else t.view("f2").astype(f4)

        if isinstance(a, list):
            if kind == "tf32":
                t = (np.stack(a) & u4.type(0xFFFFE000)).view(f4).reshape(2, 2, groups, 4, 8, 4)  # k, row, .., lane
                left = t.transpose(2, 3, 1, 4, 0, 5)
            else:
                t = halves(np.stack(a), kind).reshape(2, 2, groups, 4, 8, 4, 2)
                left = t.transpose(2, 3, 1, 4, 0, 5, 6)
            left, transposed_b = left.reshape(groups, 64, k), transposed[0]
        else:
            left, transposed_b = numbers(self._matrix(a, 64, k, size, transposed[0], groups, on)), transposed[1]
        right = numbers(self._matrix(b, n, k, size, transposed_b, groups, on))
        product = left @ right.transpose(0, 2, 1)
        product = product.reshape(groups, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, -1)
        threads = np.repeat(on, 128)
        for index, p in zip(out, product, strict=True):
            pending = self.accumulators.get(index)
            value = registers[index]
            if pending is not None:
                value = where(pending[1], pending[0], value)
            made = where(keeps, p + value.view(f4), p).astype(f4).view(u4)
            if pending is None:
                self.accumulators[index] = [made, threads.copy(), self.wgmma_group.copy()]
            else:
                pending[0] = where(threads, made, pending[0])
                pending[1] |= threads
                pending[2] = where(threads, self.wgmma_group, pending[2])
            registers[index] = where(threads, u4.type(0x7FC0DEAD), registers[index])  # NaN until the wait

    # mbarriers

    def _barriers(self, address, offset, mask):
        for i in np.flatnonzero(self.bools[1] if mask is None else mask):
            yield i, (int(self.block[i]), int(address[i]) + offset)

    def _at(self, i, key) -> Barrier:
        if key not in self.barriers:
            self.report("a barrier that is not initialised", np.arange(self.n) == i)
            self.barriers[key] = Barrier(1)
        return self.barriers[key]

    def barrier_init(self, address, offset, count, mask) -> None:
        for i, key in self._barriers(address, offset, mask):
            self.barriers[key] = Barrier(int(count[i]))

    def barrier_inval(self, address, offset, _, mask) -> None:
        for i, key in self._barriers(address, offset, mask):
            if self._at(i, key).copies:
                self.report("a barrier that ends before its copies", None)
            del self.barriers[key]

    def barrier_arrive(self, address, offset, expected, mask) -> None:
        for i, key in self._barriers(address, offset, mask):
            barrier = self._at(i, key)
            self._settle(barrier)
            barrier.left -= 1
            barrier.expected += 0 if expected is None else int(expected[i])

    def _settle(self, barrier) -> None:
        """Ends the phase if all have arrived; then the copied data is visible."""
        if barrier.left == 0 and barrier.expected == barrier.got:
            for index, size, data in barrier.copies:
                for array, value in ((self.pending, 0), (self.written, ONES[size]), (self.shared, data)):
                    array.view(UNSIGNED[size])[index] = value
                for array in (self.writers, self.unfenced):
                    array.view(UNSIGNED[size])[index] = 0
            barrier.left, barrier.phase, barrier.copies = barrier.count, barrier.phase ^ 1, []
            barrier.expected = barrier.got = 0

    def barrier_done(self, address, offset, parity, mask):
        done = np.zeros(self.n, bool)
        for i, key in self._barriers(address, offset, mask):
            barrier = self._at(i, key)
            self._settle(barrier)
            done[i] = barrier.phase != int(parity[i]) & 1
        return done

    # TMA

    def bulk_copy(self, load, descriptor, at, shared, barrier, offset, mask) -> None:
        for i in np.flatnonzero(self.bools[1] if mask is None else mask):
            tensor = self.tensor_maps[int(descriptor[i])]
            corner = [int(c[i]) for c in at][::-1]
            here = np.arange(self.n) == i
            places = [c + np.arange(b) for c, b in zip(corner, tensor.box, strict=True)]
            grid = np.meshgrid(*places, indexing="ij")
            inside = np.all([(g >= 0) & (g < s) for g, s in zip(grid, tensor.shape, strict=True)], axis=0).reshape(-1)
            size, dtype = tensor.element, UNSIGNED[tensor.element]
            where_from = sum(g * s for g, s in zip(grid, tensor.strides, strict=True)).reshape(-1) * size
            where_from = where_from + tensor.base - Arena.BASE
            where_from = where(inside, where_from, 0) // size
            to = int(shared[i]) + offset
            if to % max(128, 8 * tensor.span) or to + len(inside) * size > self.shared_bytes:
                self.report("TMA at an unaligned place of shared memory, or outside it", here)
            index = swizzled(to + np.arange(len(inside)) * size, tensor.span)
            index = (index + self.shared_base[i]) // size
            memory, valid = self.arena.bytes.view(dtype), self.arena.valid.view(dtype)
            if (inside & (valid[where_from] != ONES[size])).any():
                self.report("TMA outside the tensors", here)
            if load:
                self._load_tile(i, index, size, where(inside, memory[where_from], 0).astype(dtype), barrier)
                continue
            self._async_read(index, size, "TMA store")
            memory[where_from[inside]] = self.shared.view(dtype)[index][inside]
            stamp = self._stamp()[i]
            for part in range(max(1, size // 2)):
                self.arena.writer[(where_from[inside] * size) // 2 + part] = stamp
            self.stored = True
            self.stores.append((i, self.bulk_group[i], index, size))
            self.busy.view(dtype)[index] = ONES[size]

    def _load_tile(self, i, index, size, data, barrier) -> None:
        dtype, here = UNSIGNED[size], np.arange(self.n) == i
        mine = dtype.type(int.from_bytes(bytes([self.tag[i]] * size), "little"))
        for array, fault in ((self.readers, "read"), (self.writers, "written")):
            by = array.view(dtype)[index]
            if ((by != 0) & (by != mine)).any():
                self.report(f"race: TMA load to what another warp has {fault} since the last barrier", here)
        if self.busy.view(dtype)[index].any() or self.pending.view(dtype)[index].any():
            self.report("TMA load to what is still being read or written", here)
        self.pending.view(dtype)[index] = ONES[size]
        self.shared.view(dtype)[index] = ONES[size]
        target = self._at(i, (int(self.block[i]), int(barrier[i])))
        target.got += len(index) * size
        target.copies.append((index, size, data))

    def bulk_commit(self, mask) -> None:
        self.bulk_group += 1 if mask is None else mask

    def bulk_wait(self, left, read, mask) -> None:
        on = self.bools[1] if mask is None else mask
        rest = []
        for i, group, elements, size in self.stores:
            if on[i] and group < self.bulk_group[i] - left:
                mine = int.from_bytes(bytes([self.tag[i]] * size), "little")
                self.readers.view(UNSIGNED[size])[elements] = mine
            else:
                rest.append((i, group, elements, size))
        self.stores = rest
        self._mark_busy()
