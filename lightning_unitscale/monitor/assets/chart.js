// Line charts: hover shows the values at a step, dragging zooms in, a double click shows all again.
// Each <div class="chart" data-chart='[{"name", "points": [[step, value], …], "dashed", "thin"}, …]'> becomes one.
for (const box of document.querySelectorAll("[data-chart]")) draw(box, JSON.parse(box.dataset.chart));

function draw(box, series, range) {
  const W = 760, H = 300, L = 72, R = 14, T = 10, B = 34, ns = "http://www.w3.org/2000/svg";
  const colour = k => `var(--${1 + k % 6})`;
  const steps = series.flatMap(s => s.points.map(p => p[0]));
  const [x0, x1] = range || [Math.min(...steps), Math.max(...steps)];
  const shown = series.map(s => s.points.filter(p => p[0] >= x0 && p[0] <= x1));
  const values = shown.flat().map(p => p[1]).sort((a, b) => a - b);
  if (!values.length) return;
  const low = values[0], high = values[values.length - 1], room = 0.05 * (high - low) || Math.abs(high) || 1;
  const [y0, y1] = [low - room, high + room];
  const X = v => L + (v - x0) / (x1 - x0 || 1) * (W - L - R), Y = v => T + (y1 - v) / (y1 - y0) * (H - T - B);
  const svg = document.createElementNS(ns, "svg");
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  const add = (tag, attributes, text) => {
    const node = svg.appendChild(document.createElementNS(ns, tag));
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const round = v => Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-3) ? v.toExponential(1) : +v.toPrecision(4) + "";
  for (const v of ticks(y0, y1)) {
    add("line", {x1: L, x2: W - R, y1: Y(v), y2: Y(v), class: "grid"});
    add("text", {x: L - 6, y: Y(v) + 4, "text-anchor": "end"}, round(v));
  }
  for (const v of ticks(x0, x1, 1)) add("text", {x: X(v), y: H - 12, "text-anchor": v < x1 ? "middle" : "end"}, round(v));
  add("text", {x: L - 16, y: H - 12, "text-anchor": "end"}, "step");
  shown.forEach((points, k) => {
    const s = series[k], path = points.map(p => `${X(p[0]).toFixed(1)},${Y(p[1]).toFixed(1)}`).join(" ");
    add("polyline", {points: path, fill: "none", stroke: colour(k), "stroke-width": s.thin ? 1.2 : 2.4,
                     "stroke-dasharray": s.dashed ? "6 4" : "none"});
    if (points.length < 40) for (const p of points) add("circle", {cx: X(p[0]), cy: Y(p[1]), r: 2.6, fill: colour(k)});
  });
  const cursor = add("line", {y1: T, y2: H - B, class: "grid", visibility: "hidden"});
  const drag = add("rect", {y: T, height: H - T - B, fill: "var(--1)", opacity: 0.15, width: 0});
  const tip = Object.assign(document.createElement("div"), {className: "tip", hidden: true});
  const legend = Object.assign(document.createElement("div"), {className: "legend"});
  series.forEach((s, k) => {
    const entry = legend.appendChild(document.createElement("span")), mark = document.createElement("i");
    mark.style.borderTopColor = colour(k);
    if (s.dashed) mark.style.borderTopStyle = "dashed";
    entry.append(mark, s.name);
  });
  const stepAt = event => {
    const frame = svg.getBoundingClientRect(), at = (event.clientX - frame.left) / frame.width * W;
    return Math.min(x1, Math.max(x0, x0 + (at - L) / (W - L - R) * (x1 - x0)));
  };
  let from = null;
  svg.onpointermove = event => {
    const at = stepAt(event), lines = [];
    shown.forEach((points, k) => {
      const near = points.reduce((best, p) => Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best, points[0] || [NaN]);
      if (near[1] !== undefined) lines.push(`${series[k].name} ${round(near[1])} (step ${near[0]})`);
    });
    tip.innerText = lines.join("\n");
    tip.hidden = false;
    tip.style[X(at) < W / 2 ? "right" : "left"] = "1rem";
    tip.style[X(at) < W / 2 ? "left" : "right"] = "auto";
    cursor.setAttribute("visibility", "visible");
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, X(at));
    if (from !== null) {
      drag.setAttribute("x", X(Math.min(from, at)));
      drag.setAttribute("width", Math.abs(X(at) - X(from)));
    }
  };
  svg.onpointerleave = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
  svg.onpointerdown = event => { if (event.pointerType === "mouse") { from = stepAt(event); event.preventDefault(); } };
  svg.onpointerup = event => {
    const to = stepAt(event), zoomed = from !== null && Math.abs(X(to) - X(from)) > 8;
    if (zoomed) draw(box, series, [Math.min(from, to), Math.max(from, to)]);
    from = null;
  };
  svg.ondblclick = () => draw(box, series);
  box.replaceChildren(svg, tip, legend);
}

function ticks(low, high, least = 0) {
  const rough = Math.max(least, (high - low) / 5) || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(k => k * power).find(size => size >= rough), found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step / 1e6; v += step) found.push(v);
  return found;
}
