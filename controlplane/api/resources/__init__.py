"""One file for each kind of resource: its schemas and operations."""
