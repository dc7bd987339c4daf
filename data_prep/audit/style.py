"""The audit's own rules, after those that all our pages share (medfuse_jax/report/html.py)."""

CSS = """
h2 { margin: 3.5rem 0 0.5rem; padding-top: 1.5rem; border-top: 1px solid var(--rule); }
h3 { margin-top: 2.25rem; }
.checks { list-style: none; margin: 1.5rem 0 0; padding: 0; max-width: 46rem; }
.checks li { padding: 0.6rem 0 0.6rem 1.9rem; border-top: 1px solid var(--rule); position: relative; }
.checks li:last-child { border-bottom: 1px solid var(--rule); }
.checks li::before { content: "✓"; position: absolute; left: 0.3rem; color: var(--run2); font-weight: 700; }
.checks small { color: var(--muted); font-size: 0.8125rem; display: block; }

table { min-width: min(100%, 34rem); }
th, td { padding: 0.35rem 0.6rem; text-align: right; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
tbody th { white-space: normal; min-width: 9rem; max-width: 22rem; }
td.text, th.text { text-align: left; white-space: normal; min-width: 11rem; }
td.bar { width: 40%; min-width: 7rem; }
td.bar div { background: var(--run0); height: 0.65rem; border-radius: 2px; min-width: 2px; }
.ours { color: var(--run0); } .papers { color: var(--run1); }
.chart { margin-top: 1rem; }
details { margin-top: 1.25rem; font-size: 0.9375rem; }
details > summary { color: var(--muted); padding: 0.25rem 0; }
details[open] > summary { margin-bottom: 0.5rem; }
footer { max-width: 46rem; }
@media (max-width: 40rem) {
  th, td { padding: 0.35rem 0.25rem; }
  tbody th { max-width: 44vw; min-width: 7rem; }
  td.bar { display: none; }
  td .soft { display: block; font-size: 0.6875rem; }
}
"""
