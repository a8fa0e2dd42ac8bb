"""Text stands out from its background by WCAG 2.2 AA (4.5 : 1), in light and in dark."""

import re
from pathlib import Path

import pytest

import controlplane.console

CSS = (Path(controlplane.console.__path__[0]) / "static/console/console.css").read_text()
SCHEMES = dict(zip(("light", "dark"), re.findall(r":root \{(.*?)\n\s*\}", CSS, re.DOTALL), strict=True))
PAIRS = [
    ("ink", "bg"), ("ink", "surface"), ("muted", "bg"), ("muted", "surface"), ("muted", "rest-soft"),
    ("muted", "sunken"), ("accent", "bg"), ("accent", "surface"), ("accent", "accent-soft"), ("bad", "surface"),
    ("ok", "ok-soft"), ("busy", "busy-soft"), ("warn", "warn-soft"), ("bad", "bad-soft"), ("rest", "rest-soft"),
    ("button-ink", "button"),
]  # fmt: skip


def luminance(colour: str) -> float:
    """Relative luminance of `#rgb` or `#rrggbb` (WCAG 2.2, definition)."""
    digits = colour.removeprefix("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("text", "ground"), PAIRS)
def test_text_stands_out(scheme: str, text: str, ground: str) -> None:
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", SCHEMES[scheme]))
    darker, lighter = sorted((luminance(colours[text]), luminance(colours[ground])))
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5
