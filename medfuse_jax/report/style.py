"""CSS rules of the report and the sweep page, added to those of html.py."""

CSS = """
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 8px; flex: none; }
.legend span { margin-left: 0.75rem; white-space: nowrap; }

table { width: 100%; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: 0.4rem 0.5rem; text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
tbody .group th { font-weight: 600; padding-top: 1.1rem; }
tbody:first-of-type .group th { padding-top: 0.7rem; }
tr.main > th { font-weight: 650; }
tbody .named { padding-left: 17px; text-indent: -17px; white-space: normal; min-width: 8.5rem; }
.ci { color: var(--muted); display: inline-block; margin-left: 0.4rem; }
.num { text-align: right; }
.wrap { white-space: normal; min-width: 11rem; overflow-wrap: anywhere; }
.bar { padding-top: 0; padding-bottom: 0; width: 148px; }
thead .bar { padding-bottom: 0.4rem; }
.axis { display: flex; justify-content: space-between; width: 132px; }
td.strip, th.strip { width: 45%; min-width: 9rem; }
svg.strip { display: block; width: 100%; height: 16px; background: var(--wash); }
.interval { vertical-align: -3px; }
.plain th { color: var(--muted); width: 12rem; }
.charts { margin: 1.5rem 0 0; }

details.run { border-top: 1px solid var(--rule); padding: 0.25rem 0 1rem; }
details.run > summary { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 0.9rem; padding: 0.6rem 0; }
details.run > summary .dot { margin-right: -6px; }
summary::marker { color: var(--muted); }
details.run > summary::before { content: "+"; width: 0.7rem; color: var(--muted); }
details.run[open] > summary::before { content: "−"; }
details.more { margin-top: 1.25rem; font-size: 0.875rem; }
details.more > summary { color: var(--muted); }
pre { background: var(--wash); padding: 0.9rem; overflow-x: auto; font-size: 0.8125rem; line-height: 1.45; margin: 0; }
/* On a phone: a value above its interval, no bars. */
@media (max-width: 40rem) {
  th, td { padding: 0.4rem 0.2rem; }
  thead th { white-space: normal; }
  .ci { display: block; font-size: 0.6875rem; white-space: nowrap; }
  td.strip, th.strip { min-width: 7rem; }
  .bar, .wide { display: none; }
  tbody th[scope="row"] { white-space: normal; hyphens: auto; }
  tbody .wrap, tbody .named { min-width: 7rem; }
}
@media print { details { break-inside: avoid; } }
"""
