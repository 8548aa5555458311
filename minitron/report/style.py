"""The style sheet of the report."""

CSS = """\
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --raised: #f5f6f5; --ink: #1d2227; --muted: #5b6570; --grid: #dde1e4;
  --link: #00609c;
  /* Eight lines that stay apart for color-blind eyes; marks and dashes repeat the distinction. */
  --series-0: #0067a8; --series-1: #c8480a; --series-2: #007a5e; --series-3: #9a4f9f;
  --series-4: #956a00; --series-5: #5a6570; --series-6: #c22d72; --series-7: #16829b;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --raised: #1c2024; --ink: #e4e7ea; --muted: #9da7b1; --grid: #343a41;
    --link: #6cb8f0;
    --series-0: #58aeea; --series-1: #f58a52; --series-2: #3fc39b; --series-3: #cb92d3;
    --series-4: #d9ad3d; --series-5: #a8b2bc; --series-6: #f27fb0; --series-7: #56cbe0;
  }
}
* { box-sizing: border-box; }
html { font-size: 16px; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 64rem; padding: 3rem 1.5rem 4rem;
  background: var(--paper); color: var(--ink); line-height: 1.55;
}
body, figure svg text {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif
    !important;
}
h1, h2, h3 { line-height: 1.25; font-weight: 600; margin: 0; }
h1 { font-size: 1.75rem; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 3rem 0 0.9rem; }
h3 { font-size: 1rem; }
p { margin: 0.35rem 0; max-width: 44rem; }
.muted, figcaption, .notes, dt { color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.5rem 0.9rem; text-align: right; white-space: nowrap; font-weight: 400; }
th:first-child, td:first-child { padding-left: 0; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
thead th { color: var(--muted); font-size: 0.85rem; border-bottom: 1px solid var(--ink); }
tbody tr { border-bottom: 1px solid var(--grid); }
tbody th { font-weight: 600; }
td strong { font-weight: 700; }
sup { display: inline-block; width: 2.6em; padding-left: 0.2em; text-align: left; }
sup { color: var(--muted); font-size: 0.7em; line-height: 0; }
.notes { font-size: 0.85rem; list-style: none; padding: 0; margin: 0.8rem 0 0; max-width: 48rem; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
@media screen { section > figure { overflow-x: auto; } section > figure svg { min-width: 40rem; } }
figcaption { font-size: 0.85rem; margin-bottom: 0.2rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)); gap: 2rem; }
@media (max-width: 28rem) { .grid { grid-template-columns: 1fr; } }
article { padding: 1.2rem 0; border-top: 1px solid var(--grid); }
article h3 .muted { font-weight: 400; margin-left: 0.4rem; }
dl { display: grid; grid-template-columns: 8.5rem 1fr; gap: 0.25rem 1rem; margin: 0.7rem 0; }
dt, dd { margin: 0; font-size: 0.9rem; min-width: 0; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.82rem; }
pre {
  background: var(--raised); padding: 0.9rem 1rem; border-radius: 6px; overflow-x: auto;
  margin: 0.5rem 0 0; line-height: 1.45;
}
summary { cursor: pointer; font-size: 0.9rem; color: var(--link); width: fit-content; }
summary:focus-visible { outline: 2px solid var(--link); outline-offset: 3px; border-radius: 2px; }
@media print {
  :root { --paper: #fff; }
  html { font-size: 11px; }
  body { padding: 0; max-width: none; }
  figure, article, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""
