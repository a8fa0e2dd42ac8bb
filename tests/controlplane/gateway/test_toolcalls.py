"""Calls read out of an answer's text: forms, what is no call, and that it does not matter how the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.gateway.toolcalls import LEAST_TAG, MAX_CALLS, MAX_HEAD, MAX_WHOLE, CallReader, whole
from workers.engine.tool_form import CLOSE, OPEN, written

A = ("a", '{"x": 1}')
B = ("get_weather", '{"city": "Zürich </tool_call> }{\\" \\\\", "n": [1, {"y": null}]}')


def read(*portions: str, only_one: bool = False) -> tuple[str, list[tuple[str, str]]]:
    reader = CallReader(only_one=only_one)
    said = [reader.read(portion) for portion in portions]
    return whole([*said, reader.read("", final=True)])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("", "", []),
        ("Hello <tool", "Hello <tool", []),
        ("  two  ", "  two  ", []),
        (written(*A), "", [A]),
        (written(*A) + "\n" + written(*B), "", [A, B]),
        ("Let me see.\n\n" + written(*A) + "\n", "Let me see.", [A]),
        (written(*A) + "\nThat is all.", "\nThat is all.", [A]),
        # Cut off: in its arguments it is a call, before them nothing of it is shown, unless it was none.
        (written(*B)[:60], "", [("get_weather", B[1][:11])]),
        ('Look.\n<tool_call>\n{"name": "get_', "Look.", []),
        ('<tool_call>{"arguments": {"x": 1}, "na', "", []),
        (written(*A) + "\n<tool_call>\n{", "", [A]),
        ("Look. <tool_call>", "Look.", []),
        ("Look. <tool_", "Look.", []),
        ("Look. <tool", "Look. <tool", []),
        ("<tool_call>{'name': 'get_", "<tool_call>{'name': 'get_", []),
        ('<tool_call>{"name": 5', '<tool_call>{"name": 5', []),
        ("<tool_call> is a tag", "<tool_call> is a tag", []),
        # The next call's first characters are no text; without a call before them they are.
        (written(*A) + "\n<tool_c", "", [A]),
        (written(*A) + "\n<b", "\n<b", [A]),
        # Without its end tag; with other spacing, another order, another name, arguments as text or none.
        (written(*A).removesuffix(CLOSE), "", [A]),
        (written(*A).removesuffix("\n" + CLOSE) + OPEN + written(*B).removeprefix(OPEN), "", [A, B]),
        ('<tool_call>{"name":"a","arguments":{"x": 1}}</tool_call>', "", [A]),
        ('<tool_call>{"arguments": {"x": 1}, "name": "a"}</tool_call>', "", [("a", '{"x":1}')]),
        ('<tool_call>{"name": "a", "parameters": {"x": 1}}</tool_call>', "", [A]),
        ('<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [A]),
        ('<tool_call>{"name": "a"}', "", [("a", "{}")]),
        ('<tool_call>{"name": "a", "arguments": null}</tool_call>', "", [("a", "{}")]),
        # No calls.
        ("<tool_call>nonsense</tool_call> so", "<tool_call>nonsense</tool_call> so", []),
        ('<tool_call>{"name": ""}</tool_call>', '<tool_call>{"name": ""}</tool_call>', []),
        ("</tool_call>", "</tool_call>", []),
    ],
)
def test_what_a_text_says(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(text) == (content, calls)
    assert read(*text) == (content, calls)


def test_only_the_first_call_counts_where_one_is_allowed() -> None:
    assert read(written(*A) + written(*B) + "end", only_one=True) == ("end", [A])


def test_what_is_held_back_is_bounded() -> None:
    for junk in ("x" * (MAX_WHOLE + 200), " " * (MAX_HEAD + 1) + written(*A)[len(OPEN) :]):
        reader = CallReader()
        said = [reader.read(OPEN), *(reader.read(junk[at : at + 50]) for at in range(0, len(junk), 50))]
        assert len(reader._held) <= MAX_WHOLE + len(CLOSE)
        content, calls = whole([*said, reader.read("", final=True)])
        assert (content, calls) == ((OPEN + junk, []) if junk[0] == "x" else ("", [("a", '{"x":1}')]))
    assert len(read(written(*A) * (MAX_CALLS + 3))[1]) == MAX_CALLS


def test_where_a_call_stops_being_read_at_once_does_not_hang_on_the_cuts() -> None:
    head = '{"name": "a", "arguments": '
    for n_more, arguments in ((0, '{"x": 1}'), (1, '{"x":1}')):
        text = OPEN + " " * (MAX_HEAD - len(head) + n_more) + head + '{"x": 1}}' + CLOSE
        assert read(text) == read(*text) == ("", [("a", arguments)])


def test_arguments_are_told_as_they_come_and_text_that_is_none_at_once() -> None:
    reader = CallReader()
    assert reader.read("Well <").content == "Well"
    assert reader.read("b>").content == " <b>"
    assert not reader.read(OPEN + '{"name": "a", "argum').calls
    assert [reader.read(each).calls[0][1:] for each in ('ents": {"x', '": "', "yes")] == [
        ("a", '{"x'), (None, '": "'), (None, "yes"),
    ]  # fmt: skip


PIECES = [
    OPEN,
    CLOSE,
    written(*A),
    written(*B),
    "\n",
    " ",
    "so",
    "<",
    "{",
    "}",
    '"',
    "\\",
    "[",
    "tool_call>",
    ",",
]
OTHERS = ['"name": "a"', ', "arguments": {', '<tool_call>\n{"name": "f", "arguments": ', "x" * 600, '"}"']
PARTS = st.sampled_from([*PIECES, *OTHERS])


@given(st.lists(PARTS, max_size=12).map("".join), st.data())
def test_the_same_calls_however_the_text_is_cut(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    portions = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(*portions) == read(text)
    assert read(*portions, only_one=True) == read(text, only_one=True)


@pytest.mark.parametrize("lead", ["", "Look.\n", written(*A) + "\n"])
def test_wherever_a_call_is_cut_off_its_tag_is_not_shown(lead: str) -> None:
    text = lead + written(*B)
    for at in range(len(lead), len(text)):
        content, calls = read(text[:at])
        begun = content.strip().removeprefix("Look.").strip()
        assert OPEN.startswith(begun) and len(begun) < LEAST_TAG, content
        assert all(name in (A[0], B[0]) for name, _ in calls)


@given(st.text().filter(lambda text: "<tool_" not in text))
def test_text_without_a_tag_is_passed_through_whole(text: str) -> None:
    assert read(text) == (text, [])
