"""The study: its verdicts on known numbers, and a whole run with a tiny model."""

import json
import math

import pytest
import torch
from torch import nn

pytest.importorskip("scipy")

from benchmarks import report, study
from benchmarks.study import claims, runs, tasks
from benchmarks.study.tasks import Domain, Setting
from cotolora.results import rounded


@pytest.mark.parametrize(
    ("differences", "sign", "expected"),
    [
        ([1.0, 1.1, 0.9], 1, claims.HOLDS),
        ([1.0, 1.1, 0.9], -1, claims.FAILS),
        ([-1.0, -1.1, -0.9], -1, claims.HOLDS),
        ([1.0, -1.1, 0.9], 1, claims.OPEN),
        ([1.0], 1, claims.OPEN),
        ([1.0, 1.0], 1, claims.OPEN),
        ([1.0, 1.0, 1.0], 1, claims.HOLDS),
    ],
)
def test_a_verdict_needs_the_whole_interval(differences, sign, expected):
    assert claims.verdict(differences, sign) == expected


def test_the_interval_is_students():
    # four numbers with mean 1 and standard deviation 1; t(0.975, 3) = 3.18245 from tables
    low, high = claims.interval([0.0, 2.0, 1 - math.sqrt(0.5), 1 + math.sqrt(0.5)])
    assert (low, high) == pytest.approx((1 - 3.18245 / 2, 1 + 3.18245 / 2), abs=1e-5)


def row(method, measure, value, seed=0, at=None, domain="one"):
    told = {"setting": "digits", "domain": domain, "method": method, "measure": measure}
    return {**told, "at": at, "seed": seed, "value": value}


def test_claims_pair_the_seeds_and_average_the_domains():
    rows = [
        row("LoRA", "score", 10.0 * seed + shift, seed, domain=d)
        for seed in (0, 1, 2)
        for d, shift in (("a", 0), ("b", 2), ("c", 999))  # CoTo has no rows for c
    ]
    # LoRA has no rows for seed 7
    rows += [row("CoTo", "score", 10.0 * seed + 4, seed, domain=d) for seed in (1, 0, 7, 2) for d in ("a", "b")]
    (found,) = claims.judged(rows, "digits")
    assert found["claim"].says == "the score on a single task is higher"
    assert (found["difference"], found["low"], found["high"]) == (3.0, 3.0, 3.0)
    assert found["verdict"] == claims.HOLDS
    assert found["without"] == (11.0, 10.0)


def test_the_rate_with_the_best_mean_score_is_chosen():
    method = runs.METHODS[0]
    rows = [
        row(method.name, "sweep", value, seed, at) for at, seed, value in ((1, 0, 9), (1, 1, 0), (2, 0, 5), (2, 1, 5))
    ]
    assert runs.best_rates([*rows, row("other", "sweep", 99, at=3)], [method]) == {method: 2}


def test_rows_are_characters_and_the_next_characters():
    x, y = tasks.rows_of("abc€" + "d" * tasks.LENGTH * 2)
    assert x.shape == y.shape == (2, tasks.LENGTH)
    assert x[0, :5].tolist() == [*b"abc?d"]
    assert torch.equal(x.flatten()[1:], y.flatten()[:-1])


@pytest.mark.parametrize("make", [tasks.prose, tasks.character_names, tasks.code_pages], ids=lambda f: f.__name__)
def test_this_machine_has_the_text(make):
    domain = tasks.domain_of(make.__name__, make())
    assert (
        len(domain.train[0]) == tasks.TRAIN // tasks.LENGTH or len(domain.train[0]) == (tasks.TRAIN - 1) // tasks.LENGTH
    )


def test_too_little_text_is_named():
    with pytest.raises(ValueError, match="prose must have at least 162800 characters; this Python's has 5"):
        tasks.domain_of("prose", "short")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def tiny():
    def split(seed):
        x = torch.randn(60, 6, generator=torch.Generator().manual_seed(seed))
        return x, x[:, :3].argmax(1)

    def pretrained(steps):
        torch.manual_seed(0)
        return tasks.learn(Tiny(), split(9), 20, steps, 1e-2)

    domains = {name: Domain(split(seed), split(seed + 1), split(seed + 2)) for name, seed in (("one", 0), ("two", 5))}
    return Setting(
        "text", "accuracy %", pretrained, domains, lambda m, s: study.tasks.demo.accuracy(m, s), ["0", "1", "2"], 20
    )


def test_settings_run_in_parallel_and_a_failure_keeps_the_others():
    found = study.in_processes(math.sqrt, [4.0, -1.0, 9.0])
    assert {next(found), next(found)} == {2.0, 3.0}
    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        next(found)


@pytest.mark.slow
def test_a_whole_run_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    methods = (runs.METHODS[0], runs.METHODS[2])
    monkeypatch.setitem(study.SETTINGS, "text", tiny)
    monkeypatch.setitem(study.QUICK, "text", study.Size(2, 20, 20, (1e-2, 2e-2), 1, runs.METHODS, 1))
    measured, write = [], report.write
    monkeypatch.setattr(report, "write", lambda path, result: measured.append(result) or write(path, result))
    chosen = ["--methods", *(method.name for method in methods)]
    assert study.main(["--quick", "--settings", "text", "--out", str(tmp_path), *chosen]) == 0
    told = capsys.readouterr().out
    assert told.startswith((tmp_path / "study.md").read_text())
    assert "| the score on a single task is higher" in told
    assert {path.name for path in tmp_path.iterdir()} == {
        "study.md", "study.json", "fused.png", "sparsity.png", "dropped.png", "shapley.png", "rates.png", "kept.png",
        "merged.png", "score.png", "time.png", "skipped.png",
    }  # fmt: skip
    rows = measured[0].rows
    assert json.loads((tmp_path / "study.json").read_text())["results"][0]["rows"] == rounded(rows)
    assert {r["method"] for r in rows} == {"base", "LoRA", "CoTo"}
    ours = {(r["measure"], r["at"]) for r in rows if r["method"] == "CoTo"}
    assert {
        ("merged", "lego"),
        ("aligned", 0.5),
        ("fused", 0.5),
        ("kept", "low"),
        ("shapley", 2),
        ("time", None),
    } <= ours
    # relations that hold regardless of what was learned
    of = {(r["method"], r["domain"], r["seed"], r["measure"], r["at"]): r["value"] for r in rows}
    for name in ("LoRA", "CoTo"):
        assert of[name, "one", 0, "dropped", 0] == of[name, "one", 0, "score", None]
        together = sum(of[name, "one", 0, "shapley", layer] for layer in range(3))
        assert together == pytest.approx(of[name, "one", 0, "score", None] - of[name, "one", 0, "dropped", 3])
        assert of[name, "one", 0, "fused", 1.0] == of[name, "one", 0, "score", None]
    assert of["LoRA", "one", 0, "skipped", None] == 0 < of["CoTo", "one", 0, "skipped", None] < 60


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds", "1"], "--seeds must be at least 2"),
        (["--steps", "5"], "--steps must be at least 20"),
        (["--methods", "CoTo"], "--methods must include LoRA, the baseline of the times; got CoTo"),
    ],
)
def test_bad_options_are_named(arguments, says, capsys):
    with pytest.raises(SystemExit):
        study.main(arguments)
    assert says in capsys.readouterr().err
