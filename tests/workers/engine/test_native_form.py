"""Whose form a chat template writes calls in, found by asking it, and conversations as such templates take them."""

import json
from typing import Any

import jinja2
import pytest

from workers.engine.native_form import Form, form_of, turns_for

LLAMA = """{% for m in messages %}{% if m.tool_calls %}\
{% if m.tool_calls | length > 1 %}{{ refuse("one call") }}{% endif %}\
<|start_header_id|>assistant<|end_header_id|>

{% set f = m.tool_calls[0].function %}{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot_id|>\
{% else %}<|start_header_id|>{{ "ipython" if m.role == "tool" else m.role }}<|end_header_id|>

{% if loop.first and tools %}Functions:{% for t in tools %} {{ t | tojson }}{% endfor %}
{% endif %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
_MISTRAL = """<s>{% for m in messages %}{% if m.role == "user" %}\
{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]\
{% elif m.tool_calls %}CALLS</s>{% elif m.role == "tool" %}{% if m.tool_call_id | length != 9 %}{{ refuse("nine") }}\
{% endif %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"""
LIST = _MISTRAL.replace(
    "CALLS",
    "[TOOL_CALLS] [{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ refuse('nine') }}{% endif %}"
    '{{ (c.function | tojson)[:-1] }}, "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]',
)
ARGS = _MISTRAL.replace(
    "CALLS",
    "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}",
)
HERMES = (
    "{{ tools }}{% for m in messages %}{% for c in m.tool_calls or [] %}<tool_call>{{ c }}</tool_call>{% endfor %}"
    "{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def rendering(template: str) -> Any:
    def refuse(why: str) -> str:
        raise jinja2.TemplateError(why)

    environment = jinja2.Environment()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    compiled = environment.from_string(template, {"refuse": refuse})

    def render(messages: Any, *, tools: Any, add_generation_prompt: bool) -> str:
        return compiled.render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)

    return render


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (LLAMA, Form.LLAMA),
        (LIST, Form.MISTRAL_LIST),
        (ARGS, Form.MISTRAL_ARGS),
        (ARGS.replace("[ARGS]", "[CALL_ID]{{ c.id }}[ARGS]"), Form.MISTRAL_ARGS),
        (HERMES, None),
        (PLAIN, None),
        (LLAMA.replace('"parameters"', '"arguments"'), None),
        (LLAMA.replace("{% if loop.first and tools %}", "{% if false %}"), None),
        (LLAMA.replace("{{ m.content }}", "{{ m.nothing.at.all }}"), None),
        ("{{ refuse('everything') }}", None),
    ],
    ids=["llama", "list", "args", "call id", "hermes", "plain", "other key", "no tools", "broken", "refuses"],
)
def test_a_template_is_asked_what_its_model_would_write(template: str, form: Form | None) -> None:
    assert form_of(rendering(template)) is form


def call(name: str, arguments: str, call_id: str) -> dict[str, Any]:
    return {"function": {"arguments": arguments, "name": name}, "id": call_id, "type": "function"}


CHAT = [
    {"role": "user", "content": "And?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [call("f", '{"x": 1}', "call_a"), call("g", "", "call_b")],
    },
    {"role": "tool", "tool_call_id": "call_b", "content": "of g"},
    {"role": "tool", "tool_call_id": "call_a", "content": "of f"},
    {"role": "tool", "tool_call_id": "call_x", "content": "of nobody"},
    {"role": "assistant", "content": "So."},
]


def test_llamas_templates_get_one_call_a_turn_each_with_its_result() -> None:
    turns = turns_for(Form.LLAMA, CHAT)
    told = [t["tool_calls"][0]["function"]["name"] if t.get("tool_calls") else t["content"] for t in turns]
    assert told == ["And?", "f", "of f", "g", "of g", "of nobody", "So."]
    assert turns[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    text = rendering(LLAMA)(turns, tools=None, add_generation_prompt=True)
    assert '{"name": "f", "parameters": {"x": 1}}' in text


@pytest.mark.parametrize("template", [LIST, ARGS])
def test_mistrals_templates_get_ids_that_they_take_and_names_first(template: str) -> None:
    turns = turns_for(Form.MISTRAL_LIST, CHAT)
    calls = turns[1]["tool_calls"]
    assert [c["id"] for c in calls] == [turns[3]["tool_call_id"], turns[2]["tool_call_id"]]
    assert len({len(c["id"]) for c in calls} | {9}) == 1 and all(c["id"].isalnum() for c in calls)
    text = rendering(template)(turns, tools=None, add_generation_prompt=True)
    wanted = (
        '{"name": "f", "arguments": {"x": 1}, "id": "' if template == LIST else '[TOOL_CALLS]f[ARGS]{"x": 1}'
    )
    assert wanted in text


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("empty", [None, []])
def test_an_answer_in_words_that_an_sdk_sends_back_has_no_calls(form: Form, empty: Any) -> None:
    words = {"role": "assistant", "content": "So."}
    assert turns_for(form, [{**words, "tool_calls": empty}]) == [words]


@pytest.mark.parametrize("form", Form)
def test_arguments_that_are_no_object_are_refused(form: Form) -> None:
    with pytest.raises(ValueError, match="Expecting"):
        turns_for(form, [{"role": "assistant", "content": "", "tool_calls": [call("f", "{", "1")]}])
