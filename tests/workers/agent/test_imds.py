"""What a machine asks its metadata service, against one that keeps to AWS's contract."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.cloud.imds import Imds, signed
from workers.agent.imds import REBALANCE_HORIZON_S, Metadata, MetadataError


@pytest.fixture
def imds() -> Iterator[Imds]:
    made = Imds({"/meta-data/tags/instance/corral:machine": "ab" * 16})
    yield made
    made.close()


def _metadata(imds: Imds) -> Metadata:
    return Metadata({"AWS_EC2_METADATA_SERVICE_ENDPOINT": imds.url, "HTTP_PROXY": "http://127.0.0.1:1"})


def test_its_own_tag_is_read_with_a_session_token_whatever_the_proxy(
    imds: Imds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert _metadata(imds).tag("corral:machine") == "ab" * 16
    assert len(imds.tokens) == 1
    assert imds.n_unauthorized == 0
    with pytest.raises(MetadataError, match="no tag 'other'"):
        _metadata(imds).tag("other")


def test_a_token_that_ended_is_renewed_once(imds: Imds) -> None:
    metadata = _metadata(imds)
    metadata.tag("corral:machine")
    imds.tokens.clear()
    assert metadata.tag("corral:machine") == "ab" * 16
    assert imds.n_unauthorized == 1


def test_its_identity_is_passed_on_byte_for_byte(imds: Imds) -> None:
    identity = signed({"instanceId": "i-1", "region": "r", "accountId": "1"})
    imds.paths["/dynamic/instance-identity/document"] = identity["document"]
    with pytest.raises(MetadataError, match="identity"):
        _metadata(imds).identity()
    wrapped = identity["signature"][:64] + "\n" + identity["signature"][64:]
    imds.paths["/dynamic/instance-identity/signature"] = wrapped
    found = _metadata(imds).identity()
    assert (found.document, found.signature) == (identity["document"], identity["signature"])


def test_a_notice_says_when_and_outranks_a_recommendation(imds: Imds) -> None:
    metadata, now_s = _metadata(imds), time.time()
    assert metadata.notice(now_s) is None
    imds.recommend_rebalance()
    advised = metadata.notice(now_s)
    assert advised is not None
    assert advised.ends_at_s - now_s == pytest.approx(REBALANCE_HORIZON_S, abs=5)
    imds.interrupt(120)
    noticed = metadata.notice(now_s)
    assert noticed is not None
    assert noticed.ends_at_s - now_s == pytest.approx(120, abs=5)
    imds.interrupt(120, action="hibernate")
    at_once = metadata.notice(now_s)
    assert at_once is not None
    assert at_once.ends_at_s == now_s


@pytest.mark.parametrize("answer", ["", "{}", "[]", json.dumps({"action": "terminate", "time": "soon"})])
def test_nonsense_is_an_error_and_not_an_all_clear(imds: Imds, answer: str) -> None:
    imds.paths["/meta-data/spot/instance-action"] = answer
    with pytest.raises(MetadataError):
        _metadata(imds).notice(0.0)


def test_no_service_is_an_error_within_its_time(imds: Imds) -> None:
    imds.close()
    with pytest.raises(MetadataError):
        _metadata(imds).tag("corral:machine")
    with pytest.raises(MetadataError, match="AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        Metadata({"AWS_EC2_METADATA_SERVICE_ENDPOINT": "ftp://x"})
