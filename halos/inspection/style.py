"""The style sheet of a dry run's page: light and dark by the reader's setting, and black on white on paper."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2024; --soft: #5c6570; --line: #d5dae0; --box: #f5f7f9;
  --prompt: #e6ebf1; --scored: #c8ebd0; --scored-line: #1a7f37; --unscored: #fbe9c6; --special: #8250df;
  --error: #b3261e; --warning: #8a5a00; --note: #0a5fb4; --hold: #1a7f37; --bar: #3b7dd8; --limit: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --text: #e4e8ec; --soft: #9aa5b1; --line: #363d45;
  --box: #1d2226; --prompt: #2b333c; --scored: #1d4429; --scored-line: #56d364; --unscored: #4d3b12; --special: #d2a8ff;
  --error: #ff8d85; --warning: #e8b339; --note: #79b8ff; --hold: #56d364; --bar: #6cb0ff; --limit: #ff8d85; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); } nav a { margin-right: 1rem; } a { color: var(--note); }
.verdict { font-weight: 600; } .error { color: var(--error); } .warning { color: var(--warning); }
.note { color: var(--note); }
.hold { color: var(--hold); }
code, pre, .tokens { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 13px; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: .4rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0 1rem; width: 100%; }
caption { text-align: left; color: var(--soft); padding: .2rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); }
tbody th, li, code { overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 500; } tbody th { font-weight: 500; }
#needs ~ div tbody th { white-space: nowrap; } ul { margin: 0; padding-left: 1.1rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1.2rem 2rem; } figure { margin: 0; width: 21rem; max-width: 100%; }
figcaption { font-size: 13px; color: var(--soft); } figcaption strong { color: var(--text); }
svg { width: 100%; height: auto; }
svg rect { fill: var(--bar); } svg text { fill: var(--soft); font-size: 12px; } svg .axis { stroke: var(--line); }
svg .limit { stroke: var(--limit); stroke-width: 2; stroke-dasharray: 5 3; }
article { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem .8rem; margin: .8rem 0;
  break-inside: avoid-page; }
article h3 { margin: 0 0 .3rem; } h4 { font-size: .9rem; margin: .6rem 0 .2rem; font-weight: 600; }
h4 span { font-weight: 400; color: var(--soft); }
.tokens span { box-shadow: inset -1px 0 var(--line); }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; margin: 0; }
.tokens span, .key span { border-radius: 2px; padding: 1px 0; } .tokens span:hover { outline: 1px solid var(--text); }
.p { background: var(--prompt); } .s { background: var(--scored); border-bottom: 2px solid var(--scored-line); }
.n { background: var(--unscored); border-bottom: 2px dotted var(--soft); } .x { color: var(--special); font-weight: 600; }
.tokens i { font-style: normal; opacity: .45; } .gap { color: var(--soft); font-style: italic; }
.key span { padding: 1px 5px; margin-right: .6rem; }
@media print { :root { color-scheme: light; --back: #fff; --text: #000; --soft: #444; --line: #bbb; --box: #fff; --prompt: #eee;
  --scored: #d9f0de; --scored-line: #000; --unscored: #fff; --special: #000; --bar: #777; --limit: #000; --error: #000;
  --warning: #000; --note: #000; --hold: #000; } body { max-width: none; padding: 0; } nav { display: none; } }
"""
