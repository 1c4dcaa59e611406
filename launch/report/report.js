"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const DASHES = ["", "7 3", "2 2", "9 3 2 3", "4 2 1 2"];
const COLORS = 7, LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 24;
const view = {smoothing: 0.6, axis: "step", zoom: null};
const drawn = [];

function node(parent, name, attributes = {}, text = "") {
  const isSvg = parent instanceof SVGElement || name === "svg";
  const made = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  parent.append(made);
  return made;
}

function number(value) {
  const size = Math.abs(value);
  if (size >= 1e15 || (size < 1e-4 && size > 0)) return value.toExponential(2);
  for (const [limit, unit] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e4, " k"]]) if (size >= limit) return (value / limit * (limit === 1e4 ? 10 : 1)).toPrecision(4).replace(/\.?0+$/, "") + unit;
  return String(Number(value.toPrecision(5)));
}

// Where a step is on the horizontal axis: of tokens and hours, some steps are known.
function position(run, step) {
  const known = data.runs[run].axes, steps = known.step;
  if (view.axis === "step" || !steps.length) return step;
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  const span = steps[high] - steps[low], values = known[view.axis];
  return span ? values[low] + (values[high] - values[low]) * (step - steps[low]) / span : values[low];
}

// An exponential moving average without the bias of its start, as in TensorBoard.
function smooth(values, weight) {
  let average = 0, total = 0;
  return values.map(value => {
    average = weight * average + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return average / total;
  });
}

const isNoisy = curve => curve.y.length >= 40 && curve.key !== "learning_rate" && !curve.key.startsWith("memory");
const color = curve => `var(--c${(data.runs.length > 1 ? curve.run : curve.style) % COLORS})`;
const label = curve => [data.runs.length > 1 ? data.runs[curve.run].name : "", curve.label].filter(Boolean).join(" ") || "value";

function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= rough) || rough;
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high + step * 1e-9 && found.length < 20; at++) found.push(at * step);
  return found;
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), every = Math.ceil((last - first) / 6);
  const found = [];
  for (let power = first; power <= last; power += every) for (const factor of last - first > 3 ? [1] : [1, 2, 5]) found.push(factor * 10 ** power);
  return found.filter(at => at >= low && at <= high);
}

function path(xs, ys, toX, toY) {
  let text = "", isOpen = false;
  xs.forEach((x, i) => {
    const y = ys[i];
    if (!Number.isFinite(toY(y))) { isOpen = false; return; } // of zero on a logarithmic axis
    text += `${isOpen ? "L" : "M"}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`;
    isOpen = true;
  });
  return text;
}

class Chart {
  constructor(parent, {title, curves}) {
    Object.assign(this, {curves, isLog: false});
    this.figure = node(parent, "figure", {"data-title": title});
    const caption = node(this.figure, "figcaption");
    node(caption, "span", {}, title);
    const log = node(caption, "button", {type: "button", "aria-pressed": "false", title: "logarithmic vertical axis"}, "log");
    log.onclick = () => { this.isLog = !this.isLog; log.setAttribute("aria-pressed", this.isLog); this.draw(); };
    this.svg = node(this.figure, "svg", {class: "chart", role: "img", "aria-label": title});
    this.legend = node(this.figure, "div", {class: "legend"});
    this.values = curves.map(curve => {
      const entry = node(this.legend, "span", {"data-key": curve.key, "data-run": curve.run});
      const line = node(node(entry, "svg", {viewBox: "0 0 26 8"}), "path", {d: "M0 4H26"});
      this.style(line, curve);
      entry.append(label(curve) === "value" ? "" : `${label(curve)} `);
      return node(entry, "b");
    });
    this.svg.onpointermove = event => this.hover(event);
    this.svg.onpointerleave = () => { this.cursor?.remove(); this.show(null); };
    this.svg.onpointerdown = event => { if (event.button === 0) { this.start = this.x(event); if (event.pointerType === "mouse") this.svg.setPointerCapture(event.pointerId); } };
    this.svg.onpointerup = event => this.select(event);
    this.svg.onpointercancel = () => { this.start = null; this.zone?.remove(); };
    this.svg.ondblclick = () => zoom(null);
  }

  style(line, curve) {
    line.setAttribute("stroke", color(curve));
    line.setAttribute("stroke-width", 1.8);
    line.setAttribute("stroke-dasharray", DASHES[(data.runs.length > 1 ? curve.run + curve.style : curve.style) % DASHES.length]);
  }

