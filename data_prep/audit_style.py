"""The audit page's style sheet: one column, light and dark, from 390 px wide on (akin to the report's)."""

CSS = """
:root {
  --paper: #fdfdfc; --ink: #1a1d21; --muted: #626b76; --rule: #e4e6e9; --wash: #f4f5f6; --notice: #a15c00;
  --good: #00704e; --ours: #0069ab; --papers: #cc5500; color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --ink: #e8eaec; --muted: #98a2ad; --rule: #2c3238; --wash: #1d2125; --notice: #f0b257;
    --good: #35c79c; --ours: #56b0ea; --papers: #ff9055;
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
h2 { font-size: 1.45rem; letter-spacing: -0.01em; margin: 3.5rem 0 0.5rem; padding-top: 1.5rem; }
h2 { border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 2.25rem 0 0.5rem; }
h1, h2, h3 { text-wrap: balance; font-weight: 650; }
.lead { font-size: 1.125rem; max-width: 42rem; margin: 0 0 1.25rem; text-wrap: pretty; }
.note { color: var(--muted); font-size: 0.8125rem; max-width: 46rem; margin: 0.6rem 0 0; }
.soft { color: var(--muted); }
.notice {
  border-left: 3px solid var(--notice); background: var(--wash); padding: 0.65rem 0.9rem; margin: 0 0 1.25rem;
  font-size: 0.9375rem; max-width: 46rem; overflow-wrap: anywhere;
}
.notice ul { margin: 0.25rem 0 0; padding-left: 1.1rem; }
.checks { list-style: none; margin: 1.5rem 0 0; padding: 0; max-width: 46rem; }
.checks li { padding: 0.6rem 0 0.6rem 1.9rem; border-top: 1px solid var(--rule); position: relative; }
.checks li:last-child { border-bottom: 1px solid var(--rule); }
.checks li::before { content: "✓"; position: absolute; left: 0.3rem; color: var(--good); font-weight: 700; }
.checks small { color: var(--muted); font-size: 0.8125rem; display: block; }
.facts { display: flex; flex-wrap: wrap; gap: 0.5rem 2.25rem; margin: 0 0 0.5rem; font-size: 0.875rem; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }

/* A shadow at the side where a table goes on. */
.scroll {
  overflow-x: auto; overscroll-behavior-x: contain; background-repeat: no-repeat;
  background-image: linear-gradient(to left, var(--paper) 40%, transparent),
    linear-gradient(to left, color-mix(in srgb, var(--ink) 11%, transparent), transparent);
  background-size: 40px 100%, 14px 100%; background-position: right; background-attachment: local, scroll;
}
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--ours); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
table { min-width: min(100%, 34rem); }
th, td { padding: 0.35rem 0.6rem; text-align: right; vertical-align: baseline; white-space: nowrap; font-weight: 400; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--muted); font-size: 0.8125rem; border-bottom: 1px solid var(--muted); vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
tbody th { white-space: normal; min-width: 9rem; max-width: 22rem; }
td.text, th.text { text-align: left; white-space: normal; min-width: 11rem; }
td.bar { width: 40%; min-width: 7rem; }
td.bar div { background: var(--ours); height: 0.65rem; border-radius: 2px; min-width: 2px; }
.ours { color: var(--ours); } .papers { color: var(--papers); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.75rem 2.5rem; }
.chart { margin: 1rem 0 0; min-width: 0; }
.chart figcaption { font-size: 0.875rem; font-weight: 600; margin-bottom: 0.35rem; }
.chart svg { display: block; width: 100%; max-width: 30rem; height: auto; font-family: inherit; }
details { margin-top: 1.25rem; font-size: 0.9375rem; }
details > summary { cursor: pointer; color: var(--muted); padding: 0.25rem 0; }
details[open] > summary { margin-bottom: 0.5rem; }
footer { color: var(--muted); font-size: 0.8125rem; margin-top: 3rem; padding-top: 1rem; }
footer { border-top: 1px solid var(--rule); max-width: 46rem; }
@media (max-width: 40rem) {
  thead th:first-child, tbody th { position: sticky; left: 0; background: var(--paper); z-index: 1; }
  tbody th { max-width: 44vw; min-width: 7.5rem; }
}
@media print { .scroll { overflow: visible; } }
"""
