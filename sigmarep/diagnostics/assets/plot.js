/* What all plots of a report share: colors, data, groups of plots. Text is set as text alone, never as markup. */
"use strict";

const content = JSON.parse(document.getElementById("data").textContent);
const AXIS = 58;
const DASHES = [[], [7, 4], [2, 3]];
const LARGEST = 1e100;

/* Colors come from the style sheet, so that one place says them. */
const theme = {};
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const get = (name) => style.getPropertyValue(name).trim();
  for (const name of ["paper", "ink", "quiet", "rule", "faint", "plain", "fell"]) theme[name] = get(`--${name}`);
  theme.kinds = Array.from({ length: 10 }, (_, i) => get(`--c${i}`));
  theme.depth = get("--depth").split(" ").map(rgb);
}
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
function blend(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(place), stops.length - 2);
  return `rgb(${stops[i].map((low, k) => Math.round(low + (place - i) * (stops[i + 1][k] - low))).join(",")})`;
}
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"].map(rgb);
/* The color of a line; `shade`, from 0 to 1, is that of its rate among those of its arm. */
function colorOf([how, value], shade) {
  const color = how === "kind" ? theme.kinds[value] : theme.plain;
  return how === "depth" ? blend(theme.depth, value) : shade === undefined ? color : shadeOf(color, shade);
}
/* From nearly the paper's to nearly the ink's, through the color itself. */
function shadeOf(color, shade) {
  return shade < 0.5 ? blend([rgb(color), rgb(theme.paper)], 0.25 - 0.5 * shade) : blend([rgb(color), rgb(theme.ink)], 1.1 * (shade - 0.5));
}

const LITTLE = new Uint8Array(new Uint16Array([1]).buffer)[0] === 1;
function floats(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  if (LITTLE) return Array.from(new Float32Array(bytes.buffer));
  const view = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}
/* A panel as the plots use it: lines have steps x and values y, which are unpacked when they are first used. */
function opened(panel) {
  for (const line of panel.lines) {
    line.x = panel.steps[line.steps];
    Object.defineProperty(line, "y", {
      configurable: true,
      get() {
        const y = floats(this.values);
        Object.defineProperty(this, "y", { value: y });
        this.values = null;
        return y;
      },
    });
  }
  return panel;
}
/* One quantity has one kind of axis in all plots of a page: logarithmic if a plot of it gains by that, unless one has values
   that such an axis cannot hold. */
function logs(axis) {
  const quantity = ({ label }) => label.replace(/^training /, "");
  const same = content.panels.flatMap((panel) => panel.axes).filter((other) => quantity(other) === quantity(axis));
  return same.some(({ log }) => log) && !same.some(({ signed }) => signed);
}
const largest = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
const drawn = (value) => Number.isFinite(value) && Math.abs(value) < LARGEST;
function shown(value) {
  if (value === undefined || value === null) return "";
  if (!Number.isFinite(value)) return String(value).toLowerCase().replace("infinity", "inf");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(2).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}
