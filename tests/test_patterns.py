"""Untrusted regular expressions: common ones match as in `re`, those that could hang are refused.

Time limits are CPU time, so that they hold on a busy machine.
"""

import re
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cotolora import inject
from cotolora.matching import compile_patterns, first_match, matches, taking
from cotolora.patterns import LONGEST_NAME, MOST_STEPS, compiled, spelled
from cotolora.pruning import prune

NAMES = [
    "lm_head", "q_proj", "model.layers.0.self_attn.q_proj", "model.layers.15.mlp.down_proj", "h.3.mlp.c_fc",
    "model.language_model.layers.7.self_attn.v_proj", "visual.blocks.11.attn.qkv", "vision.blocks.2.mlp.fc1",
    "base_model.model.model.layers.31.self_attn.o_proj", "transformer_blocks.4.attn2.to_out.0", "model.layers.0.mlp",
    "decoder.block.1.layer.0.SelfAttention.q", "experts.3.w1", "text_model.encoder.layers.2.self_attn.k_proj",
]  # fmt: skip
UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r"\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
IN_USE = [
    ".*", ".*q_proj", r".*\.q_proj", r"model\.layers\.\d+\.mlp.*", r".*language_model.*(q|k|v)_proj",
    r".*\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj", r"^(?!.*(vision|lm_head)).*\.(q|v)_proj$",
    r"(?:.*\.)?layers\.([0-9]|1[0-5])\..*", r"^(?:(?!vision).)*q_proj$", r"(?:\w+\.)*q_proj", r"(\w+\.)*\w+",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$", r".*language_model.*layers\.\d+.*(q|v)_proj",
    r".*model.*layers.*self_attn.*(q|k|v)_proj.*", r"(?:model\.)?(?:language_model\.)?layers\.\d+\..*_proj",
    r"[^.]+\.[^.]+\.[^.]+\.[^.]+\.q_proj", r"(.+\.)?h\.\d{1,2}\.mlp(\.c_fc|\.c_proj)?", r".*(?:[qkv]_proj|fc[12])",
    r"model\.layers\.(?:1?[0-9]|2[0-3])\.(?:self_attn)\..+", r"transformer_blocks\.\d+\.(attn\d?|ff)\..*",
    r".*(?:visual|vision|image|video|audio)[^.]*\..*\.(?:attn|mlp)\..*", r"(?P<a>q|k)_proj|.*(?P=a)",
    r"^(language_model|visual)(?=\.).*(?<!lm_head)$", r"experts\.(\d+)\.w[123]", r".+\.(to_q|to_k|to_out\.0)",
    r"(?s:.*)proj", r"[\w.]*\.(?i:Q_Proj)", "lm_head|q_proj", "model.layers.0.mlp|h.3.mlp.c_fc",
    r"model\.layers\.0\.mlp",
]  # fmt: skip
SLOW = [
    r"(\w+\.?)+!", r"([a-z0-9_.]+)+!", r"(.|[a-z])*!", r"(a+)+$", r"(a|aa)+$", r"(.*)*x", r"(.*,)*x", r"(\w*\.*)*!",
    ".*.*.*.*x", ".*" * 9 + "!", "a?" * 40 + "a" * 40, "(a|ab)" * 30, r"(?:(?:a*)*)*b", r"([a-z]+|\d+)+!",
    r"(?=(\w+)+!).*", r"(?!(.*.*.*.*)x).*", r"(?<!x)(\w+\.?)+!", r"(\w{1,10}){1,20}!", r"(.?){60}x", r"(\w\w?){30}x",
    r"(.*)(.*)(.*)(.*)\4", r"(.*)*\1", r".*\w*.*\w*x", r"(?:.+.+)+x", r"(x)?(?(1)(\w+)+|(\w+)+)!", r"(?i)((a|A)+)+x",
    r"(?:a|b|ab)*c", r"((\w+)\.?){3,}x", r"(?:\d*\d*)*\w*!", r"(?:(\w+)|([a-z]+\.))*?!",
]  # fmt: skip


