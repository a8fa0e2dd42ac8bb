"""One gateway process put together: connections, caches and tasks in the order they start and stop.

Called by __main__ and by tests. Starts without Redis or Postgres and says so in /readyz; both are reconnected
to for as long as it runs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path

import msgspec
import uuid_utils

from controlplane.gateway.app import GatewayApp
from controlplane.gateway.auth import KeyCache
from controlplane.gateway.config import GatewayConfig
from controlplane.gateway.decisions import Decisions
from controlplane.gateway.directory import KeyDirectory, PgDirectory
from controlplane.gateway.dispatch import Dispatcher
from controlplane.gateway.ends import Ends
from controlplane.gateway.errors import from_wire, unavailable
from controlplane.gateway.feed import ChangeFeed
from controlplane.gateway.forecasts import Forecasts
from controlplane.gateway.generate import Generator
from controlplane.gateway.identity import Digests
from controlplane.gateway.metrics import GatewayMetrics
from controlplane.gateway.opening import Opener
from controlplane.gateway.placements import Placements
from controlplane.gateway.requestlog import RequestLog
from controlplane.gateway.resume import Resumer
from controlplane.gateway.routes import RouteTable
from controlplane.gateway.shadows import FIRST_NUMBER, Shadows
from controlplane.gateway.stages import StageBoard
from controlplane.gateway.watch import Watch
from controlplane.prediction.lengths.model import LengthModel
from controlplane.prediction.lengths.model import load as load_lengths
from controlplane.tenants.api_keys import Peppers
from workers.contract import Notice
from workers.keys import CellKeys
from workers.redis_client import Client, RedisError, Subscriber
from workers.scripts import MACHINE_SCRIPTS, TRUSTED_SCRIPTS

log = logging.getLogger(__name__)

# Those of the machines too: a machine's user may not load scripts, so whoever connects to a fresh Redis does.
_SCRIPTS = (*TRUSTED_SCRIPTS, *MACHINE_SCRIPTS)
_decode_notice = msgspec.msgpack.Decoder(Notice).decode


class Gateway:
    """The parts of one process. `id` names it in Redis; it is new at every start, so nobody answers to an old
    one."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        directory: KeyDirectory | None = None,
        request_log: RequestLog | None = None,
    ) -> None:
        self.config = config
        self.id: str = uuid_utils.uuid7().hex
        self.draining = False
        keys = self.keys = CellKeys(config.cell)
        self.redis = Client(
            config.redis_url, name=f"gateway-{config.name}", scripts=_SCRIPTS, greeting=self._mark_birth
        )
        self.subscriber = Subscriber(
            config.redis_url, name=f"gateway-{config.name}", on_message=self._on_message, on_gap=self._on_gap
        )
        self._pg = (
            None
            if directory is not None
            else PgDirectory(
                config.pg_dsn, cell=config.cell, pool_size=config.pg_pool_size, pooled=config.pg_pooled
            )
        )
        self.directory: KeyDirectory = directory or self._pg  # type: ignore[assignment]
        self.key_cache = KeyCache(
            self.directory,
            Peppers(config.key_pepper, config.key_pepper_previous, config.key_pepper_next),
            fresh_s=config.key_fresh_s,
            stale_s=config.key_stale_s,
            unknown_s=config.unknown_key_s,
            max_keys=config.key_cache_size,
        )
        self.feed = ChangeFeed(self.directory, self.key_cache, poll_s=config.change_poll_s)
        self.routes = RouteTable(self.redis, keys)
        self.placements = Placements(self.redis, keys, self.id, self.routes)
        self.forecasts = Forecasts(self.routes)
        self.ends = Ends(self.redis, keys, self.routes, self.id, self.forecasts)
        self.inbox = self.ends.inbox
        self.decisions = Decisions(
            self.redis,
            keys,
            config.name,
            self.routes,
            self.forecasts,
            sample=config.decision_sample,
            url=config.console_url,
        )
        self.digests = Digests(config.digest_secret or config.key_pepper)
        opener = self._opener(load_lengths(Path(config.length_model)) if config.length_model else None)
        self.dispatcher = self._dispatcher(opener, self.decisions, queue_bound=config.queue_bound)
        # Copies never wait for a slot, and their admissions are no decisions that anybody asks about.
        silent = Decisions(
            self.redis, keys, config.name, self.routes, self.forecasts, sample=0, url=config.console_url
        )
        copier = self._opener(first_number=FIRST_NUMBER)
        self.shadows = Shadows(
            self.redis,
            keys,
            self.routes,
            self.ends,
            copier,
            self._dispatcher(copier, silent, queue_bound=0),
        )
        self.resumer = Resumer(
            self.redis,
            keys,
            self.id,
            opener,
            self.dispatcher,
            self.ends,
            self.digests,
            timeout_s=config.request_timeout_s,
        )
        self.board = StageBoard(self.redis, keys, self.ends, comment_after_s=config.comment_after_s)
        self.watch = Watch(
            self.redis,
            self.ends,
            stall_s=config.stall_s,
            keepalive_s=config.keepalive_s,
            redis_grace_s=config.redis_grace_s,
        )
        self.metrics = GatewayMetrics(config.name)
        self.request_log = request_log or RequestLog(config.log_sample)
        generator = Generator(opener, self.dispatcher, self.resumer, self.ends, self.board, self.shadows)
        self.app = GatewayApp(
            config,
            self.key_cache,
            generator,
            self.metrics,
            self.request_log,
            self.not_ready,
            self.decisions,
        )
        self._channels = {
            keys.invalidate_channel.encode(): self._on_invalidate,
            keys.route_channel.encode(): self._on_route,
            keys.placed_channel.encode(): self.placements.on_placed,
            keys.stage_channel.encode(): self.board.on_stage,
            keys.notice_channel(self.id).encode(): self._on_notice,
        }
        self._publish_internals()

    async def start(self) -> None:
        """Start everything; waits a moment for Redis, and goes on without it."""
        self.redis.start()
        self.subscriber.start()
        if self._pg is not None:
            await self._pg.open()
        self.feed.start()
        self.routes.start()
        self.watch.start()
        with contextlib.suppress(RedisError):
            await self.redis.connect()
            await self.subscriber.psubscribe(self.keys.gateway_pattern(self.id))
        with contextlib.suppress(RedisError):
            await self.subscriber.subscribe(*(channel.decode() for channel in self._channels))

    async def close(self) -> None:
        """Stop everything; requests still under way are cancelled on the cell, not waited for."""
        await self.watch.close()
        await self.feed.close()
        await self.board.close()
        await self.shadows.close()
        await self.ends.drain()
        await self.inbox.close()
        self.placements.close()
        self.decisions.close()
        await self.routes.close()
        await self.subscriber.close()
        await self.redis.close()
        if self._pg is not None:
            await self._pg.close()
        await self.request_log.close()

    def _opener(self, lengths: LengthModel | None = None, *, first_number: int = 0) -> Opener:
        return Opener(
            self.ends,
            request_timeout_s=self.config.request_timeout_s,
            stream_buffer=self.config.stream_buffer,
            lengths=lengths,
            first_number=first_number,
        )

    def _dispatcher(self, opener: Opener, decisions: Decisions, *, queue_bound: int) -> Dispatcher:
        config = self.config
        return Dispatcher(
            self.redis,
            self.keys,
            self.id,
            self.directory,
            self.routes,
            self.ends,
            opener,
            queue_bound=queue_bound,
            queue_age_s=config.queue_age_s,
            request_timeout_s=config.request_timeout_s,
            digests=self.digests,
            placements=self.placements,
            forecasts=self.forecasts,
            decisions=decisions,
        )

    def end_streams(self) -> None:
        """The grace is over: what still runs is told to go on elsewhere. A plain request that nobody could collect is
        cancelled."""
        for stream in list(self.inbox.streams.values()):
            stream.keep = stream.keep or stream.streaming
            how = "with the Last-Event-ID of the last event" if stream.streaming else "again"
            stream.fail(unavailable("gateway_stopping", f"the gateway restarts: send the request {how}"))

    def not_ready(self) -> list[str]:
        """What keeps this process from serving. Postgres is not among it: known keys go on without."""
        parts = {
            "draining": self.draining,
            "redis": not self.redis.connected,
            "subscription": not self.subscriber.connected,
        }
        return [name for name, failing in parts.items() if failing]

    # -- messages

    def _mark_birth(self, again: bool) -> tuple[str | int, ...]:
        """A Redis that this process knew and that has forgotten everything: its rate limits fill from empty."""
        return ("SET", self.keys.born, time.time_ns() // 1_000_000 if again else 0, "NX")

    def _on_message(self, channel: bytes, payload: bytes) -> None:
        handler = self._channels.get(channel)
        if handler is not None:
            handler(payload)
        else:
            self.inbox.on_frame(channel, payload)

    def _on_gap(self) -> None:
        self.key_cache.doubt_all()
        self.inbox.catch_up_all()

    def _on_invalidate(self, payload: bytes) -> None:
        self.key_cache.invalidate(payload.decode("utf-8", "replace"))

    def _on_route(self, payload: bytes) -> None:
        self.routes.on_change(payload.decode("utf-8", "replace"))

    def _on_notice(self, payload: bytes) -> None:
        try:
            notice = _decode_notice(payload)
        except ValueError:
            log.warning("undecodable notice")
            return
        for stream in self.inbox.streams.values():  # rare enough for a search
            if stream.request == notice.request and notice.stream in (0, stream.number):
                stream.keep = False
                stream.fail(from_wire(notice.error))
                return

    def _publish_internals(self) -> None:
        """Figures of the parts, read when /metrics is asked."""
        inbox, cache, ends, watch, resumer = self.inbox, self.key_cache, self.ends, self.watch, self.resumer
        pg = self._pg
        name = "corral_gateway_"
        self.metrics.gauges |= {
            f"{name}in_flight": ("Generation requests under way.", lambda: self.app.n_in_flight),
            f"{name}shadow_copies_running": ("Copies to shadows under way.", lambda: self.shadows.n_running),
            f"{name}streams": ("Streams known, cancelled ones included.", lambda: len(inbox.streams)),
            f"{name}redis_up": ("Whether Redis is connected.", lambda: float(self.redis.connected)),
            f"{name}prediction_coverage": (
                "Least share of first tokens within their predicted 90 % quantile.",
                self.forecasts.coverage,
            ),
            f"{name}predictions_failing": (
                "Deployments and classes whose predictions do not hold: the queue's bound decides there.",
                self.forecasts.n_failing,
            ),
            f"{name}postgres_up": ("Whether Postgres answered last.", lambda: float(pg is None or pg.up)),
        }
        self.metrics.counters |= {
            f"{name}frames": ("Frames received.", lambda: inbox.n_frames),
            f"{name}frame_entries": ("Entries in them.", lambda: inbox.n_entries),
            f"{name}entries_unknown": ("Entries for no stream here.", lambda: inbox.n_unknown),
            f"{name}entries_foreign": (
                "Entries from a machine the request is not on.",
                lambda: inbox.n_foreign,
            ),
            f"{name}entries_repeated": ("Entries received before.", lambda: inbox.n_repeated),
            f"{name}frames_bad": ("Frames that do not decode.", lambda: inbox.n_bad_frames),
            f"{name}catch_ups": ("Journals consulted.", lambda: inbox.n_catch_ups),
            f"{name}stalls": ("Streams looked at because they were silent.", lambda: watch.n_stalls),
            f"{name}timeouts": ("Requests past their deadline.", lambda: watch.n_timeouts),
            f"{name}resumed": ("Clients that came back for a request.", lambda: resumer.n_resumed),
            f"{name}continued": ("Cancelled requests continued.", lambda: resumer.n_continued),
            f"{name}settled": ("Requests settled here.", lambda: ends.n_settled),
            f"{name}placements_untold": (
                "Placements that other gateways were not told of.",
                lambda: self.placements.n_dropped,
            ),
            f"{name}unattainable": (
                "Requests refused because their target would probably be missed.",
                lambda: self.forecasts.n_refused,
            ),
            f"{name}decisions_told": ("Decisions told.", lambda: self.decisions.n_told),
            f"{name}decisions_dropped": (
                "Decisions beyond what one tenant or second may have.",
                lambda: self.decisions.n_dropped,
            ),
            f"{name}shadow_copies": ("Copies that shadows answered.", lambda: self.shadows.n_copied),
            f"{name}shadow_skips": (
                "Requests chosen for a shadow and not copied.",
                lambda: self.shadows.n_skipped,
            ),
            f"{name}cancelled": ("Cancels sent.", lambda: ends.n_cancelled),
            f"{name}key_cache_hits": ("Keys found fresh in the cache.", lambda: cache.n_hits),
            f"{name}key_lookups": ("Keys asked of Postgres.", lambda: cache.n_lookups),
            f"{name}key_stale_served": ("Stale keys served with Postgres away.", lambda: cache.n_stale),
            f"{name}redis_disconnects": ("Connections to Redis lost.", lambda: self.redis.n_disconnects),
            f"{name}redis_unsent": ("Commands that could not be sent.", lambda: self.redis.n_fire_errors),
            f"{name}log_lines_dropped": ("Log lines lost.", lambda: self.request_log.n_dropped),
        }
