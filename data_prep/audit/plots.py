"""The audit's charts as inline SVG, in the colours of the page (classes in page.CSS)."""

from html import escape

from data_prep.audit import privacy

_WIDTH, _LEFT, _RIGHT = 400, 205, 388  # px; the axis of a horizontal chart runs from _LEFT to _RIGHT
_TICKS = (0.1, 0.2, 0.25, 0.5)


def prevalence(labels: list[str], ours: list[float | None], paper: list[float | None]) -> str:
    """Draw each label's share of positives as a dot (ours) and a ring (the paper's), the paper's largest first."""
    order = sorted(range(len(labels)), key=lambda k: -(paper[k] or 0.0))
    top = max([0.1, *(p for p in (*ours, *paper) if p is not None)]) * 1.05
    parts, row_px = [], 22
    for place, k in enumerate(order):
        y = (place + 0.5) * row_px
        parts.append(_text(_LEFT - 8, y, _short(labels[k]), "end"))
        x_ours, x_paper = (None if p is None else _x(p, top) for p in (ours[k], paper[k]))
        if x_ours is not None and x_paper is not None:
            parts.append(f'<path class="link" d="M{x_paper:.1f} {y:g}H{x_ours:.1f}"/>')
        if x_paper is not None:
            parts.append(f'<circle class="ring" cx="{x_paper:.1f}" cy="{y:g}" r="4"/>')
        if x_ours is not None:
            parts.append(f'<circle class="dot" cx="{x_ours:.1f}" cy="{y:g}" r="3.5"/>')
    axis = _share_axis(top, row_px * len(order), "share of the training stays")
    return _svg(row_px * len(order) + 38, axis + "".join(parts), "Share of positives by label, ours and the paper's")


def observed(names: list[str], shares: list[float | None]) -> str:
    """Draw one bar per variable: the share of time steps with an observation."""
    order = sorted(range(len(names)), key=lambda i: -(shares[i] or 0.0))
    parts, row_px = [], 22
    for place, i in enumerate(order):
        y, share = (place + 0.5) * row_px, shares[i] or 0.0
        text = "too few to show" if shares[i] is None else f"{share:.0%}" if share >= 0.01 else "under 1%"
        x = _x(share, 1.15)
        parts.append(_text(_LEFT - 8, y, _short(names[i]), "end"))
        parts.append(f'<rect class="bar" x="{_LEFT}" y="{y - 7:g}" width="{x - _LEFT:.1f}" height="14"/>')
        parts.append(_text(x + 5, y, text, "start", "soft"))
    axis = _share_axis(1.15, row_px * len(order), "share of time steps with an observation")
    return _svg(row_px * len(order) + 38, axis + "".join(parts), "Share of time steps with an observation, by variable")


def histogram(counts: dict[str, int | str], what: str, unit: str) -> str:
    """Draw one bar per interval ('0-12', ..., '504-'); write a hidden count as text, without a bar."""
    base_px, top_px = 180, 16
    largest = max([privacy.SMALLEST, *(n for n in counts.values() if isinstance(n, int))])
    slot_px = (_WIDTH - 8) / len(counts)
    parts = [f'<path class="grid" d="M0 {base_px}H{_WIDTH}"/>']
    for place, (interval, count) in enumerate(counts.items()):
        middle = 4 + (place + 0.5) * slot_px
        height = (base_px - top_px) * count / largest if isinstance(count, int) else 0
        if height:
            x, width = middle - 0.38 * slot_px, 0.76 * slot_px
            y = base_px - height
            parts.append(f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>')
        text = f"{count:,}" if isinstance(count, int) else count
        parts.append(_text(middle, base_px - height - 8, text, "middle", "soft"))
        low, _, high = interval.partition("-")
        name = f"{low}–{high}" if high else f"{low}+"
        parts.append(
            f'<text text-anchor="end" transform="translate({middle + 4:.1f} {base_px + 14}) rotate(-40)">{name}</text>'
        )
    parts.append(_text(_WIDTH / 2, base_px + 58, f"{unit}; {what} in each", "middle", "soft"))
    description = f"{what} by {unit}: " + ", ".join(f"{interval}: {count}" for interval, count in counts.items())
    return _svg(base_px + 68, "".join(parts), description)


def _share_axis(top: float, height: float, title: str) -> str:
    """Draw at most six grid lines at round shares from 0 to `top`, labelled below."""
    step = next((tick for tick in _TICKS if top / tick < 6), _TICKS[-1])
    parts = []
    for i in range(int(min(top, 1.0) / step + 1e-9) + 1):
        x = _x(i * step, top)
        parts.append(f'<path class="grid" d="M{x:.1f} 0V{height:g}"/>')
        parts.append(_text(x, height + 11, f"{i * step:.0%}", "middle", "soft"))
    return "".join(parts) + _text((_LEFT + _RIGHT) / 2, height + 28, title, "middle", "soft")


def _x(share: float, top: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * share / top


def _text(x: float, y: float, text: str, anchor: str, css_class: str = "") -> str:
    css_class = f' class="{css_class}"' if css_class else ""
    return f'<text x="{x:.1f}" y="{y + 3.5:.1f}" text-anchor="{anchor}"{css_class}>{escape(text)}</text>'


def _short(name: str, longest: int = 31) -> str:
    name = name.split(" (")[0].replace("Glascow coma scale", "GCS")
    return name if len(name) <= longest else name[:longest].rsplit(" ", 1)[0].rstrip(";,") + "…"


def _svg(height: float, body: str, description: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(description)}">{body}</svg>'
