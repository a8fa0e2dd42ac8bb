"""SCIM's filter language (RFC 7644, 3.4.2.2): read into a small tree, then into a condition for the database.

`eq ne co sw ew pr gt ge lt le`, `and or not`, parentheses, and values in brackets (`members[value eq "x"]`, which means
`members.value eq "x"` here: no attribute of ours has two parts that must hold of one value). Called by views.py for
lists and by patching.py for paths. Pure but for `condition`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from django.db.models import Q

from controlplane.api.scim.errors import ScimError

MAX_CHARS: Final = 2_000
MAX_TERMS: Final = 50
_OPERATORS: Final = ("eq", "ne", "co", "sw", "ew", "pr", "gt", "ge", "lt", "le")
_TOKEN: Final = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\\x00-\x1f]|\\.)*")|(?P<mark>[()\[\]])|(?P<word>[A-Za-z0-9$][\w$:.+\-]*))"""
)
_URN: Final = re.compile(r"urn:ietf:params:scim:schemas:core:2\.0:(?:user|group):", re.IGNORECASE)
Value = str | bool | float | None


@dataclass(frozen=True, slots=True)
class Compare:
    """`attribute operator value`; the attribute in lower case, without its schema."""

    attribute: str
    operator: str
    value: Value = None


@dataclass(frozen=True, slots=True)
class Both:
    """`and`."""

    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Either:
    """`or`."""

    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Not:
    """`not (…)`."""

    inner: Node


Node = Compare | Both | Either | Not
# What an attribute is in the database, or how it is asked for there: (operator, value) -> condition.
Asker = Callable[[str, Value], Q]


def invalid(detail: str) -> ScimError:
    return ScimError("invalidFilter", f"filter: {detail}")


def parse(text: str, prefix: str = "") -> Node:
    """The tree. `prefix`: of every attribute in it ("members." for what stands in brackets). Raises ScimError."""
    return _Parser(text, prefix).whole()


def condition(node: Node, attributes: Mapping[str, Asker]) -> Q:
    """For the database. Raises ScimError for an attribute that cannot be asked for."""
    if isinstance(node, Compare):
        asker = attributes.get(node.attribute)
        if asker is None:
            raise invalid(f"{node.attribute!r} cannot be asked for; known: {', '.join(sorted(attributes))}")
        return asker(node.operator, node.value)
    if isinstance(node, Not):
        return ~condition(node.inner, attributes)
    left, right = condition(node.left, attributes), condition(node.right, attributes)
    return left & right if isinstance(node, Both) else left | right


def text(column: str, *, is_exact: bool = False) -> Asker:
    """A text column; names are compared without regard to case, ids are not."""
    case = "" if is_exact else "i"
    lookups = {
        "eq": f"{case}exact",
        "co": f"{case}contains",
        "sw": f"{case}startswith",
        "ew": f"{case}endswith",
        "gt": "gt",
        "ge": "gte",
        "lt": "lt",
        "le": "lte",
    }

    def ask(operator: str, value: Value) -> Q:
        if operator == "pr":
            return ~Q(**{column: ""})
        if not isinstance(value, str):
            raise invalid(f"{column} is compared with a string in quotes")
        if operator == "ne":
            return ~Q(**{f"{column}__{lookups['eq']}": value})
        return Q(**{f"{column}__{lookups[operator]}": value})

    return ask


def truth(column: str) -> Asker:
    """A column of true and false; in quotes too, as Entra writes it."""

    def ask(operator: str, value: Value) -> Q:
        if operator == "pr":
            return ~Q(pk__in=[])
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if operator not in ("eq", "ne") or not isinstance(value, bool):
            raise invalid(f"{column} is compared by eq or ne with true or false")
        return Q(**{column: value is (operator == "eq")})

    return ask


