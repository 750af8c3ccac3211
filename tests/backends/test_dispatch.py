"""The choice of a backend, the imports it causes, and the fused backend under Triton's interpreter."""

import ast
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cotolora import CoToLoRALinear, coto_lora_linear, explain, set_backend
from cotolora.backends import choice as dispatch
from cotolora.backends import cost
from cotolora.backends.fused import common
from cotolora.backends.fused.common import MAX_RANK, has_triton
from cotolora.backends.types import Call, Sizes
from cotolora.variants import VARIANTS
from tests.support.repository import ROOT

CPU = torch.device("cpu")
LORA = VARIANTS["lora"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(
    not (INTERPRETED and has_triton()),
    reason="needs triton and TRITON_INTERPRET=1 (set if there is no GPU)",
)


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    """Resets the choice of a backend to that of a new process without environment variables."""
    monkeypatch.setattr(dispatch, "_environment", None)
    monkeypatch.setattr(dispatch, "plans", {})
    before = dispatch._set_here()
    dispatch._set(None)
    yield
    dispatch._set(before)


class Forgetful(dict):
    """A cache of plans that keeps nothing, so that every call makes its plan again."""

    def __setitem__(self, kind, plan):
        pass


@pytest.fixture
def ran(monkeypatch):
    """Collects the names of the backends that run."""
    names, choose = [], dispatch.choose

    def recorded(*args):
        names.append(choose(*args))
        return names[-1]

    monkeypatch.setattr(dispatch, "choose", recorded)
    monkeypatch.setattr(dispatch, "plans", Forgetful())
    return names


def call(dtype=torch.float32, rank=2, **kwargs):
    g = torch.Generator().manual_seed(0)
    x, weight, a, b = (torch.randn(*size, generator=g).to(dtype) for size in ((3, 6), (4, 6), (rank, 6), (4, rank)))
    return coto_lora_linear(x, weight, None, a, b, scale=0.5, **kwargs)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


# precedence


def test_precedence_is_argument_then_set_backend_then_environment_then_auto(monkeypatch, ran):
    call()
    monkeypatch.setattr(dispatch, "_environment", "reference")
    call()
    with set_backend("addmm"):
        call()
        call(backend="reference")
    call(backend="addmm")
    call(backend="auto")
    assert ran == ["addmm", "reference", "addmm", "reference", "addmm", "addmm"]


def test_auto_as_argument_overrides_set_backend(monkeypatch, ran):
    monkeypatch.setattr(dispatch, "_environment", "reference")
    with set_backend("auto"):
        call()
    with set_backend("reference"):
        call(backend="auto")
    assert ran == ["addmm", "addmm"]


def test_the_layer_follows_set_backend(ran):
    layer = CoToLoRALinear(6, 4, rank=2)
    with set_backend("reference"):
        layer(torch.ones(3, 6))
    layer(torch.ones(3, 6))
    assert ran == ["reference", "addmm"]


def test_the_environment_variable_is_read():
    backends = {"reference": "reference", "auto": "addmm", "": "addmm"}
    done = python(
        "import os, torch\n"  # once for all children
        f"for value in {list(backends)}:\n"
        "    os.environ['COTOLORA_BACKEND'] = value\n"
        "    if not (child := os.fork()):\n"
        "        import cotolora\n"
        "        print(cotolora.explain((3, 4, 5, 2)).backend, flush=True)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
    )
    assert (done.stdout.split(), done.returncode) == (list(backends.values()), 0), done.stderr


def test_a_wrong_environment_variable_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "_environment", "cuda")
    with pytest.raises(
        ValueError, match=r"environment variable COTOLORA_BACKEND must be one of 'auto', .*; got 'cuda'"
    ):
        call()
    call(backend="addmm")  # the variable is not read if a backend is given


# set_backend


def test_set_backend_as_a_call_stays():
    set_backend("reference")
    assert dispatch.requested(None) == ("reference", "set_backend")
    set_backend(None)
    assert dispatch.requested(None) == ("auto", "default")


def test_set_backend_nests_and_restores():
    set_backend("addmm")
    with set_backend("reference"):
        with set_backend("auto"):
            assert dispatch.requested(None)[0] == "auto"
            with set_backend(None):
                assert dispatch.requested(None) == ("auto", "default")
        assert dispatch.requested(None)[0] == "reference"
    assert dispatch.requested(None)[0] == "addmm"


def test_set_backend_restores_when_the_block_raises():
    with pytest.raises(KeyError), set_backend("reference"):
        raise KeyError
    assert dispatch.requested(None)[0] == "auto"


