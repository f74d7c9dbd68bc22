"""The report's style sheet: light and dark after the reader's setting, no font or image from anywhere."""

STYLE = """\
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6570; --edge: #d9dee4; --page: #ffffff; --panel: #f6f7f9;
  --first: #1f6fd1; --second: #c8551b; --trained: #d3f0d8; --doubt: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --edge: #343b43; --page: #14171b; --panel: #1c2026;
    --first: #5b9df0; --second: #ee8a4f; --trained: #1d4a2b; --doubt: #f2836b; } }
* { box-sizing: border-box; }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; font-size: 1.2rem; } h3 { font-size: 1rem; white-space: pre-wrap; }
h4 { margin: 0 0 .3rem; color: var(--soft); font-size: .85rem; font-weight: 500; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem; border: 1px solid var(--edge); border-radius: 6px; }
figcaption { margin-bottom: .4rem; font-weight: 600; }
.key { margin-left: 1rem; color: var(--soft); font-weight: 400; font-size: .85rem; }
.key::before { content: ""; display: inline-block; width: 1rem; height: 0; margin-right: .4rem; vertical-align: middle;
  border-top: 2px solid currentColor; }
.key.s0::before { border-color: var(--first); } .key.s1::before { border-color: var(--second); }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--edge); } .tick { fill: var(--soft); font-size: 12px; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.s0 { stroke: var(--first); } .line.s1 { stroke: var(--second); }
.mark.s0 { fill: var(--first); } .mark.s1 { fill: var(--second); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--edge); text-align: right; vertical-align: top;
  white-space: pre-wrap; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
pre { margin: 0; padding: .8rem; overflow-x: auto; border-radius: 6px; background: var(--panel); white-space: pre-wrap;
  font-size: 13px; }
.groups { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.warnings { margin: .5rem 0; padding-left: 1.2rem; color: var(--doubt); }
mark { background: none; color: inherit; unicode-bidi: isolate; }
mark.trained { background: var(--trained); border-radius: 3px; } mark.remark { color: var(--soft); font-style: italic; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; }
"""
