"""Lists: filters, pages, and which attributes are shown; and the patches of users."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from django.db import transaction

from tests.controlplane.scim.caller import GROUP, USER, Directory

ANN, CAT = "ann@example.org", "cat@example.org"


def found(directory: Directory, kind: str, text: str, **query: Any) -> list[str]:
    response = directory.get(f"/{kind}?{urlencode({'filter': text, **query})}")
    assert response.status_code == 200, response.body
    return [each.get("userName") or each["displayName"] for each in response.body["Resources"]]


FILTERS: list[tuple[str, str | None]] = [
    ('userName eq "ann@example.org"', "ann"),
    ('USERNAME Eq "ANN@example.org"', "ann"),
    ('urn:ietf:params:scim:schemas:core:2.0:User:userName eq "cat@example.org"', "cat"),
    ('externalId eq "00Ua"', "ann"),
    ('externalId eq "00ua"', ""),
    ('emails[type eq "work"].value eq "x"', None),
    ('emails[type eq "work" and value eq "cat@example.org"]', "cat"),
    ('emails.value co "example"', "ann cat"),
    ('displayName sw "an" and active eq true', "ann"),
    ('active eq "False"', "cat"),
    ('not (userName sw "ann") or name.familyName eq "Lee"', "ann cat"),
    ('userName ne "ann@example.org"', "cat"),
    ("externalId pr", "ann"),
    ('meta.created gt "2020-01-01T00:00:00Z"', "ann cat"),
    ('(userName eq "a" or (userName eq "b")) and active eq true', ""),
    ('groups.value eq "{group}"', "ann"),
    ('id eq "{ann}"', "ann"),
    ("groups pr", "ann"),
    ('id eq "nonsense"', ""),
    ("userName eq ann", None),
    ('userName zz "ann"', None),
    ("userName eq", None),
    ("userName eq true", None),
    ('password eq "x"', None),
    ('userName eq "a" userName', None),
    ("(" * 60 + "active pr" + ")" * 60, None),
    (" or ".join(["active pr"] * 60), None),
    ('userName eq "\\u0000"', None),
    ('userName eq "\\ud800"', None),
    ('userName eq "' + "x" * 3000 + '"', None),
    ('displayName eq "%_"', ""),
]


def test_users_by_filter(directory: Directory) -> None:
    """None: refused, and the refusal says that it is the filter."""
    ann = directory.add_user(
        ANN, externalId="00Ua", displayName="Ann", name={"familyName": "Lee", "givenName": "Ann"}
    )
    directory.add_user(CAT, active=False)
    group = directory.add_group("ops", ann)
    directory.add_group("dev", ann)  # in two of them, found once
    for pattern, names in FILTERS:
        text = pattern.replace("{group}", group).replace("{ann}", ann)
        if names is None:
            response = directory.get(f"/Users?{urlencode({'filter': text})}")
            assert (response.status_code, response.body.get("scimType")) == (400, "invalidFilter"), text[:200]
        else:
            assert found(directory, "Users", text) == [f"{name}@example.org" for name in names.split()], text


def test_groups_by_filter_as_entra_and_okta_ask(directory: Directory) -> None:
    ann, cat = directory.add_user(ANN), directory.add_user(CAT)
    ops = directory.add_group("ops", ann, cat, externalId="E1")
    directory.add_group("dev", cat)
    assert found(directory, "Groups", 'displayName eq "OPS"', excludedAttributes="members") == ["ops"]
    assert found(directory, "Groups", f'members.value eq "{cat}"') == ["ops", "dev"]
    assert found(directory, "Groups", f'members[value eq "{ann}"]') == ["ops"]
    assert found(directory, "Groups", f'id eq "{ops}" and members eq "{ann}"') == ["ops"]
    assert found(directory, "Groups", 'externalId eq "E1"') == ["ops"]
    assert found(directory, "Groups", "members pr") == ["ops", "dev"]
    without = directory.get("/Groups?excludedAttributes=members").body["Resources"]
    assert all("members" not in each for each in without)
    only = directory.get("/Groups?attributes=displayName").body["Resources"][0]
    assert only.keys() == {"schemas", "id", "displayName"}
    for name in (
        "members",
        f"{GROUP}:members",
        f"{GROUP}:members.value",
    ):  # RFC 7644, 3.10: with its schema, too
        first = directory.get(f"/Groups?attributes={name}").body["Resources"][0]
        assert {each["value"] for each in first["members"]} == {ann, cat}, name


def test_text_may_spell_a_character_that_it_must_not_contain(directory: Directory) -> None:
    ann = directory.add_user(ANN, displayName=r"C:\u0000")
    assert directory.get(f"/Users/{ann}").body["displayName"] == r"C:\u0000"
    nul = directory.call("POST", "/Users", {"schemas": [USER], "userName": CAT, "displayName": "C:\u0000"})
    assert (nul.status_code, nul.body["scimType"]) == (400, "invalidValue")


def test_a_search_by_post_is_the_same_as_a_list(directory: Directory) -> None:
    ann = directory.add_user(ANN)
    directory.add_user(CAT)
    asked = {"filter": f'userName eq "{ANN}"', "attributes": ["userName"], "startIndex": 1, "count": 5}
    body = directory.call("POST", "/Users/.search", asked).body
    assert (body["totalResults"], body["Resources"][0]["id"]) == (1, ann)
    assert body["Resources"][0].keys() == {"schemas", "id", "userName"}
    wrong = directory.call("POST", "/Groups/.search", {"filter": "active pr"})
    assert (wrong.status_code, wrong.body["scimType"]) == (400, "invalidFilter")


def test_pages(directory: Directory) -> None:
    for n in range(5):
        directory.add_user(f"u{n}@example.org")
    seen = []
    for start in (1, 3, 5):
        body = directory.get(f"/Users?startIndex={start}&count=2").body
        assert (body["totalResults"], body["startIndex"]) == (5, start)
        assert body["itemsPerPage"] == len(body["Resources"])
        seen += [each["userName"][:2] for each in body["Resources"]]
    assert seen == ["u0", "u1", "u2", "u3", "u4"]
    for query, n in (
        ("count=0", 0),
        ("startIndex=-3&count=-1", 0),
        ("startIndex=99", 0),
        ("startIndex=0", 5),
    ):
        body = directory.get(f"/Users?{query}").body
        assert (body["totalResults"], len(body["Resources"])) == (5, n), query
    for query in ("startIndex=x", "count=1e3", "count=" + "9" * 5000):
        assert directory.get(f"/Users?{query}").status_code in (200, 400)


PATCHES: list[tuple[dict[str, Any], str, Any]] = [
    ({"op": "Replace", "value": {"name.givenName": "Anne"}}, "name.givenName", "Anne"),
    ({"op": "Add", "path": "name.familyName", "value": "Li"}, "name.familyName", "Li"),
    (
        {"op": "replace", "path": "name", "value": {"givenName": "B"}},
        "name",
        {"givenName": "B", "familyName": "Lee"},
    ),
    ({"op": "remove", "path": "name"}, "name", None),
    ({"op": "remove", "path": "displayName"}, "displayName", None),
    ({"op": "Replace", "path": "externalId", "value": "x"}, "externalId", "x"),
    ({"op": "Replace", "path": "active", "value": "False"}, "active", False),
    ({"op": "Replace", "path": "active", "value": [{"value": "False"}]}, "active", False),
    (
        {"op": "Replace", "value": {"urn:ietf:params:scim:schemas:core:2.0:User:displayName": "D"}},
        "displayName",
        "D",
    ),
    (
        {"op": "Replace", "value": {'emails[type eq "work"].value': "a2@example.org"}},
        "email",
        "a2@example.org",
    ),
    (
        {"op": "Add", "path": 'emails[primary eq "True"].value', "value": "a3@example.org"},
        "email",
        "a3@example.org",
    ),
    ({"op": "Add", "path": 'emails[type eq "home"].value', "value": "a4@example.org"}, "email", ANN),
    ({"op": "add", "path": "emails", "value": [{"value": "a5@example.net", "type": "home"}]}, "email", ANN),
    ({"op": "replace", "path": "emails", "value": [{"value": "a6@example.org"}]}, "email", "a6@example.org"),
    ({"op": "remove", "path": "emails"}, "email", ANN),
    ({"op": "Add", "path": "title", "value": "Engineer"}, "displayName", "Ann"),
    ({"op": "Add", "path": 'phoneNumbers[type eq "work"].value', "value": "1"}, "displayName", "Ann"),
    (
        {
            "op": "Add",
            "path": "urn:ietf:params:scim:schemas:extension:enterprise:2.0:User:department",
            "value": "R",
        },
        "displayName",
        "Ann",
    ),
    ({"op": "replace", "value": {"id": "x", "meta": {}, "displayName": "D"}}, "displayName", "D"),
]


def test_users_as_directories_change_them(directory: Directory) -> None:
    ann = directory.add_user(ANN, displayName="Ann", name={"familyName": "Lee", "givenName": "Ann"})
    for operation, attribute, value in PATCHES:
        with transaction.atomic():
            response = directory.patch(f"/Users/{ann}", operation)
            transaction.set_rollback(True)
        assert response.status_code == 200, (operation, response.body)
        if attribute == "email":
            assert response.body["emails"][0]["value"] == value, operation
            continue
        part: Any = response.body
        for name in attribute.split("."):
            part = part.get(name)
        assert part == value, operation


def test_a_patch_of_a_user_that_is_wrong_says_what(directory: Directory) -> None:
    ann = directory.add_user(ANN)
    for operation, scim_type in (
        ({"op": "replace", "path": "usrName", "value": "x"}, "invalidPath"),
        ({"op": "replace", "path": "active", "value": "maybe"}, "invalidValue"),
        ({"op": "remove", "path": "userName"}, "invalidValue"),
        ({"op": "replace", "path": "groups", "value": []}, "mutability"),
        ({"op": "replace", "path": 'emails[type eq "work"', "value": "x"}, "invalidPath"),
        ({"op": "replace", "path": "emails[type zz 1].value", "value": "x"}, "invalidFilter"),
        ({"op": "replace", "path": 7, "value": "x"}, "invalidPath"),
        ({"op": "replace", "value": "x"}, "invalidValue"),
        ({"op": "replace", "path": "name", "value": "x"}, "invalidValue"),
    ):
        response = directory.patch(f"/Users/{ann}", operation)
        assert (response.status_code, response.body["scimType"]) == (400, scim_type), (
            operation,
            response.body,
        )
    for body in (
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"[" * 100_000,
        b'{"userName": "\\ud800"}',
        b'{"userName": "\\u0000"}',
        b"\xff",
    ):
        response = directory.call("POST", "/Users", body)
        assert response.status_code == 400, body[:20]