def instant(column: str) -> Asker:
    """A column of times."""
    lookups = {"eq": "exact", "gt": "gt", "ge": "gte", "lt": "lt", "le": "lte"}

    def ask(operator: str, value: Value) -> Q:
        if operator == "pr":
            return ~Q(pk__in=[])
        try:
            at = datetime.fromisoformat(value) if isinstance(value, str) else None
        except ValueError:
            at = None
        if at is None or (operator not in lookups and operator != "ne"):
            raise invalid(
                f'{column} is compared by eq, ne, gt, ge, lt, le with a time such as "2026-11-21T04:30:00Z"'
            )
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        return ~Q(**{column: at}) if operator == "ne" else Q(**{f"{column}__{lookups[operator]}": at})

    return ask


def among(find: Callable[[str], Q], present: Q) -> Asker:
    """Something that is or is not: an id, a member. `find` answers the condition for one; `present` for any."""

    def ask(operator: str, value: Value) -> Q:
        if operator == "pr":
            return present
        if operator not in ("eq", "ne") or not isinstance(value, str):
            raise invalid("ids are compared by eq or ne with a string in quotes")
        return find(value) if operator == "eq" else ~find(value)

    return ask


def constant(present: str | bool) -> Asker:
    """An attribute that is the same for everybody."""

    def ask(operator: str, value: Value) -> Q:
        if isinstance(value, str):
            value = value.lower()
        is_equal = str(value).lower() == str(present).lower()
        holds = operator == "pr" or (operator == "eq" and is_equal) or (operator == "ne" and not is_equal)
        return ~Q(pk__in=[]) if holds else Q(pk__in=[])

    return ask


class _Parser:
    def __init__(self, source: str, prefix: str) -> None:
        if len(source) > MAX_CHARS:
            raise invalid(f"at most {MAX_CHARS} characters")
        self._prefix = prefix
        self._tokens = self._read(source)
        self._at = 0
        self._n_terms = 0

    def whole(self) -> Node:
        node = self._either(self._prefix)
        if self._peek() is not None:
            raise invalid(f"{self._peek()!r} is not expected there")
        return node

    @staticmethod
    def _read(source: str) -> list[str]:
        found, at = [], 0
        while at < len(source.rstrip()):
            match = _TOKEN.match(source, at)
            if match is None:
                raise invalid(f"cannot be read at {source[at : at + 20]!r}")
            found.append(match["string"] or match["mark"] or match["word"])
            at = match.end()
        return found

    def _peek(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _take(self, *expected: str) -> str:
        token = self._peek()
        if token is None or (expected and token.lower() not in expected):
            raise invalid(f"expected {' or '.join(expected) or 'more'}, not {token or 'the end'}")
        self._at += 1
        return token

    def _is(self, word: str) -> bool:
        token = self._peek()
        if token is None or token.lower() != word:
            return False
        self._at += 1
        return True

    def _either(self, prefix: str) -> Node:
        node = self._both(prefix)
        while self._is("or"):
            node = Either(node, self._both(prefix))
        return node

    def _both(self, prefix: str) -> Node:
        node = self._term(prefix)
        while self._is("and"):
            node = Both(node, self._term(prefix))
        return node

    def _term(self, prefix: str) -> Node:
        self._n_terms += 1  # bounds the depth, too: every level has a term
        if self._n_terms > MAX_TERMS:
            raise invalid(f"at most {MAX_TERMS} terms")
        if self._is("not"):
            self._take("(")
            inner: Node = Not(self._either(prefix))
            self._take(")")
            return inner
        if self._is("("):
            inner = self._either(prefix)
            self._take(")")
            return inner
        attribute = prefix + _URN.sub("", self._take()).lower()
        if self._is("["):
            inner = self._either(f"{attribute}.")
            self._take("]")
            return inner
        operator = self._take(*_OPERATORS).lower()
        if operator == "pr":
            return Compare(attribute, operator)
        return Compare(attribute, operator, self._value(self._take()))

    @staticmethod
    def _value(token: str) -> Value:
        try:
            value: Value = json.loads(token if token[0] == '"' else token.lower())
        except ValueError as error:
            raise invalid(f"{token[:40]!r} is no value: strings stand in double quotes") from error
        if isinstance(value, str) and (
            "\x00" in value or any("\ud800" <= each <= "\udfff" for each in value)
        ):
            raise invalid("a value has characters that no text can have")
        return value
