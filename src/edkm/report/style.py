"""The style of the page: two sets of colours, chosen apart for light and dark, that differ in lightness as well as in hue."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfbf9; --sheet: #ffffff; --ink: #1b1f24; --soft: #59616b; --rule: #e4e4df;
  --one: #0b63a5; --two: #b8500a; --three: #8a8f98; --area: #8a8f98; --wash: #0b63a514;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #121518; --sheet: #191d21; --ink: #e6e9ec; --soft: #a0a8b1; --rule: #2c3238;
    --one: #62b0f5; --two: #f0a35c; --three: #7d858f; --area: #646b74; --wash: #62b0f51f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%; print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
main, header, footer { max-width: 1060px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 56px; }
h1 { font-size: clamp(28px, 5vw, 42px); line-height: 1.12; letter-spacing: -.02em; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 21px; letter-spacing: -.01em; font-weight: 620; margin: 0 0 4px; }
h3 { font-size: 15px; font-weight: 600; margin: 0 0 8px; overflow-wrap: anywhere; }
p { margin: 0 0 12px; max-width: 68ch; }
p, dd, li, summary { overflow-wrap: anywhere; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.eyebrow { color: var(--soft); font-size: 14px; margin-bottom: 8px; }
.lead { color: var(--soft); margin: 10px 0 0; }
.note, .missing, figcaption { color: var(--soft); font-size: 14px; }
.missing { border-left: 3px solid var(--rule); padding-left: 12px; }
.tiles { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 1px; margin: 32px 0 0;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 12px; overflow: hidden; }
.tile { background: var(--sheet); padding: 18px 20px 16px; }
.tile dt { color: var(--soft); font-size: 14px; }
.tile dd { margin: 0; font-size: 14px; color: var(--soft); line-height: 1.45; }
.tile dd.figure { font-size: 32px; line-height: 1.25; letter-spacing: -.02em; font-weight: 620; color: var(--ink);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile dd.figure small { font-size: 17px; font-weight: 500; letter-spacing: 0; }
.tile dd.none { color: var(--three); }
section { margin-top: 52px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 28px 36px; margin-top: 16px; }
figure { margin: 0; min-width: 0; }
.apart { margin: 30px 0 0; }
.columns > div { min-width: 0; }
.columns > div > .scroll:first-child { margin-top: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--ink); font-size: 12.5px; font-variant-numeric: tabular-nums; }
svg .muted { fill: var(--soft); } svg .over { stroke: var(--paper); stroke-width: 4; paint-order: stroke; }
.axis { stroke: var(--three); } .grid { stroke: var(--rule); } .mark { stroke: var(--three); stroke-dasharray: 2 3; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.curve.one { stroke: var(--one); } .curve.two { stroke: var(--two); } .curve.other { stroke: var(--three); stroke-dasharray: 5 4; }
.dot.one { fill: var(--one); } .dot.two { fill: var(--two); } .dot.other { fill: var(--three); }
rect.heat { fill: var(--one); }
.area { fill: var(--area); } .outline { fill: none; stroke: var(--ink); }
.spread { fill: var(--two); }
.centroid { fill: var(--two); stroke: var(--paper); stroke-width: 2.4; paint-order: stroke; } .centroid.fine { stroke: none; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; margin: 8px 0 0; padding: 0; font-size: 14px; color: var(--soft); }
.key + .note { margin-top: 8px; }
.key i { display: inline-block; width: 14px; height: 10px; margin-right: 7px; border-radius: 2px; vertical-align: baseline; }
.key i.line { height: 0; border-top: 2px solid; border-radius: 0; vertical-align: 4px; }
.key i.dashed { height: 0; border-top: 2px dashed; border-radius: 0; vertical-align: 4px; }
.bars { margin: 16px 0 0; display: grid; gap: 12px; }
.bar-head { display: flex; justify-content: space-between; gap: 16px; font-size: 14px; margin-bottom: 4px; }
.bar-head span:first-child { overflow-wrap: anywhere; }
.bar-head span:last-child { color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { display: flex; gap: 2px; height: 20px; }
.bar i { display: block; min-width: 1px; border-radius: 2px; }
.linear { background: var(--one); } .embedding { background: var(--two); } .dense { background: var(--three); }
.scroll { overflow-x: auto; margin: 12px 0 0; border: 1px solid var(--rule); border-radius: 8px; background: var(--sheet); }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--one); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 10px; white-space: nowrap; border-top: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; }
tbody th { font-weight: 400; }
.scroll:not(.tall) th { white-space: normal; }
.scroll:not(.tall) th:first-child, .names th { overflow-wrap: anywhere; min-width: 5em; }
tr.total td, tr.total th { font-weight: 600; }
details { margin-top: 20px; }
summary { cursor: pointer; font-size: 15px; color: var(--one); width: fit-content; }
details .scroll.tall { max-height: 480px; overflow-y: auto; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 215px), 1fr)); gap: 12px 28px; margin: 14px 0 0; }
dl.facts dt { font-size: 13px; color: var(--soft); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 64px; padding-top: 18px; padding-bottom: 48px; color: var(--soft); font-size: 14px;
  border-top: 1px solid var(--rule); }
@media (max-width: 860px) { .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (max-width: 560px) {
  main, header, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 32px; } section { margin-top: 42px; }
  .tile { padding: 14px 14px 12px; } .tile dd.figure { font-size: 25px; }
  .tile dd.figure small { font-size: 14px; }
  table { font-size: 13px; } th, td { padding: 7px 6px; } .scroll:not(.tall) td { white-space: normal; }
  svg text { font-size: 16px; }
}
@media print {
  :root {
    --paper: #fff; --sheet: #fff; --ink: #000; --soft: #444; --rule: #ccc;
    --one: #0b63a5; --two: #b8500a; --three: #777; --area: #8a8f98;
  }
  body { font-size: 11pt; } header { padding-top: 0; } section { margin-top: 24pt; } h2 { break-after: avoid; }
  .tiles { grid-template-columns: repeat(4, minmax(0, 1fr)); } .tile dd.figure { font-size: 22px; }
  .columns { grid-template-columns: 1fr 1fr; gap: 14pt 18pt; }
  th, td { padding: 4px 8px; white-space: normal; }
  figure, .tile, .bars, tr { break-inside: avoid; } .scroll, details .scroll.tall { overflow: visible; max-height: none; }
}
"""
