"""The typed Python client: generated from the OpenAPI document, never committed. See generate.py."""
