"use strict";

// Tables: a click on a head sorts the rows by its column.
document.querySelectorAll("table.sortable th button").forEach(function (button) {
  button.addEventListener("click", function () {
    const head = button.parentNode, body = head.closest("table").tBodies[0];
    const column = Array.from(head.parentNode.children).indexOf(head);
    const up = head.getAttribute("aria-sort") !== "ascending";
    const key = function (row) { return row.cells[column].getAttribute("data-value"); };
    const rows = Array.from(body.rows).sort(function (a, b) {
      const x = key(a), y = key(b);
      if (x === "" || y === "") { return (x === "") - (y === ""); }
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    });
    head.parentNode.querySelectorAll("th").forEach(function (th) {
      th.removeAttribute("aria-sort");
    });
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    rows.forEach(function (row) { body.appendChild(row); });
  });
});

// Charts: unpack Plotly, then draw each chart when it is about to be seen.
async function drawCharts() {
  const packed = atob(document.getElementById("plotly").textContent);
  const bytes = Uint8Array.from(packed, function (character) { return character.charCodeAt(0); });
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const library = document.createElement("script");
  library.textContent = await new Response(unpacked).text();
  document.head.append(library);
  const observer = new IntersectionObserver(function (entries) {
    entries.filter(function (entry) { return entry.isIntersecting; }).forEach(function (entry) {
      observer.unobserve(entry.target);
      const figure = JSON.parse(entry.target.nextElementSibling.textContent);
      Plotly.newPlot(entry.target, figure.data, figure.layout,
        {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"]});
    });
  }, {rootMargin: "300px"});
  document.querySelectorAll(".chart").forEach(function (chart) { observer.observe(chart); });
}

if (document.getElementById("plotly")) {
  drawCharts().catch(function (error) {
    document.querySelectorAll(".chart").forEach(function (chart) {
      chart.textContent = "This browser cannot draw the chart (" + error + ").";
    });
  });
}
