"""Long operations: each step once, taken up again when a worker dies, bounded in tries and in time."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from django.utils import timezone

from controlplane.errors import ConflictError, NotFoundError
from controlplane.operations import advance as advancing
from controlplane.operations import services, tasks
from controlplane.operations.advance import Again, Claim, Done, LostClaimError, advance
from controlplane.operations.models import Operation, State
from controlplane.tenants.context import tenant
from tests.database import acting_as
from tests.world import World


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """The handlers of this test only."""
    found: dict = {}
    monkeypatch.setattr(advancing, "_HANDLERS", found)
    yield found


def begin(world: World, kind: str = "count", **values) -> Operation:
    return services.begin(organization_id=world.organization.id, kind=kind, **values)


def step(row: Operation, *, due: bool = True) -> Operation:
    with acting_as("corral_operator"):
        if due:
            Operation.objects.filter(pk=row.pk).update(next_at=timezone.now())
        advance(row.id)
        return Operation.objects.get(pk=row.pk)


def test_it_goes_on_step_by_step_to_its_result(world: World, handlers: dict) -> None:
    steps = iter([Again(30, "first"), Again(150, "second"), Done({"n": 3}, "all counted")])
    handlers["count"] = lambda _: next(steps)
    row = begin(world, subject="prj_x")
    assert (row.state, row.progress) == (State.PENDING, 0)
    assert row.actor == "corral_app"
    row = step(row)
    assert (row.state, row.progress, row.message) == (State.RUNNING, 30, "first")
    assert step(row, due=False).message == "first", "not before it is due"
    assert step(row).progress == 99, "100 is for the end"
    row = step(row)
    assert (row.state, row.progress, row.result) == (State.SUCCEEDED, 100, {"n": 3})
    assert row.finished_at is not None
    assert step(row).version == row.version, "what has ended stays"


def test_a_refusal_of_its_handler_ends_it(world: World, handlers: dict) -> None:
    def refuse(_: Claim) -> Done:
        raise ConflictError("somebody else did it", code="superseded")

    handlers["count"] = refuse
    row = step(begin(world))
    assert (row.state, row.error_code, row.error_message) == (
        State.FAILED,
        "superseded",
        "somebody else did it",
    )


def test_a_step_that_breaks_is_tried_again_a_few_times(world: World, handlers: dict) -> None:
    calls = []

    def broken(_: Claim) -> Done:
        calls.append(1)
        raise ZeroDivisionError

    handlers["count"] = broken
    row = begin(world)
    for n in range(1, advancing.MAX_FAILURES):
        row = step(row)
        assert (row.state, row.n_failures) == (State.RUNNING, n)
        assert row.next_at > timezone.now()
    row = step(row)
    assert (row.state, row.error_code) == (State.FAILED, "internal_error")
    assert len(calls) == advancing.MAX_FAILURES


def test_what_is_not_done_at_its_deadline_has_failed(world: World, handlers: dict) -> None:
    handlers["count"] = lambda _: Again(10, "slow")
    row = step(begin(world, max_s=60))
    with acting_as("corral_operator"):
        Operation.objects.filter(pk=row.pk).update(deadline_at=timezone.now())
    row = step(row)
    assert (row.state, row.error_code) == (State.FAILED, "deadline_passed")
    assert "slow" in row.error_message
    row = step(begin(world, kind="of tomorrow"))
    assert (row.state, row.error_code) == (State.FAILED, "unknown_kind")


def test_a_worker_that_dies_leaves_it_to_the_next(world: World, handlers: dict) -> None:
    class Death(BaseException):
        pass

    def dies(_: Claim) -> Done:
        raise Death

    handlers["count"] = dies
    row = begin(world)
    with pytest.raises(Death):
        step(row)
    handlers["count"] = lambda _: Done()
    assert step(row, due=False).state == State.RUNNING, "its lease is not over"
    assert step(row).state == State.SUCCEEDED


def test_who_lost_the_claim_writes_nothing(world: World, handlers: dict) -> None:
    def slow(claim: Claim) -> Done:
        claim.report(20, "alive")
        Operation.objects.filter(pk=claim.row.pk).update(version=99, message="another has it")
        with pytest.raises(LostClaimError):
            claim.report(40, "still me?")
        return Done()

    handlers["count"] = slow
    row = step(begin(world))
    assert (row.state, row.message, row.progress) == (State.RUNNING, "another has it", 20)


def test_of_two_workers_that_see_it_due_at_once_one_has_it(
    world: World, handlers: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = begin(world)
    seen = Operation.objects.get
    with acting_as("corral_operator"):
        stale = seen(pk=row.pk)  # what the slower one read
        assert advancing._claim(row.id) is not None
        monkeypatch.setattr(advancing.Operation.objects, "filter", _stale_first(stale))
        assert advancing._claim(row.id) is None


def _stale_first(stale: Operation):
    """The first read answers what is no longer so; everything after it the truth."""
    real, reads = Operation.objects.get_queryset, []

    class First:
        def first(self) -> Operation:
            return stale

    def found(*args, **values):
        if not reads:
            reads.append(1)
            return First()
        return real().filter(*args, **values)

    return found


def test_the_same_again_is_the_one_that_is_open_and_their_number_is_bounded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "MAX_OPEN", 2)
    first = begin(world, params={"n": 1})
    assert begin(world, params={"n": 1}).id == first.id
    begin(world, params={"n": 2})
    with pytest.raises(services.TooManyOperationsError):
        begin(world, params={"n": 3})
    services.begin(organization_id=world.other_organization.id, kind="count")  # not their matter


def test_a_stranger_finds_none(world: World) -> None:
    row = begin(world)
    with tenant(world.other_organization.id), pytest.raises(NotFoundError):
        services.operation(organization_id=world.other_organization.id, operation_id=row.id)


def test_what_ended_long_ago_is_forgotten(world: World, handlers: dict) -> None:
    handlers["count"] = lambda _: Done()
    old, new = (step(begin(world, params={"n": n})) for n in range(2))
    with acting_as("corral_operator"):
        Operation.objects.filter(pk=old.pk).update(
            finished_at=timezone.now() - tasks.KEEP - timedelta(seconds=1)
        )
        tasks.forget()
        assert [row.pk for row in Operation.objects.all()] == [new.pk]
