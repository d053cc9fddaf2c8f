/* Heat maps, drawn on a canvas. */
"use strict";

const SHADES = Array.from({ length: 256 }, (_, i) => blend(VIRIDIS, i / 255));

/* A heat map: a row for each line of its panel, a cell for each value. */
class Heat extends Plot {
  constructor(figure, panel) {
    super(figure, panel);
    this.measure();
    this.rowHeight = Math.max(2, Math.min(14, Math.floor(320 / panel.lines.length)));
    this.at = { row: 0, k: 0 };
    this.canvas = element("canvas");
    this.chart.prepend(this.canvas);
    this.place();
    this.key0();
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => { this.hide(); this.start = null; this.draw(); point(this.group, null, this); });
    this.canvas.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse") this.start = event.offsetX; });
    this.canvas.addEventListener("pointerup", (event) => {
      const { start } = this;
      this.start = null;
      if (start != null && Math.abs(start - event.offsetX) > 5) zoom(this.group, [this.step(Math.min(start, event.offsetX)), this.step(Math.max(start, event.offsetX))]);
    });
    this.canvas.addEventListener("dblclick", () => zoom(this.group, null));
    this.draw();
  }
  measure() {
    const { panel } = this;
    this.top = panel.lines.reduce((top, line) => line.y.reduce((most, value) => (drawn(value) && value > most ? value : most), top), panel.collapsed);
  }
  update(panel) {
    const pointed = !this.tip.hidden;
    super.update(panel);
    this.measure();
    this.rowHeight = Math.max(2, Math.min(14, Math.floor(320 / panel.lines.length)));
    this.place();
    this.most.data = `${shown(this.top)} nats`;
    const row = Math.min(this.at.row, panel.lines.length - 1);
    this.at = { row, k: Math.min(this.at.k, panel.lines[row].x.length - 1) };
    this.themed();
    if (pointed) this.show(false);
  }
  /* Vertical places of rows; every stack of layers has its name above it. */
  place() {
    let y = 2, stack = null, last = null;
    this.heads = [];
    this.tops = this.panel.lines.map((line) => {
      if (line.legend !== stack) {
        stack = line.legend;
        this.heads.push([stack, y + 12]);
        y += 17;
      }
      const block = /block_(\d+)/.exec(line.name), own = block && block[1];
      if (own !== last && last !== null) y += this.rowHeight > 5 ? 6 : 2;
      last = own;
      y += this.rowHeight;
      return y - this.rowHeight;
    });
    this.bottom = y;
  }
  key0() {
    const scale = element("div", undefined, { class: "scale", "aria-hidden": "true" });
    const bar = element("canvas", undefined, { width: "160", height: "12" }), ctx = bar.getContext("2d");
    for (let i = 0; i < 160; i++) { ctx.fillStyle = blend(VIRIDIS, i / 159); ctx.fillRect(i, 0, 1, 12); }
    this.fellSwatch = element("canvas", undefined, { width: "16", height: "12" });
    this.badSwatch = element("canvas", undefined, { width: "16", height: "12" });
    this.most = document.createTextNode(`${shown(this.top)} nats`);
    const below = `${/, head \d+$/.test(this.panel.lines[0].name) ? "a head" : "a layer"} below ${this.panel.collapsed} nats`;
    const keys = [[this.fellSwatch, below], [this.badSwatch, "not finite"]].map(([swatch, text]) => {
      const key = element("span");
      key.append(swatch, ` ${text}`);
      return key;
    });
    scale.append("0", bar, this.most, ...keys);
    this.chart.after(scale);
  }
  x(step) { const [low, high] = this.range(); return AXIS + ((step - low) / (high - low)) * (this.drawnWidth - 2 * AXIS); }
  step(x) { const [low, high] = this.range(); return low + ((x - AXIS) / (this.drawnWidth - 2 * AXIS)) * (high - low); }
  color(value) {
    if (!drawn(value)) return theme.quiet;
    return value < this.panel.collapsed ? "#e8590c" : SHADES[Math.min(Math.max(Math.round((value / this.top) * 255), 0), 255)];
  }
  resized() { if (this.drawnWidth !== this.width) this.themed(); }
  zoomed() {
    super.zoomed();
    this.themed();
  }
  themed() {
    this.cells = null;
    this.draw();
  }
  pointed(x) { this.mark = x; this.draw(); }
  draw() {
    /* Asking for the width lays the page out: once, not for every cell. */
    this.drawnWidth = this.width;
    const { canvas, panel } = this, ratio = window.devicePixelRatio || 1, height = this.bottom + 38;
    canvas.width = this.drawnWidth * ratio; canvas.height = height * ratio;
    canvas.style.width = `${this.drawnWidth}px`; canvas.style.height = `${height}px`;
    const ctx = canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    ctx.font = "11px system-ui, sans-serif";
    for (const [swatch, color] of [[this.fellSwatch, "#e8590c"], [this.badSwatch, theme.quiet]]) {
      const own = swatch.getContext("2d"); own.fillStyle = color; own.fillRect(0, 0, 16, 12);
    }
    this.cells ||= this.colored(ratio, height);
    ctx.drawImage(this.cells, 0, 0, this.drawnWidth, height);
    ctx.fillStyle = theme.quiet;
    for (const [name, y] of this.heads) ctx.fillText(name, AXIS, y);
    ctx.textAlign = "right";
    let before = null, lowest = -20;
    panel.lines.forEach((line, row) => {
      const block = /block_(\d+)/.exec(line.name), label = block ? `block ${block[1]}` : "";
      if (label === before) return;
      before = label;
      if (this.tops[row] - lowest < 12) return;
      lowest = this.tops[row];
      ctx.fillText(label, AXIS - 6, this.tops[row] + Math.max(this.rowHeight, 9));
    });
    ctx.textAlign = "left";
    ctx.font = "9px system-ui, sans-serif";
    /* As many heads as there is room for have their number: each, or every second one, fourth one, … */
    const every = 2 ** Math.ceil(Math.log2(Math.max(9 / this.rowHeight, 1)));
    panel.lines.forEach((line, row) => {
      const head = /, head (\d+)$/.exec(line.name);
      if (head && head[1] % every === 0) ctx.fillText(`head ${head[1]}`, this.drawnWidth - AXIS + 5, this.tops[row] + Math.max(this.rowHeight, 9) - 2);
    });
    ctx.font = "11px system-ui, sans-serif";
    ctx.textAlign = "center";
    ctx.fillText("step", this.drawnWidth / 2, this.bottom + 32);
    const [low, high] = this.range(), count = Math.max(Math.floor(this.drawnWidth / 110), 4);
    const unit = 10 ** Math.floor(Math.log10((high - low) / count)), size = Math.max([1, 2, 5, 10].map((m) => m * unit).find((m) => (high - low) / m <= count), 1);
    for (let step = Math.ceil(low / size) * size; step <= high; step += size) ctx.fillText(shown(step), this.x(step), this.bottom + 16);
    ctx.lineWidth = 1.5;
    for (const mark of panel.marks) this.rule(ctx, mark.at, theme.ink, [3, 3]);
    if (this.mark !== null && this.mark !== undefined) this.rule(ctx, this.mark, theme.quiet, []);
  }
  /* All cells, which are drawn anew only where they change. */
  colored(ratio, height) {
    const canvas = element("canvas", undefined, { width: String(this.drawnWidth * ratio), height: String(height * ratio) });
    const ctx = canvas.getContext("2d"), right = this.drawnWidth - AXIS;
    ctx.scale(ratio, ratio);
    this.panel.lines.forEach((line, row) => {
      const tall = this.rowHeight - (this.rowHeight > 5 ? 1 : 0);
      /* Neighbors of one color are one rectangle. */
      let first = 0, last = 0, shade = null;
      const fill = () => {
        if (shade === null || last <= first) return;
        ctx.fillStyle = shade;
        ctx.fillRect(first, this.tops[row], last - first, tall);
      };
      line.x.forEach((step, k) => {
        const from = this.x(k ? (line.x[k - 1] + step) / 2 : step - (line.x.length > 1 ? 0 : 1));
        const to = this.x(k + 1 < line.x.length ? (step + line.x[k + 1]) / 2 : step + (line.x.length > 1 ? 0 : 1));
        const left = Math.max(Math.floor(from), AXIS), end = Math.min(Math.ceil(to), right);
        if (end <= left) return;
        const color = this.color(line.y[k]);
        if (color !== shade || left > last) {
          fill();
          first = left;
          shade = color;
        }
        last = end;
      });
      fill();
    });
    return canvas;
  }
  rule(ctx, step, color, dash) {
    const x = this.x(step);
    if (x < AXIS - 1 || x > this.width - AXIS + 1) return;
    for (const [style, width, pattern] of [[theme.paper, 3, []], [color, 1.5, dash]]) {
      ctx.strokeStyle = style; ctx.lineWidth = width; ctx.setLineDash(pattern);
      ctx.beginPath(); ctx.moveTo(x, 0); ctx.lineTo(x, this.bottom); ctx.stroke();
    }
  }
  hover(event) {
    const row = this.tops.findIndex((y) => event.offsetY >= y && event.offsetY < y + this.rowHeight);
    if (row < 0 || event.offsetX < AXIS) return this.hide();
    this.at = { row, k: nearest(this.panel.lines[row].x, this.step(event.offsetX)) };
    this.show(false);
  }
  show(aloud) {
    const line = this.panel.lines[this.at.row], step = line.x[this.at.k], value = line.y[this.at.k];
    const unit = drawn(value) ? " nats" : "";
    this.tell(this.x(step), this.tops[this.at.row], `${line.name}: ${shown(value)}${unit}\nstep ${step}`, aloud);
    point(this.group, step, this);
  }
  move(across, down) {
    const row = Math.min(Math.max(this.at.row + down, 0), this.panel.lines.length - 1), { x } = this.panel.lines[row];
    const k = nearest(x, this.panel.lines[this.at.row].x[this.at.k]);
    this.at = { row, k: Math.min(Math.max(k + across, 0), x.length - 1) };
    this.pointed(x[this.at.k]);
    this.show(true);
  }
}
