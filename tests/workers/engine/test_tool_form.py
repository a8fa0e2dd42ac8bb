"""How models are told of functions: whose template speaks the form, and the words for all others."""

import json

import pytest

from workers.engine.tool_form import as_words, parsed_arguments, speaks, written

QWEN = '{%- if tools %}<tools>…</tools> <tool_call>\n{"name": <function-name>, "arguments": <args>}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "ü"}'}}


def test_a_template_speaks_the_form_or_another_or_none() -> None:
    others = (
        "{{ messages }}",
        '{% if tools %}{"name": …, "parameters": …}{% endif %}',
        "{% if tools %}<tool_call>\n<function=name>\n<parameter=…> arguments{% endif %}",
        "{% if tools %}<tool_call>name<arg_key>…</arg_key> arguments{% endif %}",
    )
    assert speaks(QWEN)
    assert [template for template in others if speaks(template)] == []


@pytest.mark.parametrize("role", ["system", "developer"])
def test_functions_calls_and_results_in_words(role: str) -> None:
    user = {"role": "user", "content": "How is it?"}
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    results = [{"role": "tool", "tool_call_id": str(i), "content": f"r{i}"} for i in (1, 2)]
    alone = as_words([user, calling, *results, user], [TOOL])
    assert [m["role"] for m in alone] == ["system", "user", "assistant", "user", "user"]
    assert json.dumps(TOOL) in alone[0]["content"]
    assert alone[2]["content"] == written("f", '{"x": "ü"}') + "\n" + written("f", '{"x": "ü"}')
    assert alone[3] == {
        "role": "user",
        "content": "<tool_response>\nr1\n</tool_response>\n<tool_response>\nr2\n</tool_response>",
    }
    told, *rest = as_words([{"role": role, "content": "Be brief."}, user], [TOOL])
    assert told["role"] == role
    assert told["content"].startswith("Be brief.\n\n")
    assert rest == [user]
    assert as_words([user, {**calling, "content": "So:"}], None)[1]["content"].startswith("So:\n<tool_call>")


def test_arguments_are_objects_for_templates_that_print_them() -> None:
    plain = {"role": "user", "content": "x"}
    given = {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL, {**CALL, "function": {"name": "g", "arguments": ""}}],
    }
    first, second = parsed_arguments([plain, given])
    assert first is plain
    assert [c["function"]["arguments"] for c in second["tool_calls"]] == [{"x": "ü"}, {}]
    assert given["tool_calls"][0] is CALL, "the messages themselves stay as they are"
    assert CALL["function"]["arguments"] == '{"x": "ü"}'