def test_set_backend_can_be_entered_again():
    choice = set_backend("reference")
    for _ in range(2):
        with choice:
            assert dispatch.requested(None)[0] == "reference"
        assert dispatch.requested(None)[0] == "auto"


def test_set_backend_holds_in_the_threads_of_autograd():
    x = torch.ones(3, 6, requires_grad=True)
    layer, seen = CoToLoRALinear(6, 4, rank=2), []
    x.register_hook(lambda _: seen.append(dispatch.requested(None)[0]))
    with set_backend("reference"):
        layer(x).sum().backward()
    assert seen == ["reference"]


def test_an_object_entered_twice_restores_the_outer_backend_each_time():
    choice = set_backend("reference")
    with choice:
        with set_backend("addmm"):
            with choice:
                assert dispatch.requested(None)[0] == "reference"
            assert dispatch.requested(None)[0] == "addmm"
        assert dispatch.requested(None)[0] == "reference"
    assert dispatch.requested(None) == ("auto", "default")


def test_overlapping_blocks_in_threads_end_separately():
    entered, left, seen = threading.Event(), threading.Event(), {}

    def other():
        seen["before"] = dispatch.requested(None)[0]
        with set_backend("addmm"):
            entered.set()
            left.wait(10)
            seen["inside"] = dispatch.requested(None)[0]
        seen["after"] = dispatch.requested(None)[0]

    thread = threading.Thread(target=other)
    with set_backend("reference"):
        thread.start()
        assert entered.wait(10)
        assert dispatch.requested(None)[0] == "reference"
    assert dispatch.requested(None) == ("auto", "default")
    left.set()
    thread.join()
    assert seen == {"before": "auto", "inside": "addmm", "after": "auto"}
    assert dispatch.requested(None) == ("auto", "default")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_uses_the_backend_set_where_backward_is_called(ran, use_reentrant):
    layer, x = CoToLoRALinear(6, 4, rank=2), torch.ones(3, 6, requires_grad=True)
    with set_backend("reference"):
        checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert ran == ["reference"] * 2


class Nested(torch.autograd.Function):
    """Calls backward in its backward, nested `depth` times; deeply nested, the engine continues in its own threads."""

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.detach()

    @staticmethod
    def backward(ctx, dy):
        ctx.seen.add((threading.get_ident(), dispatch.requested(None)[0]))
        if ctx.depth:
            with torch.enable_grad():
                Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.seen).backward()
        return dy, None, None


def test_the_choice_reaches_the_threads_of_the_autograd_engine():
    seen = set()
    with set_backend("reference"):
        Nested.apply(torch.ones(1, requires_grad=True), 100, seen).backward()
    assert len({thread for thread, _ in seen}) > 1
    assert {name for _, name in seen} == {"reference"}


@pytest.mark.parametrize("name", ["cuda", "Reference", "", 1, True])
def test_unknown_names_are_refused_and_change_nothing(name):
    every = "'auto', 'auto:captured', 'reference', 'addmm', 'triton', 'triton:one_pass', 'triton:low_rank_gemm', "
    message = rf"backend must be one of {every}'triton:pre_expand', 'triton:hira'; got {name!r}"
    with set_backend("reference"):
        for ask in (set_backend, lambda name: call(backend=name), lambda name: explain((1, 2, 3, 4), backend=name)):
            with pytest.raises(ValueError, match=message):
                ask(name)
        with pytest.raises(ValueError, match=message):
            call(backend=name, gate=False)
        assert dispatch.requested(None)[0] == "reference"


# the choice of auto


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_auto_takes_addmm(device, dtype):
    assert dispatch.choose(None, Call(LORA, torch.device(device), dtype, 500, 0.5, 64, 256, 256)) == "addmm"


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", cost.MACHINES)
def test_auto_uses_no_fused_kernel_for_unmeasured_float32(arch, variant, captured):
    for sizes in (Sizes(m, n, k, r, 4) for m in (1, 512, 8192) for n, k in ((768, 768), (4096, 4096)) for r in (8, 64)):
        call = sizes.call(VARIANTS[variant])
        rows = [sizes._replace(element_size=size)._asdict() for size in (2, 4)]
        form = next(iter(LORA.fused))
        bfloat16, float32 = ({**row, "captured": captured, "seconds": {"addmm": 2.0, form: 1.0}} for row in rows)
        assert dispatch.fastest(call, arch, captured=captured, table=(bfloat16,))[0] == "addmm"
        fused = variant == "lora"  # the only variant that tune measures
        name, _ = dispatch.fastest(call, arch, captured=captured, table=(bfloat16, float32))
        assert name == (f"triton:{form}" if fused else "addmm")


