"""Calls in a model's own form become the house's, whatever the cuts; what is none stays as it is."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.gateway.toolcalls import CallReader, whole
from workers.contract import CallRule, HeldFunction
from workers.engine.native_calls import MAX_HEAD, MAX_WHOLE, NativeCalls, names_of
from workers.engine.native_form import ARGS, CALL_ID, PYTHON_TAG, TOOL_CALLS, Form
from workers.engine.tool_form import written

NAMES = ("f", "get_weather")
MISTRAL = Form.MISTRAL_LIST
F = ("f", '{"x": 1}')
G = ("get_weather", '{"city": "Zürich }; ] [TOOL_CALLS] \\" \\\\", "n": [1, {"y": null}]}')


def rewritten(form: Form, *portions: str, is_marked: bool = True) -> str:
    calls = NativeCalls(form, NAMES, is_marked=is_marked)
    return "".join([*(calls.read(portion) for portion in portions), calls.read("", final=True)])


def read(text: str) -> tuple[str, list[tuple[str, str]]]:
    """As a gateway reads the journal."""
    return whole([CallReader().read(text, final=True)])


def llama(name: str, arguments: str, key: str = "parameters") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def item(name: str, arguments: str) -> str:
    return llama(name, arguments, "arguments")


CALLED: list[tuple[Form, str, str, list[tuple[str, str]]]] = [
    (Form.LLAMA, llama(*F), "", [F]),
    (Form.LLAMA, "\n " + PYTHON_TAG + " " + llama(*G), "", [G]),
    (Form.LLAMA, llama(*F) + "; " + llama(*G), "", [F, G]),
    (Form.LLAMA, llama(*F) + "\n" + PYTHON_TAG + llama(*G), "", [F, G]),
    (Form.LLAMA, '{"type": "function", "name": "f", "parameters": {"x": 1}}', "", [F]),
    (Form.LLAMA, '{ "name" :"f" , "arguments": {"x": 1} , "id": {"a": "}"} }', "", [F]),
    (Form.LLAMA, '{"name": "f", "parameters": {}}', "", [("f", "{}")]),
    (Form.LLAMA, '{"name": "f", "parameters": null}', "", [("f", "{}")]),
    (Form.LLAMA, llama(*F) + " So it is.", " So it is.", [F]),
    (Form.LLAMA, llama(*F)[:-3], "", [("f", '{"x": ')]),
    (MISTRAL, TOOL_CALLS + " [" + item(*F) + "]", "", [F]),
    (MISTRAL, "Look." + TOOL_CALLS + "[" + item(*F) + ", " + item(*G) + "]", "Look.", [F, G]),
    (MISTRAL, TOOL_CALLS + ' [{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}]', "", [F]),
    (
        MISTRAL,
        TOOL_CALLS + ' [{"arguments": {"x": 1}, "name": "f"}, {"name": "g"}]',
        "",
        [("f", '{"x":1}'), ("g", "{}")],
    ),
    (MISTRAL, TOOL_CALLS + ' [{"arguments": "{}", "name": "f"}]', "", [("f", "{}")]),
    (MISTRAL, TOOL_CALLS + item(*F), "", [F]),
    (MISTRAL, TOOL_CALLS + "f" + ARGS + F[1], "", [F]),
    (
        MISTRAL,
        TOOL_CALLS + "f" + F[1] + TOOL_CALLS + "get_weather" + CALL_ID + "abc" + ARGS + G[1],
        "",
        [F, G],
    ),
    (MISTRAL, "So." + TOOL_CALLS + "f" + ARGS + F[1] + " Well.", "So. Well.", [F]),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CALLED)
@pytest.mark.parametrize("is_marked", [True, False])
def test_what_is_called(
    form: Form, text: str, content: str, calls: list[tuple[str, str]], is_marked: bool
) -> None:
    house = rewritten(form, text, is_marked=is_marked)
    assert read(house) == (content, calls)
    assert rewritten(form, *text, is_marked=is_marked) == house
    complete = [written(*call) for call in calls if call[1].endswith("}")]
    assert [call for call in complete if call not in house] == []


NO_CALLS: list[tuple[Form, str, str]] = [
    (Form.LLAMA, "Hello", "Hello"),
    (Form.LLAMA, '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}'),
    (
        Form.LLAMA,
        '{"name": "get_weather_too", "parameters": {}}',
        '{"name": "get_weather_too", "parameters": {}}',
    ),
    (Form.LLAMA, '{"name": "f", "age": 3}', '{"name": "f", "age": 3}'),
    (Form.LLAMA, '{"name": "f"}', '{"name": "f"}'),
    (Form.LLAMA, '{"answer": 42}', '{"answer": 42}'),
    (Form.LLAMA, "So: " + llama(*F), "So: " + llama(*F)),
    (Form.LLAMA, ' [{"name": "f"}]', ' [{"name": "f"}]'),
    (Form.LLAMA, PYTHON_TAG + "print(1)", "print(1)"),
    (MISTRAL, item(*F), item(*F)),
    (MISTRAL, "[TOOL] [1]", "[TOOL] [1]"),
    (MISTRAL, TOOL_CALLS + " [1, 2]", " [1, 2]"),
    (MISTRAL, TOOL_CALLS + ' [{"a": 1}]', ' [{"a": 1}]'),
    (MISTRAL, TOOL_CALLS + "and so on", "and so on"),
    # Cut off before it is known to be a call, it is text; within its head it is nothing.
    (Form.LLAMA, "{", "{"),
    (Form.LLAMA, '{"name": "f', '{"name": "f'),
    (Form.LLAMA, '{"name": "f"', ""),
    (Form.LLAMA, '{"name": "get_weather", "para', ""),
    (Form.LLAMA, PYTHON_TAG, ""),
    (Form.LLAMA, PYTHON_TAG + '{"na', ""),
    (MISTRAL, "Look." + TOOL_CALLS, "Look."),
    (MISTRAL, TOOL_CALLS + " [", ""),
    (MISTRAL, TOOL_CALLS + ' [{"name": "f', ""),
    (MISTRAL, TOOL_CALLS + ' [{"arguments": {"x": 1}', ""),
    (MISTRAL, TOOL_CALLS + "get_wea", ""),
    (MISTRAL, TOOL_CALLS + "f[AR", ""),
]


@pytest.mark.parametrize(("form", "text", "shown"), NO_CALLS)
def test_what_is_no_call_is_text_and_a_head_that_was_cut_off_is_not_shown(
    form: Form, text: str, shown: str
) -> None:
    assert rewritten(form, text) == shown
    assert rewritten(form, *text) == shown


def test_marks_that_are_no_tokens_of_the_model_are_text_unless_a_call_follows() -> None:
    for text in (TOOL_CALLS + " [1, 2]", PYTHON_TAG + "print(1)", "of " + TOOL_CALLS + " and more"):
        for form in Form:
            assert rewritten(form, text, is_marked=False) == text
    assert rewritten(MISTRAL, "Look. [TOOL_C", is_marked=False) == "Look. "
    assert rewritten(MISTRAL, "Look. [TOO", is_marked=False) == "Look. [TOO"


def test_arguments_are_handed_on_as_they_come_and_text_at_once() -> None:
    calls = NativeCalls(Form.LLAMA, NAMES, is_marked=True)
    assert [calls.read(piece) for piece in ('{"name', '": "f", "parameters": ', '{"x', '": 1', "}")] == [
        "",
        "",
        '<tool_call>\n{"name": "f", "arguments": {"x',
        '": 1',
        "}}\n</tool_call>",
    ]
    assert NativeCalls(Form.LLAMA, NAMES, is_marked=True).read("Well") == "Well"
    assert NativeCalls(Form.LLAMA, NAMES, is_marked=True).read('{"name": "B') == '{"name": "B'
    assert NativeCalls(MISTRAL, NAMES, is_marked=True).read("Well [T") == "Well "


@pytest.mark.parametrize(
    ("form", "lead", "junk", "bound"),
    [
        (Form.LLAMA, "", " " * 3 * MAX_HEAD + llama(*F), MAX_HEAD),
        (MISTRAL, TOOL_CALLS, " " * 3 * MAX_HEAD + item(*F), MAX_HEAD),
        (MISTRAL, TOOL_CALLS + "[", " " * 3 * MAX_HEAD + item(*F), MAX_HEAD),
        (MISTRAL, TOOL_CALLS + "f", " " * 3 * MAX_HEAD + ARGS, MAX_HEAD),
        (MISTRAL, TOOL_CALLS + '[{"a": "', "x" * (MAX_WHOLE + 200), MAX_WHOLE),
    ],
)
def test_what_is_held_back_is_bounded(form: Form, lead: str, junk: str, bound: int) -> None:
    calls, most = NativeCalls(form, NAMES, is_marked=False), 0
    out = [calls.read(lead)]
    for at in range(0, len(junk), 50):
        out.append(calls.read(junk[at : at + 50]))
        most = max(most, len(calls._held))
    assert most <= bound
    assert "".join(out) + calls.read("", final=True) == lead + junk
    assert rewritten(form, lead + junk, is_marked=False) == lead + junk


def test_names_are_those_of_the_request() -> None:
    tools = [
        {"type": "function", "function": {"name": "a", "parameters": {}}},
        {"type": "function", "function": {"name": "b"}},
    ]
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": tools}).encode()
    assert names_of(body, CallRule()) == {"a", "b"}
    assert names_of(b"", CallRule((HeldFunction("c", "{}"),))) == {"c"}
    assert names_of(b'{"tools": null}', CallRule()) == set()


HEADS = ['{"name": "f", "parameters": ', '{"name": "get_', '"type": "function", ', "null", "[TOOL", "<|pyth"]
SIGNS = ["[", "]", "{", "}", ",", ";", " ", "\n", '"', "\\", "f", "so", "x" * 600]
PARTS = st.sampled_from([llama(*F), item(*G), TOOL_CALLS, ARGS, CALL_ID, PYTHON_TAG, *HEADS, *SIGNS])
TEXTS = st.lists(PARTS, max_size=12).map("".join)


@given(st.sampled_from(Form), TEXTS, st.booleans(), st.data())
def test_the_same_text_however_it_is_cut(form: Form, text: str, is_marked: bool, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    portions = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert rewritten(form, *portions, is_marked=is_marked) == rewritten(form, text, is_marked=is_marked)


@given(st.sampled_from(Form), TEXTS, st.integers(0, 200))
def test_an_attempt_that_goes_on_says_exactly_the_rest(form: Form, text: str, at: int) -> None:
    """It reads what was journaled before, whose text left already, and goes on."""
    first = NativeCalls(form, NAMES, is_marked=True)
    begun = first.read(text[:at])
    second = NativeCalls(form, NAMES, is_marked=True)
    assert second.read(text[:at]) == begun
    assert begun + second.read(text[at:], final=True) == rewritten(form, text)


def without_calls(text: str) -> bool:
    return TOOL_CALLS[:6] not in text and PYTHON_TAG[:6] not in text and '"name"' not in text


@given(st.sampled_from(Form), st.booleans(), st.text() | TEXTS.filter(without_calls))
def test_text_without_calls_is_passed_through_whole(form: Form, is_marked: bool, text: str) -> None:
    assert rewritten(form, text, is_marked=is_marked) == text


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_json_that_is_no_call_is_passed_through_whole(value: Any) -> None:
    """An answer in JSON, whatever it holds."""
    for text in (
        json.dumps(value),
        json.dumps({"name": "Bob", "value": value}),
        json.dumps({"value": value}, indent=1),
    ):
        assert rewritten(Form.LLAMA, text) == text
