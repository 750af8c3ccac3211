"""Timing of whole training steps: the contenders, the timed steps, and that wrong contenders are refused."""

import math

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("triton")
from peft.tuners.lora import LoraLayer

import cotolora
from benchmarks import llama, report, train
from benchmarks.llama import COTO, NARROW, ON, PEFT, PHASES
from benchmarks.workload import RefusedError

STEPS, LAYERS = 8, 3
TINY = ["--device", "cpu", "--steps", str(STEPS), "--layers", str(LAYERS), "--hidden", "32", "--batch", "2"]
TINY += ["--tokens", "8", "--rank", "2"]


@pytest.fixture(scope="module")
def options():
    return train.parse(TINY)


@pytest.fixture(scope="module")
def result(options):
    return train.measure(options)


def masks():
    p = [cotolora.activation_probability(step, STEPS) for step in range(STEPS)]
    return torch.stack([cotolora.sample_mask(LAYERS, p[step], seed=0, step=step) for step in range(STEPS)])


@pytest.mark.slow
def test_phases_add_up_to_the_step(result):
    runs = train.runs_of(result)
    assert list(runs) == [PEFT, ON, COTO]
    assert not result.refused
    for name, row in runs.items():
        steps = [r["seconds"] for r in result.rows if "step" in r and r["contender"] == name]
        assert len(steps) == STEPS
        assert row["mean_s"] == pytest.approx(sum(steps) / STEPS)
        assert all(row[f"{phase}_s"] > 0 for phase in PHASES)
        assert sum(row[f"{phase}_s"] for phase in PHASES) == pytest.approx(row["mean_s"])
        assert min(steps) <= row["p20_s"] <= row["p80_s"] <= max(steps)
        assert row["over_peft"] == pytest.approx(row["mean_s"] / runs[PEFT]["mean_s"])


def test_only_coto_skips_work_as_its_masks_say(result):
    runs, on = train.runs_of(result), masks()
    assert 0 < on.float().mean() < 1
    for name in (PEFT, ON):
        assert (runs[name]["work_skipped"], runs[name]["backwards_skipped"]) == (0, 0)
    assert runs[COTO]["work_skipped"] == pytest.approx(1 - on.float().mean().item())
    # the backward stops at the lowest block that is on
    lowest = on.int().argmax(1)
    assert lowest.any()
    assert runs[COTO]["backwards_skipped"] == pytest.approx(lowest.sum().item() / (STEPS * LAYERS))


def test_p_follows_the_schedule(result):
    p = {name: [r["p"] for r in result.rows if "step" in r and r["contender"] == name] for name in (PEFT, COTO)}
    assert p[COTO] == [cotolora.activation_probability(step, STEPS) for step in range(STEPS)]
    assert p[PEFT] == [None] * STEPS


def test_blocks_without_backward_need_less_memory(result):
    runs = train.runs_of(result)
    activations = 4 * LAYERS * 2 * 8 * 32
    assert runs[ON]["peak_mean_bytes"] == runs[ON]["peak_max_bytes"] > activations
    assert runs[COTO]["peak_mean_bytes"] < runs[COTO]["peak_max_bytes"]
    assert runs[COTO]["peak_max_bytes"] == pytest.approx(runs[ON]["peak_max_bytes"], rel=0.02)
    assert runs[COTO]["peak_steps"] == STEPS


@pytest.mark.slow
def test_a_written_result_is_shown_as_it_was_printed(tmp_path, capsys):
    path, drawn = tmp_path / "results.json", tmp_path / "results.png"
    assert train.main([*TINY, "--json", str(path), "--plot", str(drawn)]) == 0
    printed = capsys.readouterr().out
    (read,) = report.read(path)
    assert printed == train.text(read) + "\n"
    assert printed.startswith(read.machine["device"])
    for words in (PEFT, ON, COTO, "where the saving comes from", "the paper reports -7.2 %", "hidden 32"):
        assert words in printed
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_without_peers_ours_is_timed_alone(capsys):
    assert train.main([*TINY, "--peers", "none"]) == 0
    printed = capsys.readouterr().out
    assert f"| {PEFT}" not in printed
    assert f"| {ON}" in printed
    assert "no comparison with the paper's saving" in printed


