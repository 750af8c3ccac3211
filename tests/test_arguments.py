"""Invalid values for every argument of every public name: the error names the argument, and nothing changes."""

import inspect

import pytest
import torch
from torch import nn

import cotolora
from cotolora import connectivity, lora_pro, merging, pruning, shapley
from cotolora.functional import add_low_rank
from tests.support import arguments as of
from tests.support.arguments import POOL, World, flag, integers, maybe, nothing, numbers

# classes that users do not create
MADE = {"Shapley", "InterpolationCurve", "DropoutStability", "Pruning"}
CALLED = {"CoToCallback", "CoToLightningCallback"}


def public(module):
    """The public functions and classes of a module by name, with the methods and settable properties of the classes."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
        if not callable(value := getattr(module, name)):
            continue
        if name not in MADE:
            yield name, value
        for key, member in vars(value).items() if inspect.isclass(value) and name not in CALLED else ():
            if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, classmethod)):
                yield f"{name}.{key}", getattr(value, key)
            if isinstance(member, property) and member.fset:
                yield f"{name}.{key}=", member.fset


MODULES = (cotolora, merging, pruning, shapley, connectivity, lora_pro)
NAMES = {name: value for module in MODULES for name, value in public(module)} | {"add_low_rank": add_low_rank}
NAMES |= {f"CoToLoRALinear.{name}=": None for name in ("alpha", "dropout", "init", "rank", "use_rslora", "variant")}
# names that need another library
FOREIGN = {
    "CoToCallback": "transformers", "CoToLightningCallback": "lightning", "from_peft": "peft", "to_peft": "peft"
}  # fmt: skip
# objects whose methods are called
OWNERS = {
    "CoTo": "coto", "CoToLoRALinear": "layer", "Schedule": "schedule", "AdapterState": "state", "Factors": "factors",
    "Pruning": "pruning",
}  # fmt: skip


def ones(*shape):
    return lambda world: torch.ones(*shape)


FACTOR_A, FACTOR_B = (of.float8, ones(2, 4)), (of.float8, ones(4, 2))
PROBABILITY = numbers(lambda p: 0 <= p <= 1)
UNIT_INTERVAL = numbers(lambda share: 0 < share <= 1)
SIZE = integers(1, 10**9)
# by argument: the predicate of valid values, and a valid value; then exceptions for single names
ARGUMENTS = {
    "a": FACTOR_A,
    "adapter": (of.peft_name, lambda world: "default"),
    "alpha": (numbers(), lambda world: 4),
    "alpha_pattern": (maybe(of.empty), lambda world: {"0": 3.0}),
    "at_least_one": (flag, lambda world: False),
    "available": (maybe(nothing), lambda world: [True, False, True]),
    "b": FACTOR_B,
    "backend": (maybe(nothing), lambda world: "addmm"),
    "batch": (integers(1, 2**63), lambda world: 4),
    "other_tensors": (of.empty, lambda world: {"head": torch.ones(2)}),
    "bias": (flag, lambda world: False),
    "check_every": (integers(0), lambda world: 2),
    "count": (integers(1, 4), lambda world: 1),
    "density": (UNIT_INTERVAL, lambda world: 0.5),
    "device": (of.device, lambda world: "cpu"),
    "directory": (of.path, lambda world: world.saved),
    "drop": (numbers(lambda p: 0 <= p < 1), lambda world: 0.5),
    "dropout": (PROBABILITY, lambda world: 0.5),
    "dtype": (of.float32, lambda world: torch.float64),
    "exclude": (maybe(of.names), lambda world: ["1"]),
    "extra": (of.empty_list, lambda world: ()),
    "factors": (nothing, lambda world: world.state.factors),
    "fn": (of.function, lambda world: lambda output: output.sum()),
    "gate": (of.gate, lambda world: True),
    "groups": (of.empty_list, lambda world: []),
    "gates": (nothing, lambda world: "device"),
    "grad_a": FACTOR_A,
    "grad_b": FACTOR_B,
    "in_features": (SIZE, lambda world: 4),
    "init": (nothing, lambda world: "gaussian"),
    "initial_p": (PROBABILITY, lambda world: 0.2),
    "input": (nothing, ones(3, 4)),
    "inputs": (of.inputs, ones(5, 4)),
    "iterations": (integers(1, 2**63, tried=10), lambda world: 3),
    "keep": (of.function, lambda world: "every-other"),
    "kept": (of.fields, lambda world: {"task_type": None}),
    "layer_or_shapes": (nothing, lambda world: (2, 4, 4, 2)),
    "like": (nothing, lambda world: world.model),
    "linear": (nothing, lambda world: world.plain[0]),
    "lora_a": FACTOR_A,
    "lora_b": FACTOR_B,
    "lr": (numbers(lambda lr: lr > 0), lambda world: 1e-3),
    "magnitude": (nothing, ones(4)),
    "mask": (of.mask, lambda world: [1, 0, 1]),
    "max_condition": (numbers(lambda limit: limit >= 1), lambda world: 2.0),
    "merge": (flag, lambda world: False),
    "method": (nothing, lambda world: "exact"),
    "model": (nothing, lambda world: world.model),
    "models": (nothing, lambda world: [world.model, world.plain]),
    "n": (integers(0, 2**32), lambda world: 3),
    "of": (nothing, lambda world: "products"),
    "onto": (of.path, lambda world: world.model),
    "optimizer": (nothing, lambda world: world.optimizer),
    "out_features": (SIZE, lambda world: 4),
    "p": (PROBABILITY, lambda world: 0.5),
    "points": (integers(2, 2**63, tried=10), lambda world: 2),
    "ramp": (UNIT_INTERVAL, lambda world: 0.5),
    "rank": (SIZE, lambda world: 2),
    "rank_pattern": (maybe(of.empty), lambda world: {"0": 3}),
    "ratio": (numbers(lambda ratio: ratio > 0), lambda world: 4),
    "reweight": (flag, lambda world: False),
    "rows": (maybe(integers(0, 2**63)), lambda world: 2),
    "samples": (integers(2), lambda world: 4),
    "save": (flag, lambda world: False),
    "save_base": (flag, lambda world: False),
    "scale": (numbers(), lambda world: 0.5),
    "schedule": (maybe(nothing), lambda world: world.schedule),
    "scope": (nothing, lambda world: "layer"),
    "score": (of.function, lambda world: lambda model: 1.0),
    "seed": (integers(0, 2**64), lambda world: 3),
    "shape": (nothing, lambda world: "sine"),
    "shapley": (nothing, lambda world: world.shapley),
    "sparsity": (PROBABILITY, lambda world: 0.5),
    "spec": (nothing, lambda world: world.layer.spec),
    "state": (of.path, lambda world: world.model),
    "state_a": (of.path, lambda world: world.state),
    "state_b": (of.path, lambda world: world.state),
    "states": (of.states, lambda world: [world.state, world.model]),
    "step": (integers(0, 2**64), lambda world: 3),
    "strict": (flag, lambda world: False),
    "targets": (of.names, lambda world: ["0"]),
    "task_type": (maybe(nothing), lambda world: "FEATURE_EXTRACTION"),
    "tensors": (nothing, lambda world: {"0.lora_A.weight": torch.ones(2, 4), "0.lora_B.weight": torch.ones(4, 2)}),
    "tilt": (numbers(lambda tilt: -1 <= tilt <= 1), lambda world: 0.5),
    "total_steps": (integers(1), lambda world: 10),
    "trainable": (of.names, lambda world: ["1"]),
    "unit": (of.hashing, lambda world: "module"),
    "use_rslora": (flag, lambda world: True),
    "variant": (nothing, lambda world: "hira"),
    "weight": (nothing, ones(4, 4)),
    "weights": (of.weights, lambda world: [0.5, 0.25]),
    "x": (nothing, ones(3, 4)),
    "y": (nothing, ones(3, 4)),
}  # fmt: skip
MAYBE_SIZE = (maybe(integers(1, 2**63)), lambda world: 2)
SEED = (integers(-(2**63), 2**64), lambda world: 3)
ANY_STEP = (integers(0), lambda world: 3)
ANY_MODEL = (of.module, lambda world: world.model)
ANY_UNIT = (of.function, lambda world: "module")
PLAIN = (of.other_module, lambda world: world.plain)
OVERRIDES = {
    "AdapterState.from_tensors.alpha": (numbers(), lambda world: 4),
    "AdapterState.applied_to.model": (of.other_module, lambda world: world.model),
    "AdapterState.from_tensors.like": (of.other_module, lambda world: world.model),
    "AdapterState.load_into.model": PLAIN,
    "CoToCallback.unit": ANY_UNIT,
    "CoToLightningCallback.unit": ANY_UNIT,
    "CoToLoRALinear.rank": (integers(1, 2**63, tried=10**9), lambda world: 2),
    "CoTo.load_state_dict.state": (nothing, lambda world: world.coto.state_dict()),
    "CoToLoRALinear.rank=.value": (integers(1, 2**63), lambda world: 2),
    "CoToLoRALinear.bias": (flag, lambda world: False),
    "CoToLoRALinear.device": (maybe(of.device), lambda world: "cpu"),
    "CoToLoRALinear.dtype": (maybe(of.float32), lambda world: torch.float64),
    "CoToLoRALinear.enabled=.value": (of.gate, lambda world: True),
    "CoToLoRALinear.gate=.value": (of.gate, lambda world: True),
    "PerSample.fn": (of.output_function, lambda world: lambda output: output.sum()),
    "Schedule.probability.step": ANY_STEP,
    "activation_probability.step": ANY_STEP,
    "adapter_parameters.model": ANY_MODEL,
    "add_low_rank.dropout": (of.python(PROBABILITY), lambda world: 0.5),
    "add_low_rank.scale": (of.python(numbers()), lambda world: 0.5),
    "coto_lora_linear.dropout": (of.python(PROBABILITY), lambda world: 0.5),
    "coto_lora_linear.scale": (of.python(numbers()), lambda world: 0.5),
    "add_low_rank.variant": (nothing, lambda world: "lora"),
    "adapters.model": ANY_MODEL,
    "adjusted.scale": (numbers(lambda scale: scale != 0), lambda world: 0.5),
    "coto_lora_linear.bias": (maybe(nothing), ones(4)),
    "dare.rank": MAYBE_SIZE,
    "dare.seed": SEED,
    "from_peft.adapter": (maybe(nothing), lambda world: "default"),
    "from_peft.model": (nothing, lambda world: world.peft),
    "inject.model": PLAIN,
    "interpolation_curve.model": (of.other_module, lambda world: world.model),
    "lego.rank": (integers(1, 2**63), lambda world: 3),
    "lego.seed": SEED,
    "load_adapter.model": PLAIN,
    "mix.rank": MAYBE_SIZE,
    "shapley_values.samples": (integers(4, 2**63, tried=10), lambda world: 4),
    "ties.rank": MAYBE_SIZE,
    "trainable_report.model": ANY_MODEL,
}
# further arguments that a call needs, beside the tested one and those without a default
BESIDES = {
    "AdapterState.from_tensors.tensors": {"alpha": 4},
    "AdapterState.from_tensors.use_rslora": {"alpha": 4},
    "adapter_mask.unit": {"mask": True},
    "coto_lora_linear.magnitude": {"variant": "dora"},
    "dare.rank": {"of": "products"},
    "ties.rank": {"of": "products"},
}
# arguments that errors call by another name
ALIASES = {"input": "x"}


def subject(name, world):
    """The function or class called `name`, bound to an object of `world` if it is a method."""
    owner, _, attribute = name.rpartition(".")
    if name in FOREIGN:
        module = pytest.importorskip(f"cotolora.integrations.{FOREIGN[name]}", reason="needs another library")
        return getattr(module, name)
    if attribute.endswith("="):
        layer = getattr(world, OWNERS[owner])
        return lambda value: setattr(layer, attribute[:-1], value)
    if not owner or inspect.ismethod(NAMES[name]):
        return NAMES[name]
    return getattr(getattr(world, OWNERS[owner]), attribute)


def parameters(name):
    return inspect.signature(subject(name, World())).parameters


def entry(name, argument):
    setting = f"{name[:-1].rpartition('.')[2]}" if name.endswith("=") else argument
    return OVERRIDES.get(f"{name}.{argument}") or ARGUMENTS[setting]


def call_without(name, argument, world):
    """A call of `name` with all arguments but `argument`."""
    needed = [key for key, p in parameters(name).items() if p.default is p.empty and key != argument]
    given = {key: entry(name, key)[1](world) for key in needed}
    return subject(name, world), given | BESIDES.get(f"{name}.{argument}", {})


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", sorted([*NAMES, *FOREIGN]))
def test_valid_arguments_are_accepted_and_invalid_ones_named(name):
    problems = []
    for argument in parameters(name):
        kind, valid = entry(name, argument)
        world = World()
        call, given = call_without(name, argument, world)
        error = of.outcome(call, {**given, argument: valid(world)})
        assert error is None, (argument, error)
        for text, problem in judged(name, argument, kind):
            problems.append(f"{argument}={text}: {problem}")
    assert problems == []


def judged(name, argument, kind):
    """Yields the values of the pool that are treated wrongly, each with the fault."""
    called = ALIASES.get(argument, name[:-1].rpartition(".")[2] if name.endswith("=") else argument)
    world = None
    for text, make in POOL.items():
        if (right := kind(value := make())) is None:
            continue
        if world is None:
            world = World()
            call, given = call_without(name, argument, world)
            before = dict(world.states())
        error = of.outcome(call, {**given, argument: value})
        if right:
            world = None
            if error is not None:
                yield text, f"is refused: {error!r}"
        elif error is None:
            world = None
            yield text, "is taken"
        else:
            after = dict(world.states())
            changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
            yield from ((text, f"{fault} in {error!r}") for fault in of.faults(error, called, value))
            if changed:
                world = None
                yield text, f"changed {sorted(changed)}"


@pytest.mark.parametrize("key", World().coto.state_dict())
def test_a_damaged_state_of_coto_changes_nothing(key):
    world = World()
    # the state of another run, so that any part that is loaded is visible
    state = cotolora.CoTo(World().model, 20, ramp=0.5, seed=7).state_dict()
    kind = nothing if key == "groups" else entry("CoTo.load_state_dict", key)[0]
    world.coto.set_step(3)
    before, problems = dict(world.states()), []
    for text, make in POOL.items():
        if kind(value := make()) is False:
            error = of.outcome(world.coto.load_state_dict, {"state": {**state, key: value}})
            problems += [(text, fault) for fault in of.faults(error, key, value)] if error else [(text, "is taken")]
    for damaged in ({k: v for k, v in state.items() if k != key}, {**state, "x": 1}):
        with pytest.raises(ValueError, match=r"state must be a CoTo state_dict with keys"):
            world.coto.load_state_dict(damaged)
    assert problems == []
    assert dict(world.states()) == before


@pytest.mark.parametrize("name", ["scale", "merged", "active", "extra", "spec", "adapter_parameters"])
@pytest.mark.parametrize(
    "value", [nn.LayerNorm(2), nn.Parameter(torch.zeros(2)), 2.0], ids=["module", "parameter", "number"]
)
def test_computed_attributes_of_a_layer_cannot_be_assigned(name, value):
    world = World()
    layer, before = world.layer, dict(world.states())
    with pytest.raises(AttributeError, match=name):
        setattr(layer, name, value)
    assert dict(world.states()) == before


@pytest.mark.parametrize("switch", ["gate", "enabled"])
def test_a_module_is_refused_as_a_switch(switch):
    layer = World().layer
    with pytest.raises(TypeError, match=f"{switch} must be a bool or a bool or integer tensor; got LayerNorm"):
        setattr(layer, switch, nn.LayerNorm(2))
    assert switch not in layer._modules
    assert getattr(layer, switch) is True
