"""Regular expressions matched in bounded time: what `re` finds, at no cost that grows with the ways through them."""

import re
import time
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotolora import inject
from cotolora.expressions import MAX_LENGTH, MAX_WAYS, Expression, _Matcher, _sre_parse, plain_names
from cotolora.matching import compile_patterns, first_match, matches
from tests.support.saving import base

NAMES = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(11) for part in "qkvo"]

ATOM = st.sampled_from(
    ["a", "b", "ab", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "^", "$", r"\b", r"\B", r"\Z", "(?i:B)", "(?<=a)"]
)  # fmt: skip
REPEAT = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?", "{2,}"])
EXPRESSION = st.recursive(
    ATOM,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join).map("({})".format),
        st.tuples(inner, REPEAT).map(lambda both: "(?:{}){}".format(*both)),
        st.tuples(st.sampled_from(["(?=", "(?!"]), inner).map(lambda both: "{}{})".format(*both)),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=EXPRESSION, name=st.text("abAB.1\n", max_size=7))
def test_the_matcher_finds_what_re_finds(text, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = re.compile(text)
        ours = _Matcher(_sre_parse.parse(text), theirs.flags)
    assert (theirs.match(name) is None) is (ours.match(name, None) is None)
    assert (theirs.fullmatch(name) is None) is (ours.match(name, len(name)) is None)


@settings(max_examples=300, deadline=None)
@given(
    before=st.sampled_from(["", ".*?", ".*", r"(?:\w+\.)*?", r"(?:\w+\.)*", "(?:a|aa)+?"]),
    inner=st.sampled_from([r"\d+", r"\d+?", ".", "[ab]*", "(?:1|11)"]),
    after=st.sampled_from(["", ".*", r"\.", "$", "1"]),
    name=st.text("a1.", max_size=10),
)
def test_named_groups_are_those_of_re(before, inner, after, name):
    text = f"{before}(?P<index>{inner}){after}"
    theirs, ours = re.compile(text), _Matcher(_sre_parse.parse(text), 0)
    found = theirs.match(name)
    assert ours.match(name, None) == (None if found is None else found.groupdict())


# what would take `re` hours; the number of names that it takes in the end
SLOW = {
    r"(\w+\.?)+!": 0,
    r"([a-z0-9_.]+)+!": 0,
    r"(.|[a-z])*!": 0,
    r"(.*)*(.*)*(.*)*!": 0,
    r".*.*.*.*.*.*.*.*!": 0,
    r"(a|a)*" * 20 + "!": 0,
    r"\w?" * 40 + r"\.layers.*": 44,
    r"(?=(\w+\.?)+!).*": 0,
    r"(?!(\w+\.?)+!).*": 44,
    "(?=.*" * 12 + "!" + ")" * 12: 0,
    r"(?:\w+\.)*(?:\w+)+": 44,
    r"((\w|\.)+)+(q|v)_proj": 22,
    r".*[^!]*.*[^!]*.*[^!]*\.(q|v)_proj": 22,
    r"(x{0,9}){0,9}.*": 44,
}


@pytest.mark.parametrize("text", SLOW)
def test_no_expression_takes_long(text):
    began = time.monotonic()
    expression = Expression(text)
    assert expression.ways > MAX_WAYS
    assert sum(expression.fullmatch(name) is not None for name in NAMES) == SLOW[text]
    assert time.monotonic() - began < 5  # it takes a tenth of a second


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (r"(.*)*\1", "ambiguous, and has a back-reference"),
        (r"(?:(a)|b)*(?(1)c|d).*.*.*.*", "ambiguous, and has a back-reference, a condition"),
        ("((a{0,100}){0,100}){0,100}", "ambiguous, and of more than"),
        (".*" * 2000, "ambiguous, and of more than"),
        ("x" * 1_000_000, "it has 1000000 characters, more than 50000"),
        ("(" * 5000 + ")" * 5000, "recursion"),
        ("(", "unterminated"),
        ("a{99999999999999999999}", "too large"),
    ],
    ids=lambda text: text[:12],
)
def test_what_cannot_be_matched_in_bounded_time_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        Expression(text)


# as tools write them into public adapters
PUBLIC = {
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|fc1).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|k_proj|fc1)))": 22,
    r"^(?!.*(?:visual|patch_embed)).*(?:q_proj|k_proj|v_proj|o_proj).*": 44,
    r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*": 44,
    r".*\.layers\.\d+\.self_attn\.(q|v)_proj": 22,
    r".*model.*": 44,
}


@pytest.mark.parametrize("text", PUBLIC, ids=lambda text: text[:16])
def test_public_expressions_take_what_they_took(text):
    found = [name for name in NAMES if matches(name, text)]
    assert found == [name for name in NAMES if re.fullmatch(text, name)]
    assert len(found) == PUBLIC[text]


@given(st.lists(st.text("a.|\\*[ (x", min_size=1, max_size=5), min_size=1, max_size=4))
def test_escaped_names_are_taken_whole(names):
    text = "|".join(map(re.escape, names))
    assert plain_names(text) == frozenset(names)
    for name in (*names, *(name + "x" for name in names)):
        assert matches(name, text) is (re.fullmatch(text, name) is not None)


@pytest.mark.parametrize("text", ["a.b", "(a)", "a|", "|a", "", "a\\", r"\d", "a||b", "^a"])
def test_other_expressions_are_no_lists_of_names(text):
    assert plain_names(text) is None or text == ""


def test_names_by_the_thousands_take_no_time():
    names = [f"model.layers.{i}.experts.{j}.up" for i in range(100) for j in range(100)]
    text = "|".join(map(re.escape, names))
    assert len(text) > MAX_LENGTH
    began = time.monotonic()
    assert all(matches(name, text) for name in names)
    patterns = compile_patterns("rank_pattern", {"^" + re.escape(name): i for i, name in enumerate(names)})
    assert [first_match(patterns, name, None) for name in names] == list(range(10_000))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "keys",
    [[".*" + "a" * i + ".*.*" for i in range(200)], [f"(a{i}|.*)*" for i in range(100)]],
    ids=["many", "ambiguous"],
)
def test_keys_that_take_too_long_together_are_refused(keys):
    with pytest.raises(ValueError, match="rank_pattern must have fewer or simpler keys"):
        inject(base(), rank_pattern=dict.fromkeys(keys, 2))


def test_the_first_key_decides_whatever_its_kind():
    for keys in (["^fc", "fc", ".*"], [".*", "^fc"], ["(f|c)*c", "^fc"], ["^fc", "(f|c)*c"], ["x", "^fc"]):
        patterns = compile_patterns("rank_pattern", {key: i for i, key in enumerate(keys)})
        for name in ("fc", "blocks.0.fc", "x"):
            expected = next((i for i, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", name)), None)
            assert first_match(patterns, name, None) == expected
