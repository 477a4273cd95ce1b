"""A rich console that shows text as text: no markup, nothing that would steer the terminal (``cli.terminal``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from capotune.cli.terminal import STEERING, harmless


def terminal(*, stderr: bool = False) -> Console:
    """A rich console that shows text as text."""
    return _Terminal(stderr=stderr, markup=False, emoji=False)


class _Terminal(Console):
    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or not STEERING.search(segment.text):
                yield segment
            else:
                yield Segment(harmless(segment.text), segment.style)
