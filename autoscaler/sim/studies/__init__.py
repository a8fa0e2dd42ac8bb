"""Experiments behind the tables of docs/results/: one module each, run by `manage.py study NAME`.

A module has HELP (one line), add_arguments(parser) and run(options, progress) -> Study.
"""
