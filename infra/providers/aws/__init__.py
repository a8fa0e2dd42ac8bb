"""Machines of Amazon EC2: bought by CreateFleet, found by tags, told about by metadata, EventBridge and price feeds."""