@pytest.mark.parametrize("expression", [*IN_USE, UNSLOTH])
def test_expressions_in_use_match_as_re_does(expression):
    takes = taking("targets", expression)
    assert [takes(name) for name in NAMES] == [re.fullmatch(expression, name) is not None for name in NAMES]
    assert any(map(takes, NAMES))
    if expression is not UNSLOTH:
        patterns = compile_patterns("rank_pattern", {"nothing": 1, expression: 2})
        found = [re.match(rf"(.*\.)?({expression})$", name) is not None for name in NAMES]
        assert [first_match(patterns, name, None) == 2 for name in NAMES] == found


@pytest.mark.parametrize("expression", SLOW)
def test_an_expression_that_could_hang_is_refused_by_the_name_of_its_argument(expression):
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    for options in (
        {"targets": expression},
        {"targets": ["first"], "exclude": expression},
        {"targets": ["first"], "trainable": expression},
        {"rank_pattern": {"first": 2, expression.removeprefix("(?i)"): 2}},
        {"alpha_pattern": {expression.removeprefix("(?i)"): 2}},
    ):
        began = time.process_time()
        argument = list(options)[-1]
        with pytest.raises(
            ValueError, match=rf"^{argument} must hold regular expressions that can be matched in bounded"
        ):
            inject(model, **options)
        assert time.process_time() - began < 5
    inject(model)
    with pytest.raises(ValueError, match=r"^keep must hold regular expressions that can be matched in bounded time"):
        prune(model, expression)


# names that cause the most backtracking: many places where each repeat may end, and no match
WORST = {
    ".*.*.*x": "a" * 199 + "!",
    ".*?.*?.*?x": "a" * 199 + "!",
    UNSLOTH: ("text" * 17 + "mlp" * 22 + "fc1" * 22)[:199] + "\n",
    r".*\..*\..*\..*\.q_proj": "a." * 99 + "q_",
    r".*model.*layers.*self_attn.*(q|k|v)_proj.*!": ("model" * 10 + "layers" * 8 + "self_attn" * 5 + "q_proj" * 8)[
        :199
    ],
    r"(\w+\.)*(\w+\.)*(\w+\.)*x": "a." * 100,
    r"(?=.*.*x)(?=.*.*y)(?=.*.*z).*": "a" * 200,
    r"(a|ab)(a|ab)(a|ab)(a|ab)(a|ab)(a|ab)(a|ab)(a|ab)x": "ab" * 100,
    r"(\.|\w)*(\w|\.)*(\w|\.)*!": "a" * 200,
    r"[^.]*\.?[^.]*\.?[^.]*!": "a" * 200,
}


@pytest.mark.parametrize("expression", WORST)
def test_accepted_expressions_take_bounded_time_on_the_worst_names(expression):
    began = time.process_time()
    assert not taking("targets", expression)(WORST[expression])
    assert time.process_time() - began < 5


def test_expressions_of_one_argument_are_bounded_together():
    one = r".*a000.*(q|k)x.*"
    steps = compiled("rank_pattern", one, r"(.*\.)?(", ")$")[1]
    assert steps < MOST_STEPS
    many = {one.replace("000", f"{i:03}"): 1 for i in range(100)}
    with pytest.raises(ValueError, match=r"rank_pattern must hold .* that take too long together: .* more$"):
        compile_patterns("rank_pattern", many)
    with pytest.raises(ValueError, match="rank_pattern must hold at most 1000 regular expressions"):
        compile_patterns("rank_pattern", {f"a{i}.*": 1 for i in range(1001)})
    names = {f"model.layers.{i}.q_proj": 1 + i for i in range(20_000)}  # as in PEFT's files, with unescaped dots
    assert first_match(compile_patterns("rank_pattern", names), "model.layers.777.q_proj", None) == 778


