"""The style sheet of a report: light or dark by the system's preference, for screen and print."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --panel: #f6f7f9; --ink: #191c20; --soft: #5a6370; --rule: #dce0e6;
  --c0: #2563c9; --c1: #c2570c; --c2: #15803d; --c3: #a21caf; --c4: #0e7490; --c5: #b91c1c; --c6: #7a6a00;
  --c7: #64748b; }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #14171b; --panel: #1c2026; --ink: #e6e8eb; --soft: #98a2b0;
  --rule: #333a43; --c0: #6ea8fe; --c1: #f59e5b; --c2: #5fce83; --c3: #df8bea; --c4: #4cc6dd; --c5: #f58484;
  --c6: #d9c44a; --c7: #a3b0c2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 24px 64px; overflow-wrap: anywhere; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 44px 0 12px; padding-bottom: 5px; border-bottom: 1px solid var(--rule); }
h3 { font-size: 15.5px; margin: 22px 0 6px; }
p { margin: 8px 0; max-width: 78ch; }
.soft, figcaption { color: var(--soft); font-size: 13.5px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 14px 0 0; font-size: 14px; }
nav a { color: var(--c0); text-decoration: none; }
.lead { font-size: 18px; margin: 14px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 16px 0; }
.tile { background: var(--panel); border-radius: 8px; padding: 11px 15px; }
.tile b { display: block; font-size: 25px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13.5px; }
.missing { background: var(--panel); border-left: 3px solid var(--c1); padding: 8px 13px; border-radius: 0 6px 6px 0;
  max-width: none; }
.honest { border-left: 3px solid var(--c0); padding-left: 13px; }
.honest { margin-bottom: 14px; }
.honest p { margin: 4px 0; }
code, .code { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.rows { width: fit-content; min-width: min(100%, 640px); max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 5px 12px; border-bottom: 1px solid var(--rule); vertical-align: baseline; }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
tbody tr:hover { background: var(--panel); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.code { font: inherit; font-weight: 600; font-size: 13px; }
td.code { min-width: min(22ch, 30vw); }
.marked td { font-weight: 650; background: color-mix(in srgb, var(--c1) 12%, transparent); }
tbody.more { display: none; }
.rows:has(> details[open]) tbody.more { display: table-row-group; }
@supports not selector(:has(a)) { tbody.more { display: table-row-group; } }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--c0); font-size: 14px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 18px 28px;
  align-items: end; }
figure { margin: 6px 0; max-width: 680px; }
.pair figure { max-width: none; }
.bars { display: grid; gap: 7px; max-width: 720px; margin: 12px 0; font-size: 14px; }
.bars > div { display: grid; grid-template-columns: minmax(90px, 32%) 1fr 6.5em; gap: 12px; align-items: center; }
.bars i { display: block; height: 17px; min-width: 1px; border-radius: 2px; background: var(--c); }
.bars span { text-align: right; } .bars b { font-weight: 400; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; }
svg[width] { width: auto; max-width: 100%; }
svg text { font: 12px system-ui, "Segoe UI", sans-serif; fill: var(--ink); }
svg .tick { fill: var(--soft); font-size: 11.5px; }
svg .axis { fill: var(--soft); font-size: 12.5px; }
svg .in { font-size: 10.5px; }
.grid { stroke: var(--rule); stroke-width: 0.7; }
.frame { fill: none; stroke: var(--rule); }
.point { fill: var(--c0); fill-opacity: 0.38; background: var(--c0); }
.point:hover { fill-opacity: 1; }
.over { fill: var(--c7); fill-opacity: 0.28; background: var(--c7); opacity: 0.7; }
.front { fill: var(--c2); background: var(--c2); }
.stairs { fill: none; stroke: var(--c2); stroke-width: 1.6; }
.bound { stroke: var(--c5); stroke-width: 1.3; stroke-dasharray: 5 4; }
svg text.bound { fill: var(--c5); stroke: none; }
svg path.star { fill: var(--c1); stroke: var(--paper); stroke-width: 1.5; }
i.star { background: var(--c1); transform: rotate(45deg); border-radius: 0 !important; }
svg text.star { fill: var(--c1); font-weight: 650; paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.line { fill: none; stroke: var(--c); stroke-width: 1.7; stroke-linejoin: round; }
.line.again { stroke-dasharray: 5 3; }
.dot, .bar, .box { fill: var(--c); }
.box { fill-opacity: 0.75; }
.cell { fill: var(--c); }
.best { stroke: var(--ink); stroke-width: 1.2; }
.empty { fill: none; stroke: var(--rule); }
.hit { fill: transparent; }
.hit:hover { fill: var(--ink); fill-opacity: 0.09; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; min-height: 21px; margin-left: 11%; }
.entry i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 6px; }
.gallery { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; max-width: 900px; font-size: 13.5px; }
.gallery figure { margin: 0; } .gallery figcaption { color: var(--soft); font-size: 13px; }
.gallery img { display: block; width: 100%; image-rendering: pixelated; border-radius: 3px; }
.entry i.key { background: var(--c); border-radius: 2px; height: 4px; width: 15px; vertical-align: 3px; }
.entry b { margin-left: 6px; font-weight: 600; font-variant-numeric: tabular-nums; }
.network { display: flex; flex-wrap: wrap; gap: 12px; margin: 12px 0; }
.stage { border: 1px solid var(--rule); border-top: 3px solid var(--c); border-radius: 6px; padding: 6px 8px 9px; }
.stage h4 { margin: 0 4px 4px; font-size: 13.5px; display: flex; gap: 14px; justify-content: space-between; }
.stage h4 span { font-weight: 400; color: var(--soft); }
.stage ol { display: flex; flex-wrap: wrap; gap: 4px; list-style: none; margin: 0; padding: 0;
  justify-content: center; }
.stage li { width: 146px; padding: 4px 6px; font-size: 12.5px; line-height: 1.4; text-align: center; }
.stage li:hover { background: var(--panel); border-radius: 5px; }
.stage li svg { width: 112px; margin: 0 auto 5px; }
.stage li > b, .stage li > span { display: block; }
.stage li > span.soft { font-size: 12px; }
.share { height: 5px; background: var(--rule); border-radius: 3px; margin: 4px 0 2px; }
.share i { display: block; height: 5px; border-radius: 3px; background: var(--c); }
@media (max-width: 1300px) { th, td { padding: 5px 7px; } }
@media (max-width: 720px) {
  main { padding: 20px 14px 40px; }
  .wide thead { display: none; }
  .wide table, .wide tbody { display: block; }
  .wide tbody.more { display: none; }
  .rows:has(> details[open]) tbody.more { display: block; }
  .wide tr { display: flex; flex-wrap: wrap; gap: 0 16px; padding: 6px; border-bottom: 1px solid var(--rule); }
  .wide td { display: block; padding: 0; border: 0; text-align: left; background: none; white-space: normal; }
  .wide td:first-child { width: 100%; font-weight: 600; }
  .wide td::before { content: attr(data-name) " "; color: var(--soft); font: 13px system-ui, sans-serif; }
  .wide tr.marked { background: color-mix(in srgb, var(--c1) 12%, transparent); }
  .rows { width: 100%; min-width: 0; }
  svg text, svg .tick, svg .axis { font-size: 14.5px; } svg .in { font-size: 11px; }
  .legend { margin-left: 0; } .stage { width: 100%; }
  .bars > div { grid-template-columns: minmax(80px, 38%) 1fr 5em; gap: 8px; } }
@page { margin: 13mm 12mm; }
@media print {
  :root { color-scheme: light; }
  body { font-size: 11px; }
  main { max-width: none; padding: 0; }
  h1 { font-size: 20px; } h2 { font-size: 15px; margin: 18px 0 6px; } h3 { font-size: 12.5px; margin: 10px 0 4px; }
  h1, h2, h3, h3 + .soft, h2 + .soft { break-after: avoid; }
  nav, tbody.more, summary, details:not([open]), #settings { display: none; }
  figure, .stage, .tile, .missing, tr { break-inside: avoid; }
  table, .soft, figcaption, .legend, .bars { font-size: 10.5px; }
  th { font-size: 10px; } th, td { padding: 2px 8px; }
  code, td.code { font-size: 9.5px; } th.code { font-size: 10px; }
  .tiles { grid-template-columns: repeat(4, 1fr); } .lead { font-size: 14px; }
  .tile b { font-size: 17px; } .tile span { font-size: 10.5px; }
  .pair { grid-template-columns: 1fr 1fr; gap: 6px 18px; }
  figure:not(.pair figure):not(.bars) { max-width: 60%; }
  .stage li { width: 126px; font-size: 10px; } .stage h4 { font-size: 11px; }
}
"""
