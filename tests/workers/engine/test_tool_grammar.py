"""The grammar of calls in llguidance itself: what it lets pass, byte by byte, and where tags are special tokens."""

import json

import pytest

from workers.contract import CallRule, HeldFunction
from workers.engine.tool_form import CLOSE, OPEN, written
from workers.engine.tool_grammar import fault_of, grammar_of

pytestmark = pytest.mark.engine

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/c"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"c": {"type": "string"}},
}
FUNCTIONS = (
    HeldFunction("get_weather", json.dumps(CITY)),
    HeldFunction("now", '{"type":"object","additionalProperties":false}'),
)
WEATHER = written("get_weather", '{"city": "a </tool_call> b", "unit": "C"}')
NOW = written("now", "{}")
BAD = written("now", '{"x": 1}')


def fits(rule: CallRule, text: str, json_schema: str | None = None) -> bool:
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), grammar_of(rule, json_schema))
    assert not matcher.get_error()
    raw = list(text.encode())
    return bool(matcher.try_consume_tokens(raw) == len(raw) and matcher.is_accepting())


@pytest.mark.parametrize("many", [True, False])
def test_what_must_be_calls_is_calls_and_nothing_else(many: bool) -> None:
    rule = CallRule(FUNCTIONS, must=True, many=many)
    assert fits(rule, WEATHER)
    assert fits(rule, NOW)
    assert fits(rule, NOW + "\n" + WEATHER) is many
    others = (
        "",
        "words",
        "{}",
        BAD,
        "so " + NOW,
        NOW + "\nso",
        written("other", "{}"),
        written("get_weather", "{}"),
    )
    assert not [text for text in others if fits(rule, text)]


def test_words_are_free_and_calls_among_them_are_held_to_their_schema() -> None:
    rule = CallRule(FUNCTIONS)
    free = ("", "words <tool", '{"a": 1}', NOW, "See:\n" + WEATHER + "\n" + NOW, NOW + "done")
    assert [text for text in free if not fits(rule, text)] == []
    assert not [text for text in (BAD, "so " + BAD, NOW + BAD, OPEN, OPEN + "words") if fits(rule, text)]


def test_an_answer_held_to_a_schema_is_that_or_calls() -> None:
    answer = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    texts = {
        '{"a":1}': True,
        NOW: True,
        NOW + "\n" + WEATHER: True,
        "words": False,
        '{"a": 1}' + NOW: False,
        BAD: False,
    }
    assert {text: fits(CallRule(FUNCTIONS), text, answer) for text in texts} == texts


def test_tags_that_are_special_tokens_are_called_by_their_names() -> None:
    from llguidance import LLMatcher, LLTokenizer
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(tag, special=True) for tag in ("<eos>", OPEN, CLOSE)])
    known = LLTokenizer(tokenizer.to_str(), eos_token=len(alphabet))
    for rule, texts in (
        (
            CallRule(FUNCTIONS, must=True),
            {NOW + "\n" + WEATHER.replace("</tool_call> b", "b"): True, "words": False},
        ),
        (CallRule(FUNCTIONS), {"so " + NOW + "done": True, "so": True, "so " + BAD: False}),
    ):
        for text, passes in texts.items():
            matcher = LLMatcher(known, grammar_of(rule, None, special=True))
            assert not matcher.get_error()
            ids = tokenizer.encode(text).ids
            assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) is passes, text


def test_what_a_grammar_cannot_tell_is_refused_where_it_was_promised() -> None:
    from llguidance import LLMatcher, LLTokenizer

    schema = '{"type": "object", "properties": {"secret": {"type": "array", "uniqueItems": true}}}'
    loose, strict = (CallRule((*FUNCTIONS, HeldFunction("f", schema, s)), must=True) for s in (False, True))
    assert fits(loose, written("f", '{"secret": [1, 1]}'))
    assert not fits(loose, written("f", '{"secret": 1}'))
    error = LLMatcher.validate_grammar(grammar_of(strict, None), LLTokenizer("byte"))
    assert fault_of(error, strict) == "the parameters of 'f': Unimplemented keys: [\"uniqueItems\"]"
    assert "secret" not in fault_of("something else: secret", strict)