HUGE = {
    "letters": "a" * 49_000 + ".*",
    "groups": "(?:a)" * 9000,
    "options": "(?:ab)?" * 7000,
    "alternatives": "(" + "|".join(f"a{i}.*" for i in range(5000)) + ")",
    "alternatives-in-each-other": "(?:a.|b.|c.)(?:aa|bb|cc)" * 1500,
    "repeats": "(?:a|bb|cc|dd)*" * 3000,
    "assertions": "(?=a)" * 9000,
    "nested": "(" * 5000 + "a*" + ")" * 5000,
    "nested-repeats": "(?:" * 80 + "a{9}" + "){9}" * 80,
    "megabyte": "x.*" * 400_000,
}


@pytest.mark.parametrize("expression", HUGE.values(), ids=HUGE)
def test_checking_an_expression_takes_bounded_time(expression):
    began = time.process_time()
    with suppress(ValueError):
        assert not taking("targets", expression)("model.layers.0")
    assert time.process_time() - began < 5


LONG = "x" * 1_000_000
FLOODS = [
    {"targets": LONG}, {"targets": [LONG]}, {"targets": [f"t{i}" for i in range(50_000)]}, {"targets": [LONG, 3]},
    {"targets": "a", "exclude": LONG + "("}, {"trainable": LONG}, {"trainable": [f"t{i}" for i in range(50_000)]},
    {"rank": LONG}, {"rank": [LONG] * 50}, {"alpha": LONG}, {"dropout": LONG}, {"variant": LONG}, {"init": LONG},
    {"use_rslora": LONG}, {"rank_pattern": {LONG + "(": 1}}, {"rank_pattern": LONG}, {"rank_pattern": {".*": LONG}},
    {"alpha_pattern": {f"a{i}(": 1 for i in range(50_000)}},
]  # fmt: skip


@pytest.mark.parametrize("options", FLOODS, ids=lambda options: repr(options)[:40])
def test_no_argument_makes_a_long_error(options):
    model = nn.ModuleDict({f"layer_of_a_long_name_{i}": nn.ModuleDict({f"a{i}": nn.Linear(1, 1)}) for i in range(300)})
    with pytest.raises(ValueError, match=rf"{list(options)[-1].removesuffix('_pattern')}.* (must|match)") as caught:
        inject(model, **options)
    assert len(str(caught.value)) < 2000


def test_a_very_long_name_is_refused_only_for_expressions():
    name = "a" * (LONGEST_NAME + 1)
    model = nn.ModuleDict({name: nn.Linear(2, 2)})
    with pytest.raises(
        ValueError, match=r"targets holds regular expressions, .* matched only with names of at most 500"
    ):
        inject(model, ".*")
    assert list(inject(model, [name])) == [name]


TEXT = st.text(alphabet="ab.1_\\|^-\n é$", max_size=8)


@settings(max_examples=100, deadline=None)
@given(names=st.lists(TEXT, min_size=1, max_size=4), other=TEXT, escape=st.booleans())
def test_literal_names_in_expressions_match_as_in_re(names, other, escape):
    expression = "|".join(map(re.escape, names)) if escape else "|".join(names)
    try:
        pattern = re.compile(expression)
    except re.error:
        return
    assert not escape or spelled(expression) is not None
    for name in (*names, other, *(name.replace(".", "b") for name in names), *(f"a.{name}" for name in names)):
        assert matches(name, expression) == (pattern.fullmatch(name) is not None)
        key = re.match(rf"(.*\.)?({expression})$", name) is not None
        assert (first_match(compile_patterns("rank_pattern", {expression: 1}), name, None) == 1) == key


PIECE = st.recursive(
    st.sampled_from(["a", "b", r"\.", r"\w", r"\d", ".", "[ab]", "[^.]", "ab", r"\b", "$", "(?=a)", "(?!b)"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda each: f"({'|'.join(each)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{0,3}"])).map(
            lambda each: f"(?:{each[0]}){each[1]}"
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(expression=PIECE, unit=st.text(alphabet="ab._", min_size=1, max_size=4), end=st.sampled_from(["", "!", "."]))
def test_accepted_expressions_finish_quickly(expression, unit, end):
    try:
        pattern, _ = compiled("targets", expression)
    except ValueError:
        return
    began = time.process_time()
    pattern.fullmatch((unit * 200)[:199] + end)
    assert time.process_time() - began < 5