  draw() {
    this.svg.replaceChildren();
    const width = this.svg.clientWidth || 400, height = this.svg.clientHeight || 230, right = width - RIGHT, bottom = height - BOTTOM;
    this.shown = this.curves.map(curve => {
      const xs = curve.x.map(step => position(curve.run, step));
      const smoothed = view.smoothing && isNoisy(curve) ? smooth(curve.y, view.smoothing) : curve.y;
      return {curve, xs, smoothed};
    });
    const all = this.shown.flatMap(one => one.xs);
    const [x0, x1] = view.zoom || [all.reduce((a, b) => Math.min(a, b), Infinity), all.reduce((a, b) => Math.max(a, b), -Infinity)];
    let low = Infinity, high = -Infinity;
    const include = value => { if (!this.isLog || value > 0) { low = Math.min(low, value); high = Math.max(high, value); } };
    for (const {curve, xs} of this.shown) xs.forEach((x, i) => {
      if (x >= x0 && x <= x1) for (const name of ["y", "low", "high"]) if (curve[name]) include(curve[name][i]);
    });
    for (const {curve} of this.shown) for (const {x, y} of curve.redone) x.forEach((step, i) => {
      const at = position(curve.run, step);
      if (at >= x0 && at <= x1) include(y[i]);
    });
    if (low > high) [low, high] = this.isLog ? [1, 10] : [0, 1];
    if (this.isLog) [low, high] = [low / 1.05, high * 1.05];
    else { const pad = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1; low -= low >= 0 && low < pad ? low : pad; high += pad; }
    const [a, b] = this.isLog ? [Math.log(low), Math.log(high)] : [low, high];
    const toY = value => bottom - ((this.isLog ? Math.log(value) : value) - a) / (b - a) * (bottom - TOP);
    const toX = value => LEFT + (value - x0) / (x1 - x0 || 1) * (right - LEFT);
    Object.assign(this, {x0, x1, left: LEFT, right, bottom, toX, toY});

    for (const at of this.isLog ? logTicks(low, high) : ticks(low, high, 4)) {
      node(this.svg, "path", {class: "axis", d: `M${LEFT} ${toY(at)}H${right}`});
      node(this.svg, "text", {x: LEFT - 6, y: toY(at) + 4, "text-anchor": "end"}, number(at));
    }
    for (const at of ticks(x0, x1, Math.max(2, Math.floor(width / 110)))) {
      node(this.svg, "text", {x: Math.min(toX(at), right - 8), y: height - 7, "text-anchor": "middle"}, number(at));
    }
    const id = `clip${drawn.indexOf(this)}`;
    node(node(this.svg, "clipPath", {id}), "rect", {x: LEFT, y: 0, width: Math.max(0, right - LEFT), height: bottom + 2});
    const area = node(this.svg, "g", {"clip-path": `url(#${id})`});
    data.runs.forEach((run, index) => run.marks.forEach(mark => {
      const x = toX(position(index, mark.step));
      node(node(area, "path", {class: "mark", d: `M${x} ${TOP}V${bottom}`}), "title", {}, mark.text);
    }));
    for (const {curve, xs, smoothed} of this.shown) {
      const add = (kind, d) => { const line = node(area, "path", {class: `curve ${kind}`, d, "data-key": curve.key}); this.style(line, curve); return line; };
      if (curve.low) {
        const d = path(xs, curve.high, toX, toY) + path([...xs].reverse(), [...curve.low].reverse(), toX, toY).replace("M", "L");
        node(area, "path", {class: "band", d, fill: color(curve)});
      } else if (smoothed !== curve.y) add("raw", path(xs, curve.y, toX, toY)).removeAttribute("stroke-dasharray");
      for (const {x, y} of curve.redone) add("redone", path(x.map(step => position(curve.run, step)), y, toX, toY)).removeAttribute("stroke-dasharray");
      add("final", path(xs, smoothed, toX, toY));
      if (xs.length <= 40) xs.forEach((x, i) => {
        if (Number.isFinite(toY(curve.y[i]))) node(area, "circle", {cx: toX(x), cy: toY(curve.y[i]), r: 2.6, fill: color(curve)});
      });
    }
    this.show(null);
  }

