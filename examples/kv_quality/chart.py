"""A dot chart as plain SVG: one line per format, the increase of perplexity on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, TOP, STEP = 860, 290, 120, 66, 24
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f } .title { font-size: 15px; font-weight: 600 }
.soft { fill: #57606a } .grid { stroke: #d0d7de } .stem { stroke: #0969da; stroke-width: 2 } .dot { fill: #0969da }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .soft { fill: #9198a1 } .grid { stroke: #3d444d }
.stem { stroke: #4493f8 } .dot { fill: #4493f8 } }
"""


def chart(points: Sequence[tuple[str, float, float]], baseline: str, perplexity: float) -> str:
    """SVG of (format, bits per element, increase of perplexity in percent), smallest increase first.

    An increase below 0.001 %, or a decrease, stands at the left end of the axis; the number is written beside it.
    """
    ordered = sorted(points, key=lambda p: p[2])
    largest = max((p[2] for p in ordered), default=1.0)
    smallest = min((p[2] for p in ordered if p[2] >= 0.001), default=1.0)
    low = math.floor(math.log10(smallest))
    high = max(low + 1, math.ceil(math.log10(max(largest, smallest))))
    bottom = TOP + STEP * len(ordered)

    def x(value: float) -> float:
        share = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 56}" role="img" '
        f'aria-label="Increase of perplexity by cache format">',
        f"<style>{STYLE}</style>",
        '<text class="title" x="12" y="24">What a key-value cache format costs</text>',
        f'<text class="soft" x="12" y="46">increase of perplexity over {escape(baseline)} ({perplexity:.2f}); '
        "the number after a name is bits per element</text>",
    ]
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{bottom}"/>')
        parts.append(f'<text class="soft" x="{at:.1f}" y="{bottom + 20}" text-anchor="middle">{10.0**power:g} %</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="soft" x="{middle}" y="{bottom + 44}" text-anchor="middle">increase of perplexity, '
        "logarithmic</text>"
    )
    for i, (name, bits, increase) in enumerate(ordered):
        y, at = TOP + STEP * i + STEP / 2, x(increase)
        parts.append(f'<text x="{LEFT - 58}" y="{y + 4}" text-anchor="end">{escape(name.partition("@")[0])}</text>')
        parts.append(f'<text class="soft" x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{bits:.2f}</text>')
        parts.append(f'<line class="stem" x1="{LEFT}" y1="{y}" x2="{at:.1f}" y2="{y}"/>')
        parts.append(f'<circle class="dot" cx="{at:.1f}" cy="{y}" r="5"/>')
        parts.append(f'<text x="{at + 12:.1f}" y="{y + 4}">{increase:+.2f} %</text>')
    return "\n".join([*parts, "</svg>", ""])
