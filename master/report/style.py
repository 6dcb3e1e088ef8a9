"""How a report looks: in the light and in the dark, on a phone and on a desk."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --panel: #f6f7f9; --line: #dfe3e8; --text: #1c2127; --quiet: #5d6874;
  --good: #16794c; --bad: #b3261e; --now: #0b5cad;
  --c0: #0b5cad; --c1: #c2410c; --c2: #16794c; --c3: #7a3fb5; --c4: #a16207; --c5: #0e7490; --c6: #be185d;
  --c7: #4b5563 }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --panel: #1d2126; --line: #333a43; --text: #e6e9ed;
  --quiet: #9aa5b1; --good: #5bd39a; --bad: #ff8a80; --now: #74b5ff;
  --c0: #74b5ff; --c1: #ffa265; --c2: #5bd39a; --c3: #c79bff; --c4: #e9c46a; --c5: #5fd3e6; --c6: #ff8fbf;
  --c7: #b6bfc9 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem }
p { margin: .4rem 0 } small, .quiet { color: var(--quiet); font-size: .875rem; font-weight: 400 }
.status { display: inline-block; border-radius: 1rem; padding: .05rem .7rem; font-size: .875rem; font-weight: 600;
  border: 1px solid currentColor; margin-right: .5rem }
.finished { color: var(--good) } .failed, .not { color: var(--bad) } .running, .starting, .stopped { color: var(--now) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; margin: 1.2rem 0 0 }
.cards div { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem }
.cards dt { color: var(--quiet); font-size: .8125rem } .cards dd { margin: 0; font-size: 1.15rem; font-weight: 600;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .75rem }
figure, .panel { margin: 0; background: var(--panel); border: 1px solid var(--line); border-radius: .5rem;
  padding: .8rem 1rem; min-width: 0 }
figcaption { font-weight: 600; margin-bottom: .6rem } .legend { float: right; font-weight: 400; font-size: .8125rem }
.key { margin-left: .8rem; white-space: nowrap }
.key::before { content: ""; display: inline-block; width: .9rem; height: .2rem; border-radius: .1rem;
  margin-right: .3rem; vertical-align: middle; background: var(--c) }
.plot { padding: .4rem .4rem 1.4rem 3.2rem; clear: both } .area { position: relative; height: 11rem }
svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible }
svg * { vector-effect: non-scaling-stroke; fill: none } .grid { stroke: var(--line); stroke-width: 1 }
polyline { stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
.x, .y { position: absolute; color: var(--quiet); font-size: .75rem; font-variant-numeric: tabular-nums;
  white-space: nowrap }
.y { right: calc(100% + .5rem); transform: translateY(50%) } .x { top: calc(100% + .3rem); transform: translateX(-50%) }
.x-name { color: var(--quiet); font-size: .75rem; text-align: right }
.mark { position: absolute; width: .9rem; height: .9rem; margin: 0 0 -.45rem -.45rem; border-radius: 50% }
.mark::after { content: ""; position: absolute; inset: .25rem; border-radius: 50% }
.mark.dot::after, .mark:hover::after { background: var(--c) }
.c0 { --c: var(--c0) } .c1 { --c: var(--c1) } .c2 { --c: var(--c2) } .c3 { --c: var(--c3) } .c4 { --c: var(--c4) }
.c5 { --c: var(--c5) } .c6 { --c: var(--c6) } .c7 { --c: var(--c7) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 500; color: var(--quiet) } tr:last-child > * { border-bottom: 0 }
.bar { width: 60% } .bar span { display: block; height: .7rem; margin-top: .45rem;
  border-radius: .2rem; background: var(--c); min-width: 1px }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem;
  margin: .4rem 0; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
details { margin: .4rem 0 } summary { cursor: pointer; padding: .2rem 0 }
ol.events { list-style: none; margin: 0; padding: 0 } .events li { padding: .25rem 0; overflow-wrap: anywhere }
.events time { color: var(--quiet); display: inline-block; min-width: 6rem; font-variant-numeric: tabular-nums }
footer { margin-top: 3rem; color: var(--quiet); font-size: .8125rem }
@media (max-width: 34rem) { main { padding: 1rem .8rem 3rem } h1 { font-size: 1.3rem }
  .plot { padding-left: 2.6rem } figure, .panel { padding: .7rem .6rem } .area { height: 9.5rem }
  .legend { float: none; display: block } .key:first-child { margin-left: 0 }
  .events time { display: block } }
@media print { body { background: none } details > * { display: block } }
"""
