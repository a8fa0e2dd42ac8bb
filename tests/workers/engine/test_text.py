"""Stop strings and incremental decoding: what is emitted depends on the tokens alone, however they arrive."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.native_calls import NativeCalls
from workers.engine.native_form import TOOL_CALLS, Form
from workers.engine.text import Detokenizer, StopMatcher
from workers.engine.tool_form import written
from workers.modelcache.tiny import make_tiny_model

letters = st.text(alphabet="abc", max_size=40)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3).map(tuple)


def expected(text: str, stop_strings: tuple[str, ...]) -> tuple[str, bool]:
    """Text up to the stop string that completes first; of several completing together, the longest cut."""
    for end in range(len(text) + 1):
        found = [s for s in stop_strings if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(letters, stops)
def test_characters_one_by_one_give_the_text_before_the_first_stop(text: str, stop_strings) -> None:
    matcher = StopMatcher(stop_strings)
    out = ""
    for character in text:
        out += matcher.push(character)
        if matcher.stopped:
            break
    else:
        out += matcher.push("", final=True)
    assert (out, matcher.stopped) == expected(text, stop_strings)


@given(st.lists(st.text(alphabet="abc", max_size=5), max_size=12), stops)
def test_pieces_never_emit_what_might_become_a_stop_string(pieces: list[str], stop_strings) -> None:
    matcher = StopMatcher(stop_strings)
    out = seen = ""
    for piece in pieces:
        seen += piece
        out += matcher.push(piece)
        assert seen.startswith(out)
        assert not any(s in out for s in stop_strings)
        if matcher.stopped:
            return
    assert out + matcher.push("", final=True) == seen


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopMatcher(()).push("abc") == "abc"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    from tokenizers import Tokenizer

    directory: Path = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


TEXT = "The price — naïve café, 東京 and 🙂🙃 — is known; STOP here and no further."


def decode(tokenizer, prompt: list[int], pushes: list[list[int]], stop: tuple[str, ...]) -> list[str]:
    """Texts emitted per push; the last push is final."""
    detokenizer = Detokenizer(tokenizer, prompt, stop)
    out = []
    for i, ids in enumerate(pushes):
        out.append(detokenizer.push(ids, final=i == len(pushes) - 1)[1])
        if detokenizer.stopped:
            break
    return out


@pytest.mark.parametrize("stop", [(), ("STOP",), ("known; ST", "🙂")])
def test_a_resumed_attempt_emits_exactly_the_rest(tokenizer, stop: tuple[str, ...]) -> None:
    """Cut after every token: text of attempt 1 so far + text of attempt 2 = undisturbed text."""
    prompt = tokenizer.encode("Say it: ").ids
    ids = tokenizer.encode(TEXT).ids
    assert len(ids) > 40
    whole = "".join(decode(tokenizer, prompt, [[i] for i in ids], stop))
    assert whole == min((TEXT.partition(s)[0] for s in stop), key=len, default=TEXT)
    for cut in range(1, len(ids)):
        first = Detokenizer(tokenizer, prompt, stop)
        emitted = "".join(first.push([i])[1] for i in ids[:cut])
        if first.stopped:
            break
        second = Detokenizer(tokenizer, prompt, stop)
        second.push(ids[:cut])
        rest = ""
        for n, i in enumerate(ids[cut:], start=cut + 1):
            rest += second.push([i], final=n == len(ids))[1]
            if second.stopped:
                break
        assert emitted + rest == whole, cut


def test_half_characters_wait_for_their_other_half(tokenizer) -> None:
    ids = tokenizer.encode("🙂").ids
    assert len(ids) == 4
    assert decode(tokenizer, [5], [[i] for i in ids], ()) == ["", "", "", "🙂"]


def test_tokens_after_a_stop_string_do_not_count(tokenizer) -> None:
    ids = tokenizer.encode("ab!cd").ids
    n_bang = next(n for n in range(1, len(ids) + 1) if "!" in tokenizer.decode(ids[:n]))
    detokenizer = Detokenizer(tokenizer, [5], ("!",))
    assert detokenizer.push(ids) == (n_bang, "ab")
    assert detokenizer.stopped


def test_special_tokens_have_no_text(tokenizer) -> None:
    assert decode(tokenizer, [5], [tokenizer.encode("a<|eos|>b").ids], ()) == ["ab"]


def test_special_tokens_that_are_asked_for_have_their_text(tokenizer) -> None:
    tag = tokenizer.token_to_id("<|tool|>")
    ids = [*tokenizer.encode("a").ids, tag, *tokenizer.encode(" b").ids]
    detokenizer = Detokenizer(tokenizer, [5], (), {tag: "<|tool|>"})
    assert detokenizer.push(ids, final=True) == (len(ids), "a<|tool|> b")


def test_calls_in_a_models_own_form_come_as_the_houses_wherever_an_attempt_ends(tokenizer) -> None:
    tag = tokenizer.token_to_id("<|tool|>")  # stands for the model's mark
    text = ' [{"name": "f", "arguments": {"city": "東京 🙂"}}, {"name": "g", "arguments": {}}]'
    ids = [*tokenizer.encode("See:").ids, tag, *tokenizer.encode(text).ids]

    def reading() -> Detokenizer:
        calls = NativeCalls(Form.MISTRAL_LIST, (), is_marked=True)
        return Detokenizer(tokenizer, [5], (), {tag: TOOL_CALLS}, calls)

    wanted = "See:" + written("f", '{"city": "東京 🙂"}') + "\n" + written("g", "{}")
    assert reading().push(ids, final=True) == (len(ids), wanted)
    for cut in range(1, len(ids)):
        first, second = reading(), reading()
        emitted = "".join(first.push([i])[1] for i in ids[:cut])
        assert wanted.startswith(emitted)
        second.push(ids[:cut])
        assert emitted + second.push(ids[cut:], final=True)[1] == wanted, cut


def test_a_stop_string_ends_a_call_that_was_begun(tokenizer) -> None:
    calls = NativeCalls(Form.LLAMA, ("f",), is_marked=True)
    detokenizer = Detokenizer(tokenizer, [5], ("END",), None, calls)
    detokenizer.push(tokenizer.encode('{"name": "f", ').ids)
    assert detokenizer.push(tokenizer.encode('"paEND').ids)[1] == ""
    assert detokenizer.stopped
