"""The tile that a launch uses on each GPU, chosen by the waves of tiles on its multiprocessors."""

import itertools
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from cotolora.kernels import tiles
from cotolora.kernels.hira_grads import tile_of_weight
from cotolora.kernels.tiles import (
    GAIN_OF_TWICE,
    HIRA,
    HIRA_GRADS,
    LOW_RANK_GEMM,
    MULTIPROCESSORS,
    ONE_PASS,
    PROJECT,
    Row,
    Tile,
    architecture,
    fill,
    multiprocessors,
    row_for,
    splits,
    stream_by_parts,
    tile_by_waves,
    tile_for,
)
from tests.support.repository import ROOT

TABLES = {"one_pass": ONE_PASS, "low_rank_gemm": LOW_RANK_GEMM, "hira": HIRA}
BF16 = {"element_size": 2, "precision": "ieee"}
# rows of y, and columns of y in the linears of vision transformers and Llamas
SIZES = list(itertools.product((65, 128, 256, 512, 777, 1024, 2048, 8192, 12608), (768, 1024, 3072, 4096, 14336)))


def sides(tile):
    return tile.block_m, tile.block_n


def test_fill_is_the_share_of_whole_waves():
    assert fill(128, 256, 128, 256, 1) == 1
    assert fill(2048, 1024, 128, 256, 132) == 64 / 132
    assert fill(2048, 1024, 128, 128, 132) == 128 / 132
    assert fill(133 * 64, 64, 64, 64, 132) == 133 / 264
    assert fill(100, 64, 128, 64, 1) == 100 / 128  # the rows beyond the edge are wasted
    assert fill(0, 0, 64, 64, 132) == 0


# chosen for bfloat16 at rank 16 without gates, on an A100, an H100 or H200, and a B200
CHOSEN = {
    ("low_rank_gemm", 8192, 4096): ((128, 128), (128, 256), (128, 256)),
    ("low_rank_gemm", 2048, 4096): ((128, 128), (128, 256), (128, 256)),
    ("low_rank_gemm", 2048, 1024): ((64, 64), (128, 128), (128, 128)),
    ("low_rank_gemm", 1024, 4096): ((128, 64), (128, 256), (128, 256)),
    ("low_rank_gemm", 512, 4096): ((64, 64), (128, 128), (128, 128)),
    ("low_rank_gemm", 256, 1024): ((64, 64), (64, 64), (64, 64)),
    ("low_rank_gemm", 12608, 768): ((128, 128), (128, 128), (64, 128)),
    ("one_pass", 8192, 4096): ((128, 128), (128, 256), (128, 256)),
    ("one_pass", 2048, 1024): ((64, 64), (128, 128), (128, 128)),
    ("one_pass", 512, 4096): ((64, 64), (128, 128), (128, 128)),
    ("one_pass", 256, 4096): ((128, 128), (64, 128), (64, 128)),
    ("hira", 8192, 4096): ((64, 64), (128, 64), (128, 128)),
    ("hira", 512, 1024): ((64, 64), (64, 64), (64, 64)),
}


@pytest.mark.parametrize(("kernel", "m", "n"), CHOSEN)
def test_tiles_of_well_known_sizes(kernel, m, n):
    archs = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
    assert archs.items() <= MULTIPROCESSORS.items()
    found = tuple(
        sides(tile_for(TABLES[kernel], arch, processors, m, n, 16, **BF16)) for arch, processors in archs.items()
    )
    assert found == CHOSEN[kernel, m, n]


@pytest.mark.parametrize("processors", [14, 78, 108, 114, 132, 148, 304])
@pytest.mark.parametrize("arch", MULTIPROCESSORS)
@pytest.mark.parametrize("kernel", TABLES)
def test_no_other_tile_would_fill_the_gpu_clearly_better(kernel, arch, processors):
    for (m, n), rank, selects in itertools.product(SIZES, (16, 128), (False, True)):
        row = row_for(TABLES[kernel], arch, m, n, rank, **BF16, selects=selects)
        chosen = tile_by_waves(row, m, n, processors)
        assert chosen in row.tiles
        filled = fill(m, n, *sides(chosen), processors)
        for other in row.tiles:
            halvings = math.log2(math.prod(sides(chosen)) / math.prod(sides(other)))
            assert fill(m, n, *sides(other), processors) <= filled * GAIN_OF_TWICE**halvings * (1 + 1e-9)


LAUNCHED = """
import json
from unittest import mock
import torch
from benchmarks.aot import intercept
from cotolora.kernels import hira, hira_grads, low_rank_gemm, one_pass

def launch(module, processors, *arguments):
    with mock.patch.object(module, "architecture", return_value="sm_90"), \
            mock.patch.object(module, "multiprocessors", return_value=processors):
        ((_, _, named), *_) = intercept(lambda: getattr(module, module.__name__.rpartition(".")[2])(*arguments))
    return [named[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]

new = lambda *size: torch.empty(size, dtype=torch.bfloat16, device="meta")
m, n, k, r = 2048, 1024, 4096, 16
x, dy, weight, a, b, h = new(m, k), new(m, n), new(n, k), new(r, k), new(n, r), new(m, r)
print(json.dumps([[
    launch(one_pass, processors, x, weight, None, a, b, None, 1.0),
    launch(low_rank_gemm, processors, x, weight, None, h, b, None),
    launch(hira, processors, x, weight, None, a, b, None, 1.0),
    launch(hira_grads, processors, dy, x, weight, a, b, None, 1.0, torch.float32, torch.float32),
] for processors in (16, 132)]))
"""