function element(tag, text, attributes) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  return made;
}
/* The place of the value nearest to x in rising numbers. */
function nearest(numbers, x) {
  let low = 0, high = numbers.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (numbers[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(numbers[low] - x) <= Math.abs(numbers[high] - x) ? low : high;
}

/* Plots of one group share the stretch of steps that they show, and the step under the pointer. */
const groups = new Map();
function groupOf(panel) {
  const lines = panel.lines.filter((line) => line.x.length);
  const low = Math.min(...lines.map((line) => line.x[0])), high = Math.max(...lines.map((line) => line.x.at(-1)));
  if (!groups.has(panel.group)) groups.set(panel.group, { low: Infinity, high: -Infinity, range: null, plots: [] });
  const group = groups.get(panel.group);
  group.low = Math.min(group.low, low);
  group.high = Math.max(group.high, high);
  return group;
}
function full(group, rates) {
  if (rates) return [group.low / 1.25, group.high * 1.25];
  return group.low < group.high ? [group.low, group.high] : [group.low - 1, group.high + 1];
}
function zoom(group, range) {
  group.range = range;
  for (const plot of group.plots) plot.zoomed();
}
function point(group, x, source) {
  for (const plot of group.plots) if (plot !== source) plot.pointed(x);
}

/* Parts that line plots and heat maps have in common. */
class Plot {
  constructor(figure, panel) {
    Object.assign(this, { figure, panel, group: panel.shared });
    this.group.plots.push(this);
    const label = `${panel.title}. Arrow keys move over the values, plus and minus zoom, 0 resets.`;
    this.chart = element("div", undefined, { class: "chart", tabindex: "0", role: "application", "aria-label": label });
    this.chart.setAttribute("aria-describedby", figure.querySelector("details p").id);
    this.tip = element("div", undefined, { class: "tip" });
    this.tip.hidden = true;
    this.live = element("div", undefined, { class: "unseen", "aria-live": "polite" });
    this.tools = element("div", undefined, { class: "tools" });
    this.chart.append(this.tip);
    figure.querySelector("figcaption").after(this.tools, this.chart, this.live);
    this.chart.addEventListener("keydown", (event) => this.key(event));
    this.chart.addEventListener("blur", () => this.hide());
    this.reset = this.button("Reset zoom", () => zoom(this.group, null));
    this.reset.disabled = true;
    new ResizeObserver(() => this.resized()).observe(this.chart);
    const table = figure.querySelector("details");
    table.addEventListener("toggle", () => table.open && !table.querySelector("table") && table.append(numbers(this.panel)));
  }
  /* Takes the values of a later state of its panel. */
  update(panel) {
    this.panel = panel;
    const table = this.figure.querySelector("details"), box = table.querySelector(".table");
    if (box) box.remove();
    if (table.open) table.append(numbers(panel));
  }
  leave() { this.group.plots.splice(this.group.plots.indexOf(this), 1); }
  get width() { return Math.max(this.chart.clientWidth, 200); }
  button(text, action) {
    const made = element("button", text, { type: "button" });
    made.addEventListener("click", action);
    this.tools.append(made);
    return made;
  }
  range() { return this.group.range || full(this.group, this.panel.rates); }
  key(event) {
    const [low, high] = this.range(), middle = (low + high) / 2, half = (high - low) / 2;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (moves[event.key]) this.move(...moves[event.key]);
    else if (event.key === "+" || event.key === "=") zoom(this.group, [middle - half / 2, middle + half / 2]);
    else if (event.key === "-") {
      const [least, most] = full(this.group, this.panel.rates);
      const wide = [Math.max(middle - 2 * half, least), Math.min(middle + 2 * half, most)];
      zoom(this.group, wide[0] === least && wide[1] === most ? null : wide);
    } else if (event.key === "0" || event.key === "Escape") { this.hide(); zoom(this.group, null); } else return;
    event.preventDefault();
  }
  tell(left, top, text, aloud) {
    this.tip.textContent = text;
    this.tip.hidden = false;
    const room = this.width - this.tip.offsetWidth - 4;
    this.tip.style.left = `${Math.max(Math.min(left + 14, room), 0)}px`;
    this.tip.style.top = `${Math.max(top - this.tip.offsetHeight - 10, 0)}px`;
    if (aloud) this.live.textContent = text;
  }
  hide() { this.tip.hidden = true; }
  zoomed() {
    this.hide();
    this.reset.disabled = !this.group.range;
  }
}

/* The plot as a table: first, lowest, highest and last value of every line. */
function numbers(panel) {
  const box = element("div", undefined, { class: "table", tabindex: "0", role: "region", "aria-label": panel.title });
  const table = element("table"), head = element("thead"), body = element("tbody"), titles = element("tr");
  for (const title of ["line", "first", "lowest", "at", "highest", "at", "last"]) titles.append(element("th", title, { scope: "col" }));
  head.append(titles);
  for (const line of panel.lines) {
    const row = element("tr"), points = line.y.map((y, i) => [y, line.x[i]]).filter(([y]) => drawn(y));
    row.append(element("th", line.name, { scope: "row" }));
    const least = points.reduce((a, b) => (b[0] < a[0] ? b : a), points[0] || []), most = points.reduce((a, b) => (b[0] > a[0] ? b : a), points[0] || []);
    for (const value of [line.y[0], least[0], least[1], most[0], most[1], line.y.at(-1)]) row.append(element("td", shown(value), { class: "number" }));
    body.append(row);
  }
  table.append(head, body);
  box.append(table);
  return box;
}
