"""How the page looks, and the few lines that sort its tables."""

from __future__ import annotations

# Okabe and Ito's colours, the two lightest replaced: they would vanish on white.
_LIGHT = ["#0072b2", "#d55e00", "#009e73", "#b85c94", "#222222", "#c98500", "#3f9fd8", "#85851f"]
_DARK = ["#4aa8e8", "#f08a4b", "#2fc79b", "#e39cc6", "#eeeeee", "#f2b632", "#9bd8f8", "#e6de5c"]
_DASHES = ["none", "9 4", "2 3", "9 3 2 3", "16 4", "5 3", "12 3 2 3 2 3", "4 6"]


def _colours(palette: list[str]) -> str:
    return " ".join(f"--c{k}: {colour};" for k, colour in enumerate(palette))


_SERIES = "\n".join(
    f".s{k} {{ stroke: var(--c{k}); --own: var(--c{k}); stroke-dasharray: {dash}; }}"
    for k, dash in enumerate(_DASHES)
)

CSS = f"""
:root {{ color-scheme: light dark; --text: #1c1c1c; --soft: #5a5a5a; --page: #ffffff;
  --edge: #d6d6d6; --band: #f3f4f6; --best: #dcefe4; {_colours(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e8e8e8; --soft: #a9a9a9; --page: #15171a;
  --edge: #3c4046; --band: #1f2226; --best: #1d4030; {_colours(_DARK)} }} }}
{_SERIES}
"""
CSS += """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 1240px; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 0.6rem; border-bottom: 1px solid var(--edge); }
h3 { font-size: 1.05rem; margin: 1.4rem 0 0.4rem; }
p, ul { margin: 0.4rem 0; max-width: 78ch; }
.note, figcaption, caption { color: var(--soft); }
figure { margin: 0; min-width: 0; }
.charts { display: grid; gap: 1.2rem; grid-template-columns:
  repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.charts.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); }
.charts figcaption { color: var(--text); font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 13px; fill: var(--soft); }
.grid { stroke: var(--edge); stroke-width: 1; opacity: 0.7; }
.tick { stroke: var(--soft); stroke-width: 1; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dot { fill: var(--own); stroke: var(--page); stroke-width: 1.5; stroke-dasharray: none; }
.legend { list-style: none; padding: 0; font-size: 0.88rem; }
.swatch { display: inline-block; width: 34px; height: 12px; margin-right: 0.4rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; margin: 0.6rem 0; font-size: 0.92rem; }
caption { text-align: left; padding-bottom: 0.3rem; }
th, td { text-align: left; padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--edge);
  vertical-align: top; }
.scroll th, .scroll td { overflow-wrap: normal; }
thead th { background: var(--band); vertical-align: bottom; }
.charts + .charts { margin-top: 1.5rem; }
td.number { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.best { background: var(--best); font-weight: 600; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--c0); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.facts th { font-weight: 600; width: 13rem; }
.grids { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.grids figure { max-width: 100%; }
.grids img { display: block; max-width: 100%; width: auto; height: auto; max-height: 420px;
  image-rendering: pixelated; background: #ffffff; }
.grids figcaption { font-size: 0.88rem; max-width: 40ch; }
pre { background: var(--band); padding: 0.7rem; margin: 0.4rem 0; overflow-x: auto;
  font-size: 0.85rem; overflow-wrap: normal; }
details { margin: 0.6rem 0; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 500px) { body { padding: 0.7rem; } .facts th { width: 8rem; }
  th, td { padding: 0.25rem 0.4rem; } }
"""

JS = """
document.querySelectorAll("table.sortable th button").forEach(function (button) {
  button.addEventListener("click", function () {
    var head = button.parentNode, table = head.closest("table"), body = table.tBodies[0];
    var column = Array.prototype.indexOf.call(head.parentNode.children, head);
    var up = head.getAttribute("aria-sort") !== "ascending";
    var rows = Array.prototype.slice.call(body.rows);
    var key = function (row) { return row.cells[column].getAttribute("data-value"); };
    rows.sort(function (a, b) {
      var x = key(a), y = key(b), order;
      if (x === "" || y === "") { return (x === "") - (y === ""); }
      order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    });
    head.parentNode.querySelectorAll("th").forEach(function (th) {
      th.removeAttribute("aria-sort");
    });
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    rows.forEach(function (row) { body.appendChild(row); });
  });
});
"""
