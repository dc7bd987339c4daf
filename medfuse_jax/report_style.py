"""The report page's style sheet: one column, light and dark, from 390 px wide on."""

CSS = """
:root {
  --paper: #fdfdfc; --ink: #1a1d21; --muted: #626b76; --rule: #e4e6e9; --wash: #f4f5f6; --notice: #a15c00;
  --run0: #0069ab; --run1: #cc5500; --run2: #00875f; --run3: #b0508a; --run4: #a87900; --run5: #3d9bd6; --run6: #55606b;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --ink: #e8eaec; --muted: #98a2ad; --rule: #2c3238; --wash: #1d2125; --notice: #f0b257;
    --run0: #56b0ea; --run1: #ff9055; --run2: #35c79c; --run3: #e79cc8; --run4: #e8b53a; --run5: #9bd3f7;
    --run6: #c3cad1;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5; font-size: 16px;
  font-family: Inter, ui-sans-serif, system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 64rem; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2rem) 4rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.25rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 0.75rem; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 3rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 2rem 0 0.5rem; }
h4 { font-size: 0.9375rem; margin: 2rem 0 0.5rem; }
h1, h2, h3, h4 { text-wrap: balance; font-weight: 650; }
.lead { font-size: 1.125rem; max-width: 42rem; margin: 0 0 1.25rem; text-wrap: pretty; }
.note { color: var(--muted); font-size: 0.8125rem; max-width: 46rem; margin: 0.6rem 0 0; }
.notice {
  border-left: 3px solid var(--notice); background: var(--wash); padding: 0.65rem 0.9rem; margin: 0 0 1.25rem;
  font-size: 0.9375rem; max-width: 46rem; overflow-wrap: anywhere;
}
.notice strong { color: var(--notice); }
.notice ul { margin: 0.25rem 0 0; padding-left: 1.1rem; }
.facts { display: flex; flex-wrap: wrap; gap: 0.5rem 2.25rem; margin: 0; font-size: 0.875rem; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.soft { color: var(--muted); }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 8px; flex: none; }
.key span { margin-left: 0.75rem; white-space: nowrap; }

/* A shadow at the side where a table goes on. */
.scroll {
  overflow-x: auto; overscroll-behavior-x: contain; background-repeat: no-repeat;
  background-image: linear-gradient(to left, var(--paper) 40%, transparent),
    linear-gradient(to left, color-mix(in srgb, var(--ink) 11%, transparent), transparent);
  background-size: 40px 100%, 14px 100%; background-position: right; background-attachment: local, scroll;
}
.scroll:focus-visible, summary:focus-visible, pre:focus-visible { outline: 2px solid var(--run0); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.875rem; }
table { font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: 0.4rem 0.5rem; text-align: left; vertical-align: baseline; white-space: nowrap; }
th { font-weight: 400; }
th:first-child, td:first-child { padding-left: 0; }
thead th { color: var(--muted); font-size: 0.8125rem; border-bottom: 1px solid var(--muted); vertical-align: bottom; }
tbody tr + tr > *, tbody + tbody tr > * { border-top: 1px solid var(--rule); }
tbody .group th { font-weight: 600; padding-top: 1.1rem; }
tbody:first-of-type .group th { padding-top: 0.7rem; }
tr.main > th, tr.main .strong { font-weight: 650; }
tbody .named { padding-left: 17px; text-indent: -17px; }
.num { text-align: right; }
.wrap { white-space: normal; min-width: 11rem; overflow-wrap: anywhere; }
.bar { padding-top: 0; padding-bottom: 0; width: 148px; }
thead .bar { padding-bottom: 0.4rem; }
.axis { display: flex; justify-content: space-between; width: 132px; }
.interval { vertical-align: -3px; }
.plain th { color: var(--muted); width: 12rem; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.75rem 2.5rem; }
.charts { margin: 1.5rem 0 0; }
.chart { margin: 0; min-width: 0; }
.chart figcaption { font-size: 0.875rem; font-weight: 600; margin-bottom: 0.35rem; }
.chart svg { display: block; width: 100%; max-width: 30rem; height: auto; font-family: inherit; }
.chart svg * { stroke-linejoin: round; }

details.run { border-top: 1px solid var(--rule); padding: 0.25rem 0 1rem; }
details.run > summary { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 0.9rem; padding: 0.6rem 0; }
details.run > summary .dot { margin-right: -6px; }
summary { cursor: pointer; }
summary::marker { color: var(--muted); }
details.run > summary::before { content: "+"; width: 0.7rem; color: var(--muted); }
details.run[open] > summary::before { content: "−"; }
details.made { margin-top: 1.25rem; font-size: 0.875rem; }
details.made > summary { color: var(--muted); }
pre { background: var(--wash); padding: 0.9rem; overflow-x: auto; font-size: 0.8125rem; line-height: 1.45; margin: 0; }
footer { color: var(--muted); font-size: 0.8125rem; margin-top: 3rem; padding-top: 1rem; }
footer { border-top: 1px solid var(--rule); }
@media (max-width: 40rem) {
  thead th:first-child, tbody th[scope="row"] { position: sticky; left: 0; background: var(--paper); z-index: 1; }
  tbody th[scope="row"] { max-width: 42vw; white-space: normal; min-width: 8rem; padding-right: 0.75rem; }
}
@media print { details { break-inside: avoid; } .scroll { overflow: visible; } }
"""
