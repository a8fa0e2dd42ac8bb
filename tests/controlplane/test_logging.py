"""Log lines are JSON with ids, and never carry what a tenant wrote or a secret."""

import io
import json
import logging

import pytest
import structlog

from controlplane.logging import FORBIDDEN_FIELDS, logging_config


@pytest.fixture
def lines():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    formatter = dict(logging_config()["formatters"]["json"])
    factory = formatter.pop("()")
    handler.setFormatter(factory(**formatter))
    logger = logging.getLogger("corral.test")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)


def test_a_line_is_one_json_object_with_its_bound_ids(lines) -> None:
    with structlog.contextvars.bound_contextvars(web_request="req_1"):
        structlog.get_logger("corral.test").info("key.revoked", key="ab12")
    (line,) = lines()
    assert line["event"] == "key.revoked"
    assert (line["key"], line["web_request"], line["level"]) == ("ab12", "req_1", "info")
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize("name", sorted(FORBIDDEN_FIELDS))
def test_a_forbidden_field_keeps_its_name_and_loses_its_value(lines, name: str) -> None:
    structlog.get_logger("corral.test").info("oops", **{name: "the tenant's words"})
    (line,) = lines()
    assert line[name] == "[dropped]"
    assert "tenant's words" not in json.dumps(line)


def test_lines_of_libraries_have_the_same_form(lines) -> None:
    logging.getLogger("corral.test").warning("plain %s", "text")
    (line,) = lines()
    assert (line["event"], line["level"]) == ("plain text", "warning")