  // The values in the legend: at a place on the horizontal axis, or the last ones.
  show(x) {
    this.shown?.forEach(({curve, xs}, index) => {
      let at = xs.length - 1;
      if (x !== null) xs.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(xs[at] - x)) at = i; });
      const range = curve.low && x !== null ? ` (${number(curve.low[at])} to ${number(curve.high[at])})` : "";
      this.values[index].textContent = number(curve.y[at]) + range + (x === null ? "" : ` at step ${curve.x[at]}`);
    });
  }

  x(event) {
    const place = event.clientX - this.svg.getBoundingClientRect().left;
    return this.x0 + Math.min(1, Math.max(0, (place - LEFT) / (this.right - LEFT))) * (this.x1 - this.x0);
  }

  hover(event) {
    const x = this.x(event);
    this.cursor?.remove();
    this.cursor = node(this.svg, "path", {class: "cursor", d: `M${this.toX(x)} ${TOP}V${this.bottom}`});
    this.zone?.remove();
    if (this.start !== null && this.start !== undefined && event.pointerType === "mouse") {
      const [from, to] = [this.toX(this.start), this.toX(x)].sort((p, q) => p - q);
      this.zone = node(this.svg, "rect", {class: "zone", x: from, y: TOP, width: to - from, height: this.bottom - TOP});
    }
    this.show(x);
  }

  select(event) {
    const [from, to] = [this.start ?? null, this.x(event)];
    this.start = null;
    this.zone?.remove();
    if (from !== null && event.pointerType === "mouse" && Math.abs(this.toX(from) - this.toX(to)) > 6) zoom([Math.min(from, to), Math.max(from, to)]);
  }
}

function zoom(range) {
  view.zoom = range;
  document.getElementById("reset").disabled = range === null;
  drawn.forEach(chart => chart.draw());
}

// The cividis color map, which is the same to the color-blind.
const CIVIDIS = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 181, 106], [254, 232, 56]];
function heat(percent) {
  const place = Math.min(1, percent / 200) * (CIVIDIS.length - 1), first = Math.min(CIVIDIS.length - 2, Math.floor(place));
  return CIVIDIS[first].map((from, i) => from + (CIVIDIS[first + 1][i] - from) * (place - first));
}

function paint(canvas, columns) {
  canvas.width = columns.length;
  canvas.height = columns[0].length;
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  columns.forEach((column, x) => column.forEach((value, y) => image.data.set([...heat(value), 255], 4 * (y * canvas.width + x))));
  context.putImageData(image, 0, 0);
}

function drawLoads(run, parent) {
  for (const {title, x, columns} of run.loads) {
    const figure = node(parent, "figure", {"data-title": title});
    node(figure, "figcaption", {}, data.runs.length > 1 ? `${run.name} ${title}` : title);
    const canvas = node(figure, "canvas", {class: "heat", role: "img", "aria-label": title});
    paint(canvas, columns);
    const rest = `steps up to ${x[x.length - 1]}, experts 0 to ${columns[0].length - 1} from the top`;
    const text = node(figure, "div", {class: "legend"}, rest);
    canvas.onpointermove = event => {
      const box = canvas.getBoundingClientRect(), clamp = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
      const column = clamp((event.clientX - box.left) / box.width, columns.length), expert = clamp((event.clientY - box.top) / box.height, columns[0].length);
      text.textContent = `up to step ${x[column]}: expert ${expert}: ${columns[column][expert]} %`;
    };
    canvas.onpointerleave = () => { text.textContent = rest; };
  }
}

for (const chart of data.charts) drawn.push(new Chart(document.getElementById("charts"), chart));
const redraw = () => drawn.forEach(chart => chart.draw());
const slider = document.getElementById("smoothing");
slider.oninput = () => { view.smoothing = Number(slider.value); document.getElementById("smoothed").textContent = view.smoothing.toFixed(2); redraw(); };
document.getElementById("axis").onchange = event => { view.axis = event.target.value; zoom(null); };
document.getElementById("reset").onclick = () => zoom(null);
document.getElementById("controls").onsubmit = event => event.preventDefault();
let width = 0;
new ResizeObserver(() => { if (width !== (width = document.body.clientWidth)) redraw(); }).observe(document.body);
redraw();
if (data.runs.some(run => run.loads.length)) {
  const section = document.getElementById("loads");
  section.hidden = false;
  data.runs.forEach(run => drawLoads(run, section.querySelector(".grid")));
  paint(document.getElementById("scale"), Array.from({length: 100}, (_, i) => [2 * i]));
}
