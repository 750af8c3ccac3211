"""Every row of the tile tables: runs its launcher and tile on small suitable operands and compares with float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from cotolora.kernels.adapter_grads import Dora, gram, project
from cotolora.kernels.dropout import drawn_mask, keep_scale
from cotolora.kernels.hira import hira
from cotolora.kernels.hira_grads import hira_grads
from cotolora.kernels.low_rank_gemm import low_rank_gemm
from cotolora.kernels.one_pass import one_pass
from cotolora.kernels.one_pass_swapped import one_pass_swapped
from cotolora.kernels.partials import sum_partials
from cotolora.kernels.pre_expand import expand, pre_expand
from cotolora.kernels.row_norm import row_norm
from cotolora.kernels.shrink import shrink
from cotolora.kernels.tiles import MULTIPROCESSORS, TABLES, TMA_ARCHITECTURES, Row, Tile, row_for
from tests.ptx.library import DTYPES, SCALE, matmul_precision, on

CAN_SCALE = ("one_pass", "one_pass_swapped", "low_rank_gemm", "gram", "project")
CANNOT_DROP = ("project", "row_norm")


@dataclass(frozen=True)
class RowCase:
    kernel: str
    arch: str
    row: Row
    dtype: str
    gate: str = "none"  # or "rows", some of which are off, or "rows off", which all are
    dropout: float = 0.0
    scaled: bool = False
    aligned: bool = True
    rank: int = 16  # a multiple of 16; reduced by 3 if operands are not aligned
    most_rows: int = 150  # limit for kernels whose loop is not over the rows

    def __str__(self) -> str:
        tile = self.row.tile
        sizes = (tile.block_m, tile.block_n, tile.block_k) if isinstance(tile, Tile) else (tile.rows, tile.columns)
        text = f"{self.kernel} {self.arch} {'x'.join(map(str, sizes))} w{tile.num_warps} s{tile.num_stages}"
        text += f" {self.dtype} r{self.rank} {'aligned' if self.aligned else 'odd'} gate {self.gate}"
        return text + " dropout" * bool(self.dropout) + " scaled" * self.scaled


def row_cases(arch: str) -> Iterator[RowCase]:
    """Each tile of each row once per precision; in turn plain, with row gates and dropout, or scaled."""
    turn = 0
    for kernel, table in TABLES.items():
        each = (replace(row, tile=tile, smaller=()) for row in table[arch] for tile in row.tiles)
        for number, row in enumerate(each):
            floats = {"ieee": ["fp32"], "tf32": ["tf32"], None: ["fp32", "tf32"]}[row.precision]
            for dtype in floats if row.element_size == 4 else ("bf16", "fp16"):
                turn += 1
                scaled = kernel in CAN_SCALE and turn % 4 == 3 and dtype != "tf32"
                scaled = bool(scaled if row.scaled is None else row.scaled) and row.selects is not False
                selects = not scaled and row.selects is not False and (turn % 2 == 0 or dtype == "tf32")
                selects = selects or (bool(row.selects) and not scaled)
                aligned = row.aligned if row.aligned is not None else turn % 3 != 2
                dropout = 0.3 if selects and kernel not in CANNOT_DROP else 0.0
                gate = "rows" if selects or (scaled and turn % 2) else "none"
                rank = -(-max(row.min_rank, 16 if number % 2 else 32) // 16) * 16
                yield RowCase(kernel, arch, row, dtype, gate, dropout, scaled, aligned, rank)


def case_for(kernel: str, arch: str, dtype: str = "bf16", *, rows: int = 40, rank: int = 16, **kind) -> RowCase:
    """The row that the launcher uses for such operands; `kind` holds further fields of a `RowCase`."""
    case = RowCase(kernel, arch, TABLES[kernel][arch][-1], dtype, rank=rank, most_rows=rows, **kind)
    row = row_for(
        TABLES[kernel], arch, rows, 144, rank,
        element_size=DTYPES[dtype].itemsize, precision="tf32" if dtype == "tf32" else "ieee",
        aligned=case.aligned, selects=case.gate != "none" or bool(case.dropout), scaled=case.scaled,
    )  # fmt: skip
    return RowCase(kernel, arch, row, dtype, rank=rank, most_rows=rows, **kind)


def run_row(case: RowCase, emulator) -> float:
    """The largest error, in units of the sum of the rounding errors of each result and of its inputs."""
    operands = Operands(case)
    with ExitStack() as stack:
        stack.enter_context(matmul_precision(case.dtype))
        stack.enter_context(on(emulator, int(case.arch[3:])))
        # few programs, so that each computes several tiles
        stack.enter_context(mock.patch.dict(MULTIPROCESSORS, {case.arch: 1}))
        getattr(operands, case.kernel)()
    return operands.worst


class Operands:
    """Operands of a case, one method per kernel that launches it, and the largest error of the results."""

    def __init__(self, case: RowCase) -> None:
        kernel, tile = case.kernel, case.row.tile
        self.case, self.tile, self.dtype, self.worst = case, tile, DTYPES[case.dtype], 0.0
        steps = tile.num_stages + 3  # more steps than the pipeline has buffers
        m, n = min(case.row.max_m or 150, case.most_rows, 40 if kernel == "one_pass_swapped" else 150), 144
        k = steps * (tile.block_k if isinstance(tile, Tile) else tile.columns) + 32
        if kernel in ("one_pass_swapped", "shrink"):  # two splits over K
            k = 2 * k - 32
        if kernel in ("gram", "project", "hira_grads"):  # their loop is over M, in two splits
            m, k = 2 * steps * (tile.block_m if isinstance(tile, Tile) else tile.rows) - 10, 144
        rank = case.rank
        if not case.aligned:
            k, n, rank = k - 3, n - 3, rank - 3
        torch.manual_seed(m + n + k + rank)
        self.x, self.dy, self.weight = self.made(m, k), self.made(m, n), self.made(n, k, k**-0.5, transposed=True)
        self.a, self.b = self.made(rank, k, k**-0.5), self.made(n, rank, rank**-0.5, transposed=True)
        self.bias, self.u = self.made(1, n)[0], torch.randn(m, n).to(self.dtype)
        self.h, self.p = self.made(m, rank), self.made(m, rank)
        # with several tiles of rows, the whole last tile is off
        block, rows = tile.block_m if isinstance(tile, Tile) else tile.rows, torch.arange(m)
        last = rows // block == (m - 1) // block if m > block else rows < 0
        self.gate = {"none": None, "rows": (rows % 3 != 1) & ~last, "rows off": rows < 0}[case.gate]
        self.rows_on = torch.ones(m, 1, dtype=torch.bool) if self.gate is None else self.gate[:, None]
        self.seed = torch.tensor(123456789123456789) if case.dropout else None
        self.dropped = {"seed": self.seed, "dropout": case.dropout}
        self.column = torch.rand(n) + 0.5 if case.scaled else None
        self.dora = None if self.column is None else Dora(self.column, self.column, self.u, torch.float32)
        # float64 copies; c is 1 if columns are not scaled
        self.xs, self.ws, self.bs, self.dys = (t.double() for t in (self.x, self.weight, self.bias, self.dy))
        self.as_, self.bb, self.hs, self.ps = (t.double() for t in (self.a, self.b, self.h, self.p))
        self.us, self.c = self.u.double(), (torch.ones(n) if self.column is None else self.column).double()

    def made(self, rows: int, columns: int, scale: float = 1.0, transposed: bool = False) -> Tensor:
        """Random numbers; if the case is not aligned, transposed or with columns of NaN in between."""
        t = (torch.randn(rows, columns) * scale).to(self.dtype)
        if self.case.aligned:
            return t
        if transposed:
            return t.t().contiguous().t()
        wide = torch.full((rows, columns + 3), float("nan"), dtype=self.dtype)[:, 1 : 1 + columns]
        return wide.copy_(t)

    def compare(self, got: Tensor, exact: Tensor, sizes: Tensor, of_rounded: Tensor | float = 0.0) -> None:
        """`sizes`: sums of absolute terms; `of_rounded`: the same for terms with a rounded factor."""
        eps = 0.0 if self.dtype == torch.float32 else torch.finfo(self.dtype).eps / 2 * 1.01
        output_eps = 0.0 if got.dtype == torch.float32 else eps
        sum_error = 2.0**-9 if self.case.dtype == "tf32" else 2.0**-21
        allowed = output_eps * exact.abs() + sum_error * sizes + eps * of_rounded + 1e-30
        if got.dtype == torch.float16:
            allowed = allowed + 2.0**-25
        error = ((got.double() - exact).abs() / allowed).nan_to_num(nan=float("inf")).max().item()
        self.worst = max(self.worst, error)

    def selected(self, t: Tensor) -> Tensor:
        """Sets the rows that are off to zero."""
        return torch.where(self.rows_on, t, 0)

    def scaled(self, t: Tensor) -> Tensor:
        """``c ∘ t`` in the rows that are on."""
        return torch.where(self.rows_on, t * self.c, t)

    def drop(self, t: Tensor) -> Tensor:
        """Applies dropout as the kernels do."""
        if self.seed is None:
            return t
        return torch.where(drawn_mask(self.seed, *t.shape, self.case.dropout), t, 0) * keep_scale(self.case.dropout)

    def down(self) -> tuple[Tensor, Tensor]:
        """h, and the sums of its absolute terms."""
        x, a = self.drop(self.xs), self.as_.T
        return self.selected(SCALE * (x @ a)), self.selected(SCALE * (x.abs() @ a.abs()))

    def compare_forward(self, y: Tensor, u: Tensor | None, h: Tensor, h_sizes: Tensor, h_rounded: bool) -> None:
        """Compares y and, if it is given, u."""
        up = self.bb.T
        exact = self.xs @ self.ws.T + self.selected(h @ up)
        sizes = self.xs.abs() @ self.ws.abs().T + h_sizes @ up.abs()
        of_rounded = h_rounded * (h.abs() @ up.abs())
        if u is not None:
            self.compare(u, exact, sizes, of_rounded)
        self.compare(y, self.scaled(exact) + self.bs, self.scaled(sizes) + self.bs.abs(), self.scaled(of_rounded))

    def empty_u(self) -> Tensor | None:
        return None if self.column is None else torch.full_like(self.dy.contiguous(), float("nan"))

    def one_pass(self, launcher=one_pass, **tile) -> None:
        u = self.empty_u()
        operands = (self.x, self.weight, self.bias, self.a, self.b, self.gate, SCALE)
        y, made_h = launcher(*operands, column_scale=self.column, u=u, **self.dropped, **(tile or {"tile": self.tile}))
        h, sizes = self.down()
        self.compare(made_h, h, sizes)
        self.compare_forward(y, u, h, sizes, True)

    def one_pass_swapped(self) -> None:
        self.one_pass(one_pass_swapped, stream=self.tile, split=2)

    def low_rank_gemm(self) -> None:
        tile = {"tile": self.tile, "tma": self.case.arch in TMA_ARCHITECTURES and self.case.aligned}
        if self.seed is None:
            u = self.empty_u()
            operands = (self.x, self.weight, self.bias, self.h, self.b, self.gate)
            y = low_rank_gemm(*operands, column_scale=self.column, u=u, **tile)
            self.compare_forward(y, u, self.selected(self.hs), self.hs.abs(), False)
        operands = (self.dy, self.weight.T, None, self.p, self.a.T, self.gate)
        dx = low_rank_gemm(*operands, x_scale=self.column, **self.dropped, **tile)
        dy, sizes = self.scaled(self.dys), self.scaled(self.dys.abs()) @ self.ws.abs()
        low_rank = self.selected(self.drop(self.ps @ self.as_))
        of_rounded = 0.0 if self.column is None else sizes
        self.compare(dx, dy @ self.ws + low_rank, sizes + self.ps.abs() @ self.as_.abs(), of_rounded)

    def pre_expand(self) -> None:
        y, made_h = pre_expand(
            self.x, self.bias, self.a, self.b, self.gate, SCALE, stream=self.tile, **self.dropped
        )  # fmt: skip
        h, sizes = self.down()
        self.compare(made_h, h, sizes)
        up = self.bb.abs().T
        self.compare(y, h @ self.bb.T + self.bs, sizes @ up + self.bs.abs(), h.abs() @ up)
        dx = expand(self.p, self.a, self.gate, stream=self.tile, **self.dropped)
        self.compare(dx, self.selected(self.drop(self.ps @ self.as_)), self.ps.abs() @ self.as_.abs())
        y = expand(self.h, self.b.T, self.gate, add=self.dy, stream=self.tile)
        self.compare(y, self.selected(self.hs @ self.bb.T) + self.dys, self.hs.abs() @ up + self.dys.abs())

    def shrink(self) -> None:
        h, sizes = self.down()
        for split in (1, 2):
            made = shrink(self.x, self.a, self.gate, SCALE, stream=self.tile, split=split, **self.dropped)
            self.compare(made, h, sizes)

    def compare_dm(self, dm: Tensor) -> None:
        exact, sizes = self.selected(self.dys * self.us).sum(0), (self.dys * self.us).abs().sum(0)
        self.compare(dm, exact / self.c, sizes / self.c)

    def gram(self) -> None:
        options = {"stream": self.tile, "dora": self.dora}
        total, dm = gram(self.dy, self.h, self.gate, 1.0, torch.float32, split=2, **options)
        sum_partials(*[s for s in (total, dm) if s is not None])
        dy, c = self.selected(self.dys), self.c[:, None]
        self.compare(total.out, c * (dy.T @ self.hs), c * (dy.abs().T @ self.hs.abs()))
        if dm is not None:
            self.compare_dm(dm.out[0])
            return
        total, _ = gram(self.x, self.p, self.gate, 1.0, torch.float32, split=1, **self.dropped, **options)
        x = self.selected(self.drop(self.xs))
        self.compare(total.out, x.T @ self.ps, x.abs().T @ self.ps.abs())

    def project(self) -> None:
        options = {"dora": self.dora, "stream": self.tile, "split": 2}
        p, db, dm = project(self.dy, self.h, self.b, self.gate, SCALE, torch.float32, **options)
        sum_partials(p)
        sum_partials(db)
        dy, c = self.selected(self.dys), self.c[:, None]
        exact, sizes = SCALE * (dy @ (c * self.bb)), dy.abs() @ (c * self.bb.abs())
        self.compare(p.out, exact, sizes, 0.0 if dm is None else sizes)
        self.compare(db.out, c * (dy.T @ self.hs), c * (dy.abs().T @ self.hs.abs()))
        if dm is not None:
            sum_partials(dm)
            self.compare_dm(dm.out[0])

    def row_norm(self) -> None:
        norm, ratio = row_norm(self.weight, self.a, self.b, SCALE, None, self.bias, self.gate, stream=self.tile)
        exact = (self.ws + SCALE * (self.bb @ self.as_)).norm(dim=1)
        sizes = (self.ws.abs() + SCALE * (self.bb.abs() @ self.as_.abs())).norm(dim=1)
        ratios = self.bs / exact
        if not self.rows_on.any():
            exact = ratios = sizes = torch.ones_like(exact)
        self.compare(norm, exact, sizes)
        self.compare(ratio, ratios, ratios.abs() * sizes / exact)

    def hira(self) -> None:
        y = hira(
            self.x, self.weight, self.bias, self.a, self.b, self.gate, SCALE, tile=self.tile, **self.dropped
        )  # fmt: skip
        update = self.ws * (SCALE * (self.bb @ self.as_))
        sizes = self.ws.abs() * SCALE * (self.bb.abs() @ self.as_.abs())
        xs, dys, ws = self.xs, self.dys, self.ws
        dropped = self.drop(xs.abs())
        exact = xs @ ws.T + self.selected(self.drop(xs) @ update.T) + self.bs
        self.compare(
            y, exact, xs.abs() @ ws.abs().T + dropped @ sizes.T + self.bs.abs(), dropped @ update.abs().T
        )  # fmt: skip
        operands = (self.dy, self.weight.T, None, self.b.T, self.a.T, self.gate, SCALE)
        dx = hira(*operands, drops_input=False, tile=self.tile, **self.dropped)
        exact = dys @ ws + self.selected(self.drop(dys @ update))
        of_rounded = self.drop(dys.abs() @ update.abs())
        self.compare(dx, exact, dys.abs() @ ws.abs() + self.drop(dys.abs() @ sizes), of_rounded)

    def hira_grads(self) -> None:
        operands = (self.dy, self.x, self.weight, self.a, self.b, self.gate, SCALE, torch.float32, torch.float32)
        da, db = hira_grads(*operands, tile=self.tile, split=2, **self.dropped)
        dy, x = self.selected(self.dys), self.drop(self.xs)
        t, sizes = SCALE * self.ws * (dy.T @ x), SCALE * self.ws.abs() * (dy.abs().T @ x.abs())
        a, b = self.as_.abs(), self.bb.abs()
        # each of the two splits over rows is rounded separately
        self.compare(da, self.bb.T @ t, b.T @ sizes, b.T @ sizes)
        self.compare(db, t @ self.as_.T, sizes @ a.T, sizes @ a.T)
