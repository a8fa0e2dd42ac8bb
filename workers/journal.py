"""What an attempt inherits: the journal of earlier attempts, checked and joined.

Called by serve.py with what the claim script returned. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.contract import JournalEntry, decode_journal_entry


class JournalBroken(ValueError):  # noqa: N818 - a state of the journal
    """Entries do not join without gap from 0, or disagree with the lease's count: nothing can be resumed."""


@dataclass(frozen=True, slots=True)
class Inherited:
    """Output accepted from earlier attempts; the next offset is `len(token_ids)`."""

    token_ids: list[int] = field(default_factory=list)


def inherit(entries: Sequence[bytes], n_expected: int) -> Inherited:
    """Join journal entries (msgpack `JournalEntry`, in order). JournalBroken unless they hold `n_expected`
    tokens.
    """
    token_ids: list[int] = []
    for payload in entries:
        entry: JournalEntry = decode_journal_entry(payload)
        if entry.offset != len(token_ids):
            raise JournalBroken(f"journal entry at offset {entry.offset}, expected {len(token_ids)}")
        token_ids += entry.token_ids
    if len(token_ids) != n_expected:
        raise JournalBroken(f"journal holds {len(token_ids)} tokens, the lease says {n_expected}")
    return Inherited(token_ids)
