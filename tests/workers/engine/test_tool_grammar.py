"""The grammar of calls in llguidance itself: what it lets pass, byte by byte, and where tags are special tokens."""

import json

import pytest

from workers.contract import CallRule, HeldFunction
from workers.engine.native_calls import NativeCalls
from workers.engine.native_form import ARGS, MARKS, TOOL_CALLS, Form
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


def fits(rule: CallRule, text: str, json_schema: str | None = None, form: Form | None = None) -> bool:
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), grammar_of(rule, json_schema, form))
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


W = '{"city": "a", "unit": "C"}'
_OF_LIST = '{"name": "get_weather", "arguments": ' + W + "}"
_OF_LLAMA = '{"name": "get_weather", "parameters": ' + W + "}"
# A call of get_weather, one of both, and one whose arguments do not follow their schema.
OWN: dict[Form, tuple[str, str, str]] = {
    Form.LLAMA: (
        _OF_LLAMA,
        _OF_LLAMA + '; {"name": "now", "parameters": {}}',
        '{"name": "now", "parameters": {"x": 1}}',
    ),
    Form.MISTRAL_LIST: (
        f"[TOOL_CALLS] [{_OF_LIST}]",
        f'[TOOL_CALLS] [{_OF_LIST}, {{"name": "now", "arguments": {{}}}}]',
        '[TOOL_CALLS] [{"name": "now", "arguments": {"x": 1}}]',
    ),
    Form.MISTRAL_ARGS: (
        "[TOOL_CALLS]get_weather[ARGS]" + W,
        "[TOOL_CALLS]get_weather[ARGS]" + W + "[TOOL_CALLS]now[ARGS]{}",
        '[TOOL_CALLS]now[ARGS]{"x": 1}',
    ),
}


@pytest.mark.parametrize("form", Form)
def test_calls_are_held_to_their_schema_in_the_models_own_form(form: Form) -> None:
    one, both, bad = OWN[form]
    must, single, free = CallRule(FUNCTIONS, must=True), CallRule(FUNCTIONS, True, False), CallRule(FUNCTIONS)
    assert fits(must, one, form=form) and fits(must, both, form=form) and fits(single, one, form=form)
    assert not [text for text in ("", "so", "{}", bad, NOW) if fits(must, text, form=form)]
    assert not fits(single, both, form=form)
    words = ("", "so", '{"a": 1}', '{"name": "Bob"}', one, both)
    assert [text for text in words if not fits(free, text, form=form)] == []
    assert not fits(free, bad, form=form)
    answer = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    texts = {'{"a":1}': True, one: True, both: True, "so": False, bad: False}
    assert {text: fits(free, text, answer, form) for text in texts} == texts
    person = '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}'
    for text, does in {'{"name":"Bob"}': True, '{"name":"now"}': True, one: True, bad: False}.items():
        assert fits(free, text, person, form) is does
    if form is not Form.LLAMA:
        assert fits(free, "Look. " + one, form=form)
        assert not fits(free, "Look. " + bad, form=form)
    house = NativeCalls(form, {"get_weather", "now"}, is_marked=False).read(both, final=True)
    assert house == written("get_weather", W) + "\n" + NOW


def test_tags_that_are_special_tokens_are_called_by_their_numbers() -> None:
    from llguidance import LLMatcher, LLTokenizer
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(tag, special=True) for tag in ("<eos>", OPEN, CLOSE, *MARKS)])
    known = LLTokenizer(tokenizer.to_str(), eos_token=len(alphabet))

    def passes(rule: CallRule, text: str, form: Form | None, *tags: str) -> bool:
        grammar = grammar_of(rule, None, form, {tokenizer.token_to_id(tag): tag for tag in tags})
        matcher = LLMatcher(known, grammar)
        assert not matcher.get_error()
        ids = tokenizer.encode(text).ids
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    must, free = CallRule(FUNCTIONS, must=True), CallRule(FUNCTIONS)
    assert passes(must, NOW + "\n" + WEATHER.replace("</tool_call> b", "b"), None, OPEN, CLOSE)
    assert not passes(must, "words", None, OPEN, CLOSE)
    for text, does in {"so " + NOW + "done": True, "so": True, "so " + BAD: False}.items():
        assert passes(free, text, None, OPEN, CLOSE) is does, text
    for form in (Form.MISTRAL_LIST, Form.MISTRAL_ARGS):
        one, both, bad = OWN[form]
        for text, does in {one: True, both: True, bad: False, "Look. " + one: True, "so": True}.items():
            assert passes(free, text, form, TOOL_CALLS, ARGS) is does, text
        assert passes(must, both, form, TOOL_CALLS, ARGS)


def test_what_a_grammar_cannot_tell_is_refused_where_it_was_promised() -> None:
    from llguidance import LLMatcher, LLTokenizer

    schema = '{"type": "object", "properties": {"secret": {"type": "array", "uniqueItems": true}}}'
    loose, strict = (CallRule((*FUNCTIONS, HeldFunction("f", schema, s)), must=True) for s in (False, True))
    assert fits(loose, written("f", '{"secret": [1, 1]}'))
    assert not fits(loose, written("f", '{"secret": 1}'))
    error = LLMatcher.validate_grammar(grammar_of(strict, None), LLTokenizer("byte"))
    assert fault_of(error, strict) == "the parameters of 'f': Unimplemented keys: [\"uniqueItems\"]"
    assert "secret" not in fault_of("something else: secret", strict)
