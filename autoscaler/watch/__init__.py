"""The watcher of a cell, inside the control worker: what must happen in milliseconds, not at the next beat.

Two threads. `watcher` hears and scans Redis and never asks Postgres: ready replicas are routed to, dead ones are
withdrawn, whatever else is away. `recorder` writes rows and ticks deployments, and may have to wait for Postgres.
"""