def test_wrong_contenders_are_refused_and_not_timed(monkeypatch, capsys):
    right = cotolora.CoToLoRALinear.scale.fget
    monkeypatch.setattr(cotolora.CoToLoRALinear, "scale", property(lambda layer: 1.001 * right(layer)))
    assert train.main(TINY) == 1
    printed = capsys.readouterr().out
    for name in (ON, COTO):
        assert f"- not measured: {name} (before the clock): " in printed
        assert f"| {name}" not in printed
    assert f"| {PEFT}" in printed
    assert "is off by" in printed
    assert "no comparison with the paper's saving" in printed


def test_a_single_wrong_adapter_is_refused(options):
    base = llama.llama(options)
    judge, runner = llama.Judge(base, options), llama.ours(ON, base, options)
    judge.check(runner)
    list(cotolora.adapters(runner.model).values())[-1].alpha *= 1.001
    with pytest.raises(RefusedError, match="a gradient is off by"):
        judge.check(runner)


def test_an_error_in_a_small_gradient_is_found_beside_a_large_one(options):
    judge, large, small = llama.Judge(llama.llama(options), options), torch.full((4,), 1e9), torch.ones(4)
    judge.hold("a gradient", [large, small], [large, small], [large, small])
    with pytest.raises(RefusedError, match="a gradient is off by 1 of its norm"):
        judge.hold("a gradient", [large, 2 * small], [large, small], [large, small])


def test_gates_that_do_not_switch_are_refused(options, monkeypatch):
    base = llama.llama(options)
    judge, runner = llama.Judge(base, options), llama.ours(COTO, base, options, coto=True)
    judge.check(runner)
    monkeypatch.setattr(cotolora.CoToLoRALinear, "forward", lambda layer, x: plain(layer, x))

    def plain(layer, x):
        return x @ layer.weight.T + layer.scale * (x @ layer.lora_a.T) @ layer.lora_b.T

    with pytest.raises(RefusedError, match="gives a gradient of A of "):
        judge.check(runner)


def test_peft_must_be_correct_too(options):
    base = llama.llama(options)
    judge = llama.Judge(base, options)
    judge.check(judge.own)
    for layer in judge.own.model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] *= 1.01
    with pytest.raises(RefusedError, match="is off by"):
        judge.check(judge.own)


def test_adapters_on_other_linears_are_refused(options):
    base = llama.llama(options)
    judge, runner = llama.Judge(base, options), llama.ours(ON, base, options)
    del runner.adapters["model.layers.0.mlp.up_proj"]
    with pytest.raises(RefusedError, match=r"differ from PEFT's at \['model.layers.0.mlp.up_proj'\]"):
        judge.check(runner)


def test_contenders_share_weights_and_have_equal_factors():
    options = train.parse([*TINY, "--dtype", "bfloat16"])
    made = report.Result("train", {}, {})
    runners = train.runners_of(made, options)
    assert not made.refused
    assert [r.name for r in runners] == [PEFT, NARROW, ON, COTO]
    factors = [{n: (x.a, x.b) for n, x in r.adapters.items()} for r in runners]
    assert [next(iter(f.values()))[0].dtype for f in factors] == [torch.float32, torch.bfloat16] + [torch.float32] * 2
    for name, (a, b) in factors[0].items():
        assert b.any()
        for other in factors[1:]:
            assert torch.equal(other[name][0].float(), a)
            assert torch.equal(other[name][1].float(), b)
    frozen = [{p.data_ptr() for p in r.model.parameters() if not p.requires_grad} for r in runners]
    assert all(pointers == frozen[0] for pointers in frozen)
    trained = [{p.data_ptr() for p in r.model.parameters() if p.requires_grad} for r in runners]
    assert len(set().union(*trained)) == sum(map(len, trained))


