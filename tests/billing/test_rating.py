"""The price book reads each version once and keeps a bounded number."""

from uuid import UUID

from billing.money import NanoPerMillion, Rates
from billing.rating import PriceBook
from controlplane.ids import new_id

RATES = Rates(NanoPerMillion(1), NanoPerMillion(1), NanoPerMillion(2))


class Fetch:
    def __init__(self, *known: UUID) -> None:
        self.known = set(known)
        self.asked: list[set[UUID]] = []

    def __call__(self, wanted: set[UUID]) -> dict[UUID, Rates]:
        self.asked.append(wanted)
        return dict.fromkeys(wanted & self.known, RATES)


def test_a_version_is_fetched_once() -> None:
    version = new_id()
    fetch = Fetch(version)
    book = PriceBook(fetch)
    assert book.rates([version, version]) == book.rates([version]) == {version: RATES}
    assert fetch.asked == [{version}]


def test_an_unknown_version_is_absent_and_asked_for_again() -> None:
    version = new_id()
    fetch = Fetch()
    book = PriceBook(fetch)
    assert book.rates([version]) == {}
    fetch.known.add(version)
    assert book.rates([version]) == {version: RATES}


def test_it_keeps_no_more_than_it_may() -> None:
    old, *young = [new_id() for _ in range(3)]
    fetch = Fetch(old, *young)
    book = PriceBook(fetch, max_kept=2)
    for version in (old, *young):
        book.rates([version])
    assert set(book.rates(young)) == set(young)
    assert len(fetch.asked) == 3
    assert set(book.rates([old])) == {old}
    assert len(fetch.asked) == 4
