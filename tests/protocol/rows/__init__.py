"""One test per row of "when things break" (docs/architecture.md): what exactly is promised when this happens.

Each builds a small cell on virtual time, breaks one thing at a chosen moment and looks; `rest()` then checks every
promise that holds always: text equal to an undisturbed run, one end, billed once as journaled, nothing held or left.
"""