def test_the_launchers_ask_for_the_tile_of_their_gpu():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    asked = [sys.executable, "-c", LAUNCHED]
    done = subprocess.run(asked, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout)
    assert few == [[128, 256, 64], [128, 256, 64], [128, 64, 64], [64, 128, 128]]
    assert many == [[128, 128, 64], [128, 128, 64], [128, 64, 64], [64, 128, 128]]


@pytest.mark.parametrize("kernel", TABLES)
def test_every_tile_gives_the_same_numbers(kernel, device):
    """The operands are integers, whose sums are exact in any order."""
    pytest.importorskip("triton")
    from cotolora.kernels.hira import hira
    from cotolora.kernels.low_rank_gemm import low_rank_gemm
    from cotolora.kernels.one_pass import one_pass

    g = torch.Generator().manual_seed(0)
    sizes = {"x": (150, 72), "weight": (270, 72), "bias": (270,), "a": (5, 72), "b": (270, 5), "h": (150, 5)}
    x, weight, bias, a, b, h = (torch.randint(-3, 4, size, generator=g).half().to(device) for size in sizes.values())
    gate = torch.tensor([1, 0, 1], device=device)
    on = gate.bool().repeat_interleave(50)[:, None]
    arch = "sm_80" if device.type == "cpu" else architecture(device)
    made = {
        "one_pass": lambda tile: one_pass(x, weight, bias, a / 8, b, gate, 1.0, tile=tile)[0],
        "low_rank_gemm": lambda tile: low_rank_gemm(x, weight, bias, h, b, gate, tile=tile, tma=False),
        "hira": lambda tile: hira(x, weight, bias, a, b, gate, 1 / 4, tile=tile),
    }
    wx, ws, as_, bs, hs = (t.float() for t in (x, weight, a, b, h))
    update = {
        "one_pass": (wx @ as_.T / 8) @ bs.T, "low_rank_gemm": hs @ bs.T, "hira": wx @ (ws * (bs @ as_) / 4).T
    }[kernel]  # fmt: skip
    expected = (wx @ ws.T + bias.float() + torch.where(on, update, 0)).half()
    for row in TABLES[kernel][arch]:
        for tile in row.tiles if row.element_size != 4 else ():
            if row.aligned is not True or kernel != "low_rank_gemm":
                assert torch.equal(made[kernel](tile), expected), tile


def test_of_equally_good_tiles_the_largest_is_chosen():
    row = Row(Tile(128, 128, 64), (Tile(64, 128, 64), Tile(64, 64, 64)))
    assert tile_by_waves(row, 128 * 132, 128, 132) is row.tile
    assert tile_by_waves(Row(Tile(64, 64, 64)), 1, 1, 132) == Tile(64, 64, 64)


@pytest.mark.parametrize("kernel", [*TABLES, "hira_grads"])
def test_every_smaller_tile_is_smaller_and_chosen_for_some_size(kernel):
    table = {**TABLES, "hira_grads": HIRA_GRADS}[kernel]
    blocks = ("block_n", "block_k") if kernel == "hira_grads" else ("block_m", "block_n")
    for row in {row for rows in table.values() for row in rows}:
        areas = [getattr(tile, blocks[0]) * getattr(tile, blocks[1]) for tile in row.tiles]
        assert areas == sorted(set(areas), reverse=True)
        sizes = itertools.product(range(64, 4096, 192), repeat=2)
        taken = {tile_by_waves(row, m, n, 132, sides=blocks) for m, n in sizes} if row.smaller else {row.tile}
        assert taken == set(row.tiles)


def test_hira_grads_prefers_splitting_m_to_a_smaller_tile():
    (*_, row) = HIRA_GRADS["sm_90"]
    large, small = row.tiles
    assert tile_of_weight(row, 8192, 768, 768, 132) is large  # 36 tiles, each in 7 splits
    assert tile_of_weight(row, 64, 768, 768, 132) is small  # nothing to split
    assert tile_of_weight(row, 8192, 1536, 1536, 132) is small  # 144 tiles: two waves, of which one is nearly empty
    assert tile_of_weight(row, 8192, 4096, 4096, 132) is large


@pytest.mark.parametrize(
    ("m", "n", "columns"),
    [(8192, 4096, 256), (8192, 14336, 512), (8192, 1024, 512), (512, 4096, 128), (70, 136, 128)],
)
def test_project_writes_few_parts_and_fills_the_gpu(m, n, columns):
    row = row_for(PROJECT, "sm_90", m, n, 16, **BF16)
    assert stream_by_parts(row, m, n, 132).columns == columns
    assert row_for(PROJECT, "sm_90", m, n, 24, **BF16).tiles == (row.smaller[-1],)


def test_the_device_is_asked_for_its_multiprocessors(monkeypatch):
    asked = []

    def properties(device):
        asked.append(device)
        return SimpleNamespace(multi_processor_count=114)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    tiles._multiprocessors.cache_clear()
    try:
        device = torch.device("cuda", 3)
        assert [multiprocessors("sm_90", device) for _ in range(2)] == [114, 114]
        assert asked == [device]
        for other in ("cpu", "meta"):
            assert multiprocessors("sm_90", torch.device(other)) == 132
    finally:
        tiles._multiprocessors.cache_clear()


def test_splits_fill_the_gpu_without_tiny_parts():
    assert splits(132, tiles=1000, steps=100) == 1
    assert splits(132, tiles=132, steps=100) == splits(132, tiles=100, steps=100) == 1
    assert splits(132, tiles=64, steps=100) == 4
    assert splits(78, tiles=64, steps=100) == 1
    assert splits(132, tiles=1, steps=100) == 25
    assert splits(132, tiles=1, steps=3) == 1
    assert splits(132, tiles=0, steps=0) == 1