@pytest.mark.parametrize(
    ("variant", "captured", "sizes"), [("lora", False, 0), ("lora", True, 6), ("dora", False, 24), ("hira", False, 15)]
)
def test_the_model_predicts_a_gain_where_the_page_on_benchmarks_says_so(variant, captured, sizes):
    features = [(768, 768), (4096, 4096), (4096, 14336), (14336, 4096)]
    found = []
    for m in (1, 16, 64, 2048, 8192, 16384):
        for k, n in features:
            call = Sizes(m, k, n, 16).call(VARIANTS[variant])
            if dispatch.fastest(call, "sm_90", captured=captured)[0] != "addmm":
                found.append((m, k, n))
    assert len(found) == sizes
    if captured:
        assert {k for _, k, _ in found} == {768}


def test_auto_takes_the_reference_in_float64_and_under_transforms(ran):
    call(torch.float64)
    call(torch.float64, backend="addmm")
    torch.func.vmap(lambda x: coto_lora_linear(x, x[None], None, x[None], x[:1, None], scale=1.0))(torch.ones(2, 6))
    assert ran == ["reference", "addmm", "reference"]


def test_a_backend_asked_for_by_name_lists_every_reason(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(common, "_triton", False)
    with pytest.raises(RuntimeError) as raised:
        call(torch.float64, rank=300, dropout=0.5, backend="triton")
    assert str(raised.value) == (
        "backend='triton' cannot run this call:\n"
        "  - triton is not installed\n"
        "  - x is on cpu, not cuda (on a CPU only under TRITON_INTERPRET=1)\n"
        "  - dtype torch.float64 is not float32, float16 or bfloat16\n"
        "  - rank 300 exceeds 256"
    )
    with set_backend("triton"), pytest.raises(RuntimeError, match=r"(?s)backend='triton' cannot run.*x is on cpu"):
        call()


def test_a_backend_that_can_run_has_no_reason_against_it():
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert dispatch.why_not("reference", Call(LORA, CPU, dtype, 1000, 0.5)) == []
        assert dispatch.why_not("addmm", Call(LORA, CPU, dtype, 1000, 0.5)) == []
    if has_triton() and INTERPRETED:
        assert dispatch.why_not("triton", Call(LORA, CPU, torch.float16, MAX_RANK, 0.5)) == []


# explain


def test_explain_says_what_runs_and_why_the_others_do_not(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    plan = explain((7, 6, 4, 2), dtype=torch.bfloat16)
    assert plan.backend == "addmm"
    assert plan.reason == dispatch.auto(Call(LORA, CPU, torch.bfloat16, 2))[1]
    assert set(plan.others) == {"reference", "triton"}
    assert plan.others["reference"] == ("can run",)
    assert str(plan).splitlines() == [
        f"rows 7, 6 -> 4, rank 2, bfloat16 on cpu: addmm ({plan.reason})",
        "  forward: 3 launches: linear 0.00 MB, addmm 0.00 MB, addmm_ 0.00 MB",
        "  backward: 5 launches: mm 0.00 MB, addmm 0.00 MB, mm 0.00 MB, mm 0.00 MB, addmm_ 0.00 MB",
        "  saved for backward: 0.00 MB in addition to x",
        "  reference: can run",
        f"  triton: {'; '.join(plan.others['triton'])}",
    ]
    assert "x is on cpu" in str(plan)


def test_explain_agrees_with_what_runs(ran):
    for dtype in (torch.float32, torch.float64):
        for name in (None, "auto", "reference", "addmm"):
            call(dtype, backend=name)
            assert ran[-1] == explain((3, 6, 4, 2), dtype=dtype, backend=name).backend


def test_explain_of_a_call_that_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    plan = explain((7, 6, 4, 300), backend="triton")
    assert plan.backend is None
    assert "cannot run (requested by the backend argument, but" in str(plan)
    assert "rank 300 exceeds 256" in plan.reason
    assert set(plan.others) == {"reference", "addmm"}
    with set_backend("reference"):
        assert explain((7, 6, 4, 2)).reason == "requested by set_backend"


def test_explain_takes_a_layer():
    layer = CoToLoRALinear(6, 4, rank=2, dropout=0.5, dtype=torch.float64)
    plan = explain(layer)
    assert plan.backend == "reference"
    assert "6 -> 4, rank 2, float64 on cpu" in str(plan)
    assert plan.saved_bytes is None
    layer = layer.float()
    # h, and a dropout mask of one byte per entry
    assert explain(layer, rows=5).saved_bytes == 5 * 2 * 4 + 5 * 6
    assert explain(layer.eval(), rows=5).saved_bytes == 5 * 2 * 4
    assert explain(layer).saved_bytes is None
    with pytest.raises(ValueError, match="rows must be an integer of at least 0; got -1"):
        explain(layer, rows=-1)
    assert explain(CoToLoRALinear(6, 4, device="meta")).call.endswith("on meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks about a machine without CUDA")
def test_explain_for_a_missing_gpu():
    plan = explain((8192, 768, 768, 16), dtype=torch.bfloat16, device="cuda")
    assert plan.backend == "addmm"
    assert "this machine has no CUDA device" in plan.reason
    assert len(plan.forward) == 3
    assert explain((8192, 768, 768, 16), device="cuda", backend="triton").backend is None


@interpreter
def test_explain_of_a_fused_form():
    plan = explain((100, 64, 48, 16), backend="triton:low_rank_gemm")
    assert (plan.backend, plan.form) == ("triton", "low_rank_gemm")
    assert [launch.kernel for launch in plan.forward] == ["shrink", "low_rank_gemm"]
    # x, A and h; then x, W, y, h and B
    sizes = (100 * 64 + 16 * 64 + 100 * 16, 100 * 64 + 48 * 64 + 100 * 48 + 100 * 16 + 48 * 16)
    assert tuple(launch.bytes for launch in plan.forward) == tuple(4 * size for size in sizes)
    assert plan.saved_bytes == 4 * 100 * 16
    assert "triton as low_rank_gemm" in str(plan)
    assert "forward: 2 launches: shrink 0.04 MB" in str(plan)


@pytest.mark.parametrize("bad", [(1, 2, 3), (1.5, 2, 3, 4), "1234", None, 5, torch.nn.Linear(2, 3)], ids=str)
def test_explain_refuses_wrong_types(bad):
    with pytest.raises(TypeError, match="layer_or_shapes must be a CoToLoRALinear or"):
        explain(bad)


@pytest.mark.parametrize("bad", [(-1, 2, 3, 4), (1, -2, 3, 4), (1, 2, 3, 0)], ids=str)
def test_explain_refuses_impossible_sizes(bad):
    with pytest.raises(ValueError, match="none negative and rank at least 1; got"):
        explain(bad)


# imports


@pytest.mark.parametrize("name", ["addmm", None])
def test_setting_a_backend_keeps_its_reference_to_the_name(name):
    """Torch 2.11 releases a reference that it does not own; a name freed while in use crashes the process."""
    before = sys.getrefcount(name)
    for _ in range(1000):
        set_backend(name)
    assert sys.getrefcount(name) > before - 100
    set_backend(None)


def test_importing_cotolora_loads_nothing_heavy():
    done = python(
        "import sys, torch\n"
        "torchs = set(sys.modules)\n"  # torch.hub imports tqdm if it is installed
        "heavy = {'triton', 'transformers', 'matplotlib', 'sklearn', 'tqdm', 'peft', 'lightning'}\n"
        "heavy.add('cotolora.backends.fused.ops')\n"
        "import cotolora\n"
        "loaded = set(sys.modules) - torchs\n"
        "assert not loaded & heavy, loaded & heavy\n"
        # so that a checkout in which the symlink became a text file can still be imported
        "kernels = {name for name in loaded if name.startswith('cotolora.kernels.')}\n"
        "assert not kernels, kernels\n"
        "x, a, b = torch.ones(3, 4), torch.ones(2, 4), torch.ones(5, 2)\n"
        "cotolora.coto_lora_linear(x, torch.ones(5, 4), None, a, b, scale=1.0)\n"
        "assert cotolora.explain((3, 4, 5, 2)).backend == 'addmm'\n"
        "assert not (set(sys.modules) - torchs) & {'triton', 'cotolora.backends.fused.ops'}\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert done.returncode == 0, done.stderr


# lowest level first; a module may import only from lower levels
FLOORS = [
    {"wording", "syntax", "training.callers"},
    {
        "reference",
        "results",
        "training.stepping",
        "training.unreached",
        "training.agreement",
        "training.outputs",
        "training.optimizer_state",
        "saving.experts",
        "saving.files",
        "saving.old_names",
    },
    {"checks", "backends.types", "backends.addmm.products", "training.reducer", "training.entry"},
    {"operands", "patterns"},
    {"schedule", "matching", "backends.cost", "backends.measured", "backends.addmm.stacked"},
    {*(f"backends.addmm.{name}" for name in VARIANTS), "backends.fused.common", "backends.off"},
    {"backends.fused.stacked"},
    {"backends.fused.lora"},
    {"backends.fused.dora", "backends.fused.hira", "backends.fused.ops"},
    {"variants.base", "variants.starts"},
    {f"variants.{name}" for name in VARIANTS},
    {"variants"},
    {"backends.choice", "bases", "spec", "saving.shapes"},
    {"backends.autograd", "backends.explain"},
    {"functional", "backends.stacked"},
    {"parameters"},
    {"weights"},
    {"linear"},
    {"groups", "stacked_layers"},
    {"stacked_calls"},
    {"coverage", "targets", "hooks", "quantised", "stacking"},
    {"masks", "training.switches", "inject", "lora_pro", "saving.places"},
    {"training.notices"},
    {"coto", "saving.peft_config"},
    {"saving.fitting"},
    {"saving.filling"},
    {"saving.adapter"},
    {"merging.kmeans", "merging.states", "saving.stand_in"},
    {"merging.combining", "saving.contents"},
    {"merging.alignment", "merging.ensembles"},
    {"merging", "shapley"},
    {"pruning", "connectivity"},
    {"integrations.peft", "integrations.transformers", "integrations.lightning"},
    {"__init__", "backends", "backends.addmm", "backends.fused", "saving", "training", "integrations", "commands"},
    {"commands.arguments", "commands.layers", "commands.report"},
    {"commands.description", "commands.merge_directories"},
    {"commands.plot"},
    {"commands.inspect_directory"},
    {"commands.main"},
    {"demo", "__main__"},
]
MODULES = sorted(p for p in (ROOT / "cotolora").rglob("*.py") if "kernels" not in p.relative_to(ROOT).parts)
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {inner for block in blocks for inner in ast.walk(block)}  # under TYPE_CHECKING, never executed
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            for alias in node.names:
                # `from cotolora import addmm` imports a module, `from cotolora import CoTo` the package
                inside = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = inside.is_dir() or inside.with_suffix(".py").exists()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


def own(names: set[str]) -> set[str]:
    """The modules of cotolora among `names`, without the package's name; "__init__" for the package itself."""
    return {name.partition(".")[2] or "__init__" for name in names if name.split(".")[0] == "cotolora"}


def floor(module: str) -> int:
    (found,) = (i for i, names in enumerate(FLOORS) if module in names)
    return found


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "cotolora").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_import_only_from_lower_levels(path):
    name, names = name_of(path), own(imported(path))
    for other in names - {name}:
        if other.split(".")[0] == "kernels":
            # the choice asks for the architecture, by an import inside a function
            assert name.startswith("backends.fused.") or name == "backends.choice", f"{name} imports {other}"
        elif (name, other) != ("backends.fused.common", "backends.fused.ops"):  # in a function, too
            assert floor(other) < floor(name), f"{name} imports {other}"


def test_the_choice_and_autograd_name_no_variant_and_no_backend():
    for name in ("backends/choice.py", "backends/autograd.py", "backends/types.py", "functional.py", "linear.py"):
        path = ROOT / "cotolora" / name
        for other in own(imported(path)):
            backends = ("backends.addmm", "backends.fused", "variants.lora", "variants.dora", "variants.hira")
            assert not other.startswith(backends), f"{name} imports {other}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_import_only_torch_and_triton(path):
    foreign = {n for n in imported(path) if n.split(".")[0] not in {"torch", "triton", *sys.stdlib_module_names}}
    assert {name for name in foreign if not name.startswith("cotolora.kernels")} == set()


def test_kernels_is_not_a_top_level_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "cotolora" / "kernels").is_symlink()
    assert os.readlink(ROOT / "cotolora" / "kernels") == "../kernels"


# triton, interpreted


# x, out_features, rank


@interpreter
def test_triton_runs_the_layer_and_saves_little():
    layer = CoToLoRALinear(24, 20, rank=4)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 5, 24)
    with set_backend("triton"):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = layer(x)
    torch.testing.assert_close(y, layer(x))
    known = {t.data_ptr() for t in (x, *layer.parameters())}
    assert [t.shape for t in saved if t.data_ptr() not in known] == [(15, 4)]


@interpreter
def test_the_interpreter_refuses_bfloat16():
    with pytest.raises(RuntimeError, match="interpreter multiplies bfloat16 matrices wrongly"):
        call(torch.bfloat16, backend="triton")
