"""A client that comes back: attached, replayed or continued through any gateway process, charged once."""
