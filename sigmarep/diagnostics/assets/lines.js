/* Plots of lines and dots, drawn by uPlot. */
"use strict";

/* Height of a row of words above a plot, and most rows. */
const LABEL = 13, LABEL_ROWS = 4;

class Lines extends Plot {
  constructor(figure, panel) {
    super(figure, panel);
    /* The words above the plot area in full; over the area itself `hover` speaks. */
    this.chart.addEventListener("pointermove", (event) => {
      if (this.chartOf.over.contains(event.target)) return;
      const box = this.chart.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
      const label = (this.labeled || []).find(({ from, to, base }) => x >= from && x <= to && y <= base + 3 && y >= base - LABEL + 3);
      if (label) this.tell(x, y + this.strip() + 40, label.text, false); else this.hide();
    });
    this.log = panel.axes.map(logs);
    this.weight = 0;
    this.off = new Set();
    this.offRates = new Set();
    this.at = null;
    this.align();
    this.controls();
    this.legend();
    this.draw();
  }
  /* One array of steps for all lines: `undefined` where a line has no value, null for one that cannot be drawn. */
  align() {
    this.x = [...new Set(this.panel.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const places = new Map(this.x.map((x, i) => [x, i]));
    this.raw = this.panel.lines.map((line) => {
      const row = new Array(this.x.length);
      line.x.forEach((x, i) => { row[places.get(x)] = line.y[i]; });
      return row;
    });
  }
  /* Exponential moving averages as long as the weight says, without a bias to the start. */
  smoothed(row) {
    if (!this.weight) return row;
    let total = 0, mass = 0;
    return row.map((value) => {
      if (!drawn(value)) return value;
      total = this.weight * total + (1 - this.weight) * value;
      mass = this.weight * mass + (1 - this.weight);
      return total / mass;
    });
  }
  values() {
    const ends = this.panel.lines.flatMap((line) => line.y).filter(drawn);
    this.cap = 1.08 * Math.max(largest(ends), 0) || 1;
    this.data = this.raw.map((row, i) => {
      const log = this.log[this.panel.lines[i].axis];
      const line = this.panel.lines[i];
      return (line.dots ? row : this.smoothed(row)).map((value) => {
        if (value === undefined) return undefined;
        if (this.panel.rates && value === Infinity) return this.cap;
        return drawn(value) && (!log || value > 0) ? value : null;
      });
    });
    return [this.x, ...this.data];
  }
  controls() {
    this.panel.axes.forEach((axis, i) => {
      const name = this.panel.axes.length > 1 ? `Log: ${axis.label}` : "Log axis";
      const button = this.button(name, () => {
        this.log[i] = !this.log[i];
        button.setAttribute("aria-pressed", this.log[i]);
        this.draw();
      });
      button.setAttribute("aria-pressed", this.log[i]);
    });
    if (!this.panel.rates) {
      const label = element("label", "Smoothing");
      const slider = element("input", undefined, { type: "range", min: "0", max: "0.98", step: "0.02", value: "0" });
      slider.addEventListener("input", () => { this.weight = Number(slider.value); this.chartOf.setData(this.values(), false); this.chartOf.redraw(); });
      label.append(slider);
      this.tools.append(label);
    }
    if (this.panel.lines.length > 8) {
      const search = element("input", undefined, { type: "search", placeholder: "only lines with…", "aria-label": "Show only lines whose names have these words" });
      search.addEventListener("input", () => {
        this.words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
        this.toggle();
      });
      this.tools.append(search);
    }
  }
  legend() {
    this.entries = new Map();
    const list = element("div", undefined, { class: "legend", role: "group", "aria-label": "Lines" });
    for (const line of this.panel.lines) {
      if (this.entries.has(line.legend)) continue;
      const button = element("button", undefined, { type: "button", "aria-pressed": "true", title: `${line.legend} (double click: only this)` });
      const swatch = element("span", undefined, { class: "swatch" }), value = element("span");
      button.append(swatch, element("span", line.legend), value);
      button.addEventListener("click", () => {
        if (!this.off.delete(line.legend)) this.off.add(line.legend);
        this.toggle();
      });
      button.addEventListener("dblclick", () => {
        const others = [...this.entries.keys()].filter((name) => name !== line.legend);
        const alone = others.every((name) => this.off.has(name));
        this.off = new Set(alone ? [] : others);
        this.toggle();
      });
      const count = this.panel.lines.filter((each) => each.legend === line.legend).length;
      this.entries.set(line.legend, { button, swatch, value, line, count });
      list.append(button);
    }
    if (this.entries.size > 1) this.chart.after(list);
    this.swatches();
    this.rateLegend();
  }
  /* A second list for the learning rates of lines that are shaded by them. */
  rateLegend() {
    this.rateEntries = new Map();
    const shades = new Map(this.panel.lines.filter(({ rate }) => rate !== undefined).map(({ rate, shade }) => [rate, shade]));
    if (shades.size < 2) return;
    const list = element("div", undefined, { class: "legend", role: "group", "aria-label": "Learning rates" });
    list.append(element("span", "learning rate:"));
    for (const [rate, shade] of [...shades].sort((a, b) => a[1] - b[1])) {
      const button = element("button", undefined, { type: "button", "aria-pressed": String(!this.offRates.has(rate)) });
      button.append(rampSwatch(shade, this.panel), element("span", rate));
      button.addEventListener("click", () => {
        if (!this.offRates.delete(rate)) this.offRates.add(rate);
        this.toggle();
      });
      this.rateEntries.set(rate, { button, shade });
      list.append(button);
    }
    [...this.figure.querySelectorAll(".legend"), this.chart].find(Boolean).after(list);
  }
  swatches() {
    for (const { swatch, line } of this.entries.values()) {
      swatch.style.borderTopColor = colorOf(line.color);
      swatch.style.borderTopStyle = ["solid", "dashed", "dotted"][line.dash];
    }
    for (const { button, shade } of (this.rateEntries || new Map()).values()) button.firstChild.replaceWith(rampSwatch(shade, this.panel));
  }
  visible(i) {
    const line = this.panel.lines[i], name = `${line.name} ${line.legend}`.toLowerCase();
    return !this.off.has(line.legend) && !this.offRates.has(line.rate) && (this.words || []).every((word) => name.includes(word));
  }
  toggle() {
    for (const [name, { button }] of this.entries) button.setAttribute("aria-pressed", !this.off.has(name));
    for (const [rate, { button }] of this.rateEntries) button.setAttribute("aria-pressed", !this.offRates.has(rate));
    this.chartOf.batch(() => this.panel.lines.forEach((_, i) => this.chartOf.setSeries(i + 1, { show: this.visible(i) })));
  }
  draw() {
    if (this.chartOf) this.chartOf.destroy();
    const { panel } = this, thin = panel.lines.length > 30 ? 1 : 1.6;
    const font = "12px system-ui, sans-serif";
    const scales = { x: { time: false, distr: panel.rates ? 3 : 1, range: () => this.range() } };
    panel.axes.forEach((axis, i) => {
      scales[`y${i}`] = { distr: this.log[i] ? 3 : 1, range: (u, low, high) => this.ends(i, low, high) };
    });
    const place = { stroke: () => theme.quiet, font, labelFont: font, ticks: { stroke: () => theme.rule, width: 1 } };
    const values = (u, ticks) => ticks.map((tick) => (tick === null ? "" : shown(tick)));
    const axes = [{
      ...place, values, size: 34, labelSize: 18, labelGap: 0, label: panel.rates ? "learning rate" : "step",
      grid: { stroke: () => theme.faint, width: 1 },
      ...(panel.rates ? rateTicks(this.x) : { incrs: WHOLE }),
    }];
    panel.axes.forEach((axis, i) => axes.push({
      ...place, values, scale: `y${i}`, side: i ? 1 : 3, labelSize: 16, labelGap: 2,
      /* As wide as its longest number. */
      size: (u, texts) => Math.max(AXIS - 16, 18 + 7 * Math.max(0, ...(texts || []).map((text) => text.length))), label: axis.label,
      grid: { show: i === 0, stroke: () => theme.faint, width: 1 },
      ...(this.log[i] ? { filter: (u, ticks) => round(ticks), splits: (u, place, low, high) => logarithmic(low, high) } : {}),
    }));
    const series = [{}, ...panel.lines.map((line, i) => ({
      label: line.name, scale: `y${line.axis}`, show: this.visible(i), stroke: () => colorOf(line.color, line.shade), width: thin,
      dash: line.rate === undefined ? DASHES[line.dash] : rampDash(line.shade, panel), spanGaps: false, paths: line.dots ? () => null : undefined,
      points: {
        show: () => !line.dots && this.panel.lines[i].y.filter(drawn).length < 3, size: 6, stroke: () => colorOf(line.color), fill: () => colorOf(line.color),
      },
    }))];
    const options = {
      width: this.width, height: this.height(), scales, axes, series, legend: { show: false }, focus: { alpha: 0.25 },
      padding: [15 + this.strip(), this.margin(), 0, 0],
      cursor: {
        drag: { x: true, y: false, setScale: false, dist: 5 }, points: { show: false }, y: false,
        bind: { dblclick: () => () => zoom(this.group, null) },
      },
      hooks: {
        setSelect: [(u) => {
          if (u.select.width < 4) return;
          const ends = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
          u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          zoom(this.group, ends);
        }],
        setCursor: [(u) => this.hover(u)],
        draw: [(u) => this.extras(u)],
      },
    };
    this.chartOf = new uPlot(options, this.values(), this.chart);
  }
  /* Room right of the plot for the words of levels. */
  margin() {
    const words = this.panel.levels.flatMap(({ text, axis }) => broken(text, axis));
    return Math.max(this.panel.axes.length > 1 ? 0 : 20, words.length ? 8 + 6.2 * largest(words.map(({ length }) => length)) : 0);
  }
  update(panel) {
    const names = ({ lines }) => JSON.stringify(lines.map(({ name, legend, axis }) => [name, legend, axis]));
    const same = names(panel) === names(this.panel), pointed = this.chart.querySelector(".tip").hidden ? null : this.at;
    super.update(panel);
    this.align();
    if (same) {
      for (const each of this.entries.values()) each.line = panel.lines.find(({ legend }) => legend === each.line.legend);
      this.chartOf.setData(this.values(), false);
    } else {
      for (const list of this.figure.querySelectorAll(".legend")) list.remove();
      this.legend();
      this.draw();
      this.toggle();
    }
    const [min, max] = this.range();
    this.chartOf.batch(() => this.chartOf.setScale("x", { min, max }));
    if (pointed && same && this.data[pointed.i][pointed.k] != null) {
      const y = this.chartOf.valToPos(this.data[pointed.i][pointed.k], `y${panel.lines[pointed.i].axis}`);
      this.at = { ...pointed, x: this.chartOf.valToPos(this.x[pointed.k], "x"), y };
      this.show(this.at, false);
    } else this.hide();
  }
  /* The words of marks have rows above the plot area. */
  strip() { return LABEL * Math.min(this.panel.marks.length, LABEL_ROWS); }
  height() { return (this.panel.axes.length > 1 ? 300 : 240) + this.strip(); }
  ends(i, low, high) {
    const { zero } = this.panel.axes[i];
    if (low === null || low === undefined) return this.log[i] ? [1, 10] : [0, 1];
    if (this.log[i]) {
      const room = Math.max((high / low) ** 0.05, 1.05);
      return [low / room, high * room];
    }
    const level = Math.max(high, ...this.panel.levels.filter((each) => each.axis === i).map((each) => each.value), zero ? 0 : -Infinity);
    const room = 0.05 * (level - (zero ? Math.min(low, 0) : low)) || Math.abs(level) * 0.05 || 1;
    return [zero && low >= 0 ? 0 : low - room, level + room];
  }
  resized() { if (this.chartOf && this.width !== this.chartOf.width) this.chartOf.setSize({ width: this.width, height: this.height() }); }
  zoomed() {
    super.zoomed();
    const [min, max] = this.range();
    this.silent = true;
    this.chartOf.batch(() => this.chartOf.setScale("x", { min, max }));
    this.chartOf.setCursor({ left: -10, top: -10 }, true);
    this.silent = false;
    this.chartOf.setSeries(null, { focus: true }, false);
  }
  themed() { this.swatches(); this.chartOf.redraw(false, true); }
  pointed(x) {
    const known = x === null ? -10 : this.chartOf.valToPos(x, "x");
    this.silent = true;
    this.chartOf.setCursor({ left: known, top: -10 }, true);
    this.silent = false;
    this.labels(x === null ? null : nearest(this.x, x));
  }
  /* The place of the line's value nearest to the place i. */
  close(line, i) {
    const row = this.raw[line];
    for (let off = 0; off < row.length; off++) {
      if (row[i - off] !== undefined) return i - off;
      if (row[i + off] !== undefined) return i + off;
    }
    return null;
  }
  hover(u) {
    if (this.silent) return;
    const { left, top, idx } = u.cursor;
    if (idx === null || idx === undefined || left < 0) {
      if (this.held) return;
      this.hide();
      this.labels(null);
      u.setSeries(null, { focus: true }, false);
      point(this.group, null, this);
      return;
    }
    this.held = false;
    let best = null;
    this.panel.lines.forEach((line, i) => {
      if (!this.visible(i)) return;
      const k = this.close(i, idx);
      if (k === null || this.data[i][k] == null) return;
      const x = u.valToPos(this.x[k], "x") + this.shift(line), y = u.valToPos(this.data[i][k], `y${line.axis}`);
      const distance = (line.dots ? 0.5 : 1) * Math.hypot((x - left) * (this.panel.rates ? 1 : 0.3), y - top);
      if (Math.abs(x - left) < 120 && (!best || distance < best.distance)) best = { i, k, x, y, distance };
    });
    if (!best) return this.hide();
    this.at = best;
    this.show(best, false);
    point(this.group, this.x[idx], this);
  }
  show({ i, k, x, y }, aloud) {
    const line = this.panel.lines[i], raw = this.raw[i][k], u = this.chartOf;
    const where = this.panel.rates ? `learning rate ${shown(this.x[k])}` : `step ${this.x[k]}`;
    let value = this.panel.rates && raw === Infinity ? "diverged" : shown(raw);
    if (this.weight && drawn(raw) && !line.dots) value += ` (smoothed ${shown(this.data[i][k])})`;
    this.tell(x + u.over.offsetLeft, y + u.over.offsetTop, `${line.name}: ${value}\n${where}${this.marksAt(x)}`, aloud);
    u.setSeries(i + 1, { focus: true }, false);
    this.labels(k);
  }
  labels(k) {
    for (const { value, line, count } of this.entries.values()) {
      const place = k === null || count > 1 ? null : this.close(this.panel.lines.indexOf(line), k);
      value.textContent = place === null ? "" : shown(this.raw[this.panel.lines.indexOf(line)][place]);
    }
  }
  hide() {
    super.hide();
    this.held = false;
  }
  move(across, down) {
    const u = this.chartOf, seen = this.panel.lines.map((_, i) => i).filter((i) => this.visible(i) && this.raw[i].some((v) => v !== undefined));
    if (!seen.length) return;
    let { i, k } = this.at || { i: seen[0], k: -1 };
    if (!seen.includes(i)) i = seen[0];
    i = seen[(seen.indexOf(i) + down + seen.length) % seen.length];
    const places = this.raw[i].flatMap((v, place) => (v === undefined ? [] : [place]));
    const now = k < 0 ? (across < 0 ? places.length : -1) : nearest(places, k);
    k = places[Math.min(Math.max(now + across, 0), places.length - 1)];
    const drawnValue = this.data[i][k];
    const y = drawnValue == null ? 0 : u.valToPos(drawnValue, `y${this.panel.lines[i].axis}`);
    this.at = { i, k, x: u.valToPos(this.x[k], "x"), y };
    this.silent = true;
    u.setCursor({ left: this.at.x, top: y }, true);
    this.silent = false;
    this.show(this.at, true);
    this.held = true;
    point(this.group, this.x[k], this);
  }
  /* Levels, marks and crosses of diverged runs. */
  extras(u) {
    const { ctx } = u, scale = uPlot.pxRatio, { left, top, width, height } = u.bbox;
    ctx.save();
    ctx.font = `${11 * scale}px system-ui, sans-serif`;
    ctx.lineWidth = scale;
    for (const level of this.panel.levels) {
      const y = u.valToPos(level.value, `y${level.axis}`, true);
      if (!(y >= top && y <= top + height)) continue;
      ctx.strokeStyle = ctx.fillStyle = theme.quiet;
      ctx.setLineDash([6 * scale, 4 * scale]);
      ctx.beginPath(); ctx.moveTo(left, y); ctx.lineTo(left + width, y); ctx.stroke();
      ctx.setLineDash([]);
      ctx.textAlign = "left";
      const words = broken(level.text, level.axis), tall = 12 * scale, x = (u.width - this.margin() + 5) * scale;
      const first = Math.min(Math.max(y + 4 * scale - ((words.length - 1) * tall) / 2, top + 8 * scale), top + height - (words.length - 1) * tall);
      words.forEach((word, k) => ctx.fillText(word, x, first + k * tall));
    }
    this.rules(u, ctx, scale);
    if (this.panel.rates) {
      this.bands(u, ctx);
      this.dots(u, ctx, scale);
    }
    ctx.restore();
  }
  /* Vertical lines of marks. Their words, shortened, stand above the plot area; marks side by side share them. */
  rules(u, ctx, scale) {
    const { left, top, width, height } = u.bbox;
    const seen = this.panel.marks.map((mark) => ({ mark, x: u.valToPos(mark.at, "x", true) })).filter(({ x }) => x >= left - 1 && x <= left + width + 1);
    for (const { mark, x } of seen) {
      const fell = mark.kind === "fell";
      ctx.strokeStyle = ctx.fillStyle = fell ? theme.fell : theme.ink;
      ctx.setLineDash(fell ? [1 * scale, 3 * scale] : { rose: [2 * scale, 4 * scale], diverged: [], changed: [8 * scale, 3 * scale] }[mark.kind]);
      ctx.beginPath(); ctx.moveTo(x, top); ctx.lineTo(x, top + height); ctx.stroke();
      if (fell) {
        ctx.beginPath(); ctx.moveTo(x, top + 2 * scale); ctx.lineTo(x - 5 * scale, top - 6 * scale); ctx.lineTo(x + 5 * scale, top - 6 * scale); ctx.fill();
      }
    }
    ctx.setLineDash([]);
    ctx.textAlign = "left";
    const shared = [];
    for (const each of seen.sort((a, b) => a.x - b.x)) {
      const last = shared.at(-1);
      if (last && last[0].mark.kind === each.mark.kind && each.x - last[0].x < 12 * scale) last.push(each); else shared.push([each]);
    }
    /* The first of each kind have the places; what finds none is told under the pointer. */
    const taken = Array.from({ length: LABEL_ROWS }, () => []), room = 6 * scale;
    this.labeled = [];
    for (const members of shared) {
      const [{ mark, x }] = members, more = members.length > 1 ? ` +${members.length - 1}` : "";
      const text = `${mark.text.replace(/^\S*\/(?=[^/]+$)/, "")}${more} at ${mark.at}`, wide = ctx.measureText(text).width;
      const from = Math.max(Math.min(x - wide / 2, left + width - wide), left);
      const row = taken.findIndex((others) => others.every(([low, high]) => from > high + room || from + wide < low - room));
      if (row < 0 || row * LABEL >= this.strip()) continue;
      taken[row].push([from, from + wide]);
      const base = top - (11 + row * LABEL) * scale;
      ctx.fillStyle = ctx.strokeStyle = mark.kind === "fell" ? theme.fell : theme.ink;
      ctx.fillText(text, from, base);
      this.labeled.push({ from: from / scale, to: (from + wide) / scale, base: base / scale, text: members.map((each) => `${each.mark.text} at ${each.mark.at}`).join("\n") });
    }
  }
  /* Marks at a place of the plot area, in full words. */
  marksAt(x) {
    const near = this.panel.marks.filter((mark) => Math.abs(this.chartOf.valToPos(mark.at, "x") - x) < 4);
    return near.map((mark) => `\n${mark.text} at ${mark.at}`).join("");
  }
  /* Dots of one learning rate stand beside each other by arm, so that no arm hides another. */
  shift(line) {
    if (!line.dots) return 0;
    const names = [...this.entries.keys()];
    return (names.indexOf(line.legend) - (names.length - 1) / 2) * Math.min(9, 50 / names.length);
  }
  /* The range of an arm's seeds at every rate. */
  bands(u, ctx) {
    for (const name of this.entries.keys()) {
      const members = this.panel.lines.map((_, i) => i).filter((i) => this.panel.lines[i].dots && this.panel.lines[i].legend === name && this.visible(i));
      const ends = this.x.flatMap((x, k) => {
        const values = members.map((i) => this.data[i][k]).filter((value) => value !== undefined && value !== null);
        return values.length ? [[u.valToPos(x, "x", true), ...[Math.min(...values), largest(values)].map((y) => u.valToPos(y, "y0", true))]] : [];
      });
      if (!ends.length) continue;
      ctx.fillStyle = colorOf(this.entries.get(name).line.color);
      ctx.globalAlpha = 0.13;
      ctx.beginPath();
      for (const [x, low] of ends) ctx.lineTo(x, low);
      for (const [x, , high] of ends.reverse()) ctx.lineTo(x, high);
      ctx.fill();
      ctx.globalAlpha = 1;
    }
  }
  dots(u, ctx, scale) {
    ctx.setLineDash([]);
    this.panel.lines.forEach((line, i) => {
      if (!line.dots || !this.visible(i)) return;
      ctx.strokeStyle = ctx.fillStyle = colorOf(line.color);
      this.raw[i].forEach((value, k) => {
        if (value === undefined || this.data[i][k] === null) return;
        const x = u.valToPos(this.x[k], "x", true) + this.shift(line) * scale, y = u.valToPos(this.data[i][k], "y0", true);
        ctx.beginPath();
        if (value === Infinity) {
          const size = 4 * scale;
          ctx.lineWidth = 2 * scale;
          ctx.moveTo(x - size, y - size); ctx.lineTo(x + size, y + size);
          ctx.moveTo(x - size, y + size); ctx.lineTo(x + size, y - size);
          ctx.stroke();
        } else {
          ctx.globalAlpha = 0.75;
          ctx.arc(x, y, 3.5 * scale, 0, 2 * Math.PI);
          ctx.fill();
          ctx.globalAlpha = 1;
        }
      });
    });
  }
}
