"""Patterns of strangers: what `re` says of them, in bounded time and memory, or a refusal."""

import re
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_jax._text.expressions import Expression, TooLongError, UnsupportedError

TOKENS = [
    *"ab._A|)^$(",
    *(
        "a*",
        "b+",
        "(?:",
        "[ab]",
        "[^a]",
        r"[\w.-]",
        r"\w",
        r"\W",
        r"\d",
        r"\.",
        r"\b",
        r"\B",
        r"\Z",
    ),
    *("(?=", "(?!", "(?<=", "(?<!", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{,2}", "{0}"),
    *("{2,}?", "(?i:", "(?s:", "(?P<x>", r"\s", ".*", r"\A"),
]

#: Of adapters that people publish, and tools that write them; each with names to try.
REAL = [
    r".*\.\d+\.mlp\.(up|down)_proj",
    r"^(?!.*patch_embed)(?!.*lm_head).*_proj$",
    r"^(language_model(?=\.).*\.(gate_proj|q_proj|up_proj))$",
    r"(?:.*?(?:vision|language).*?(?:self_attn|mlp).*?(?:q_proj|k_proj|up_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
    r"model\.layers\.(1[0-9]|2[0-3])\..*",
    r"(?i).*Q_PROJ",
    r".*(?<!cross)_attn\.[qkv]_proj",
]
NAMES = [
    "lm_head",
    "model.layers.0.mlp.up_proj",
    "model.layers.12.self_attn.q_proj",
    "model.layers.7.cross_attn.k_proj",
    "language_model.model.layers.3.mlp.gate_proj",
    "vision.patch_embed.x_proj",
]

REFUSED = {
    "(?:.*up_prj){0<=e<=1}": "braces",
    ".*layer[[:digit:]]": "class with another",
    r"(a)\1": r"has \\1",
    "a*+": "possessive",
    "(?>a)b": "unusual kind",
    "(?P=n)": "unusual kind",
    "(?(1)a|b)": "unusual kind",
    "(?|a|b)": "unusual kind",
    "(?V1)[a--b]": "unusual kind",
    "(?R)": "unusual kind",
    "(?x)a b": "unusual kind",
    r"\p{L}": r"has \\p",
    r"\L<names>": r"has \\L",
    "[a--b]": "operation on sets",
    "é": "beyond ASCII",
    "(" * 1000: "groups within groups",
    "a" * 70_000: "more than 65,536 characters",
}


@given(st.lists(st.sampled_from(TOKENS), max_size=9), st.text("abA._1\n", max_size=7))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_what_is_accepted_means_what_it_means_to_re(tokens, text):
    pattern = "".join(tokens)
    try:
        expression = Expression(pattern)
    except UnsupportedError:
        return
    except ValueError:
        with pytest.raises(re.error):
            re.compile(pattern)
        return
    assert expression.matches(text) == (re.fullmatch(pattern, text) is not None), pattern


@pytest.mark.parametrize("pattern", REAL)
def test_patterns_of_real_adapters(pattern):
    found = {name for name in NAMES if Expression(pattern).matches(name)}
    assert found == {name for name in NAMES if re.fullmatch(pattern, name)}
    assert found or "1[0-9]" not in pattern


def test_it_may_begin_at_several_places():
    expression = Expression("up|b.c")
    assert [expression.steps("a.b.c", starts)[0] for starts in (0b1, 0b100, 0b101)] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("pattern", REFUSED, ids=range(len(REFUSED)))
def test_what_re_and_other_engines_read_differently_is_refused(pattern):
    with pytest.raises(UnsupportedError, match=REFUSED[pattern]):
        Expression(pattern)


@pytest.mark.parametrize("pattern", ["(", ")", "[", "\\", "(?<=a*)b", "a{3,2}", "a)|(b"])
def test_what_re_rejects_is_rejected(pattern):
    with pytest.raises(ValueError, match=r"position|width|repeat"):
        Expression(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "(.|.)*[A-Z]",
        "(((a{100}){100}){100}){100}",
        "((((a*)*)*)*)*b",
        "(a?){500}a{500}",
        "(?:(?:.{0,99}){0,99}){0,99}x",
        "(a|aa)+$b",
        "(?=(.*a){99})(?!(.*a){99}).*",
        "a|" * 8_000,
        "(a|b)" * 8_000,
    ],
    ids=range(9),
)
def test_hostile_patterns_take_little(pattern):
    def try_it():
        try:
            assert not Expression(pattern).matches("a" * 99)
        except TooLongError:
            assert len(pattern) > 10_000

    started = time.process_time()
    try_it()
    assert time.process_time() - started < 5
    tracemalloc.start()
    try_it()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def test_alternatives_are_listed():
    found = Expression(r"(?i).*/(query|valeu)|head|(a|b)*|(?=c|d)x").alternations
    assert [one.parts for one in found] == [
        ("query", "valeu"),
        (r".*/(query|valeu)", "head", "(a|b)*", "(?=c|d)x"),
    ]
    assert found[1].start == len("(?i)")