def test_contenders_take_turns_on_the_same_tokens_and_masks_and_steps_count_with_their_median(monkeypatch):
    options = train.parse([*TINY, "--repeats", "3"])
    base, seen = llama.llama(options), []

    def step(runner, tokens):
        at = runner.coto.current_step if runner.coto else None
        seen.append((runner.name, at, tokens.tolist(), [a.on() for a in runner.adapters.values()]))
        if runner.coto:
            runner.coto.step()
        # the second of three repeats takes far longer
        repeat = (len(seen) - 1 - 3) // (3 * STEPS)
        return tuple(part * (1, 100, 2)[repeat] for part in (6.0, 1.0, 2.0, 3.0))

    monkeypatch.setattr(llama.Runner, "step", step)
    runners = [build(name, base, options) for name, build in llama.contenders_of(options).items()]
    courses = train.race(runners, options)
    warm, timed = seen[:3], seen[3:]
    assert all(all(on) for *_, on in warm)
    assert len(timed) == 3 * 3 * STEPS
    of_coto = []
    for i in range(0, len(timed), 3):
        turn = timed[i : i + 3]
        assert {name for name, *_ in turn} == {PEFT, ON, COTO}
        assert turn[0][2] == turn[1][2] == turn[2][2]
        of_coto += [(at, on) for name, at, _, on in turn if name == COTO]
    assert {name for name, *_ in timed[::3]} == {PEFT, ON, COTO}
    assert [at for at, _ in of_coto] == 3 * list(range(STEPS))
    assert [on[:: len(on) // LAYERS] for _, on in of_coto] == 3 * masks().tolist()
    assert len({str(tokens) for _, _, tokens, _ in timed}) == STEPS
    assert courses[ON].steps() == [12.0] * STEPS
    assert courses[ON].steps(2) == [4.0] * STEPS


def test_a_run_that_is_not_faster_is_reported():
    def notes(peft, on, coto):
        return train.remarks({n: {"mean_s": s} for n, s in ((PEFT, peft), (ON, on), (COTO, coto))})

    assert len(notes(1.0, 0.95, 0.9)) == 1
    assert "-10.0 % over PEFT as shipped and -5.3 % over ours always on" in notes(1.0, 0.95, 0.9)[0]
    assert notes(1.0, 0.98, 0.93)[1:] == ["ours with CoTo does NOT reach the paper's -7.2 % over PEFT: -7.0 %"]
    assert notes(1.0, 0.9, 0.91)[1:] == ["ours with CoTo is NOT faster than ours always on: +1.1 %"]
    assert "does NOT reach" in notes(1.0, 1.0, math.nan)[1]


def test_savings_are_in_percent_of_pefts_step():
    def row(*phases):
        return {"mean_s": sum(phases)} | {f"{phase}_s": s for phase, s in zip(PHASES, phases, strict=True)}

    shown = train.saving({PEFT: row(4.0, 5.0, 1.0), ON: row(3.0, 4.5, 1.0), COTO: row(3.0, 3.0, 1.2)})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()[2:]]
    assert lines == [
        [f"{PEFT} → {ON}", "-10.0", "-5.0", "+0.0", "-15.0"],
        [f"{ON} → {COTO}", "+0.0", "-15.0", "+2.0", "-13.0"],
        [f"{PEFT} → {COTO}", "-10.0", "-20.0", "+2.0", "-28.0"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: must be a positive integer; got '0'"),
        (["--rank", "x"], "argument --rank: must be a positive integer; got 'x'"),
        (["--repeats", "1.5"], "argument --repeats: must be a positive integer; got '1.5'"),
        (["--seed", "-1"], "argument --seed: must be an integer of at least 0; got '-1'"),
        (["--shapes", "huge"], "argument --shapes: invalid choice: 'huge'"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--device", "tpu"], "argument --device: must be cpu, cuda or cuda:N; got 'tpu'"),
        (["--device", "cpu", "--hidden", "20"], "argument --hidden: must be a multiple of 16; got 20"),
        (["--tokens", "1"], "argument --tokens: must be at least 2 for next-token prediction; got 1"),
        (["--json", "no/such/folder.json"], "argument --json: "),
        (["--plot", "no/such/folder.png"], "argument --plot: "),
        (["--peers", "unsloth"], "argument --peers: invalid choice: 'unsloth'"),
        (["--peers", "none", "peft"], "argument --peers: none excludes all others; got none peft"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(report, "version_of", lambda module: "absent" if module == "peft" else "1")
    with pytest.raises(SystemExit):
        train.main(TINY)
    assert 'peft is not installed, but train compares with PEFT: pip install "peft"' in capsys.readouterr().err
