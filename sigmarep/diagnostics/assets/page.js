/* Draws the plots of the page as they come near. */
"use strict";

readTheme();
for (const panel of content.panels) {
  for (const line of panel.lines) Object.assign(line, { x: content.steps[line.steps], y: floats(line.values) });
  panel.shared = groupOf(panel);
}
const plots = new Map();
function build(figure) {
  if (plots.has(figure)) return;
  const panel = content.panels[Number(figure.dataset.panel)];
  const plot = panel.kind === "heat" ? new Heat(figure, panel) : new Lines(figure, panel);
  plots.set(figure, plot);
  if (panel.shared.range) plot.zoomed();
}
const figures = [...document.querySelectorAll("figure[data-panel]")];
/* Plots are made as they come near. */
const observer = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) { observer.unobserve(target); build(target); }
}, { rootMargin: "600px" });
figures.forEach((figure) => observer.observe(figure));
function restyle() { readTheme(); for (const plot of plots.values()) { plot.resized(); plot.themed(); } }
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
addEventListener("beforeprint", () => { document.documentElement.classList.add("paper"); figures.forEach(build); restyle(); });
addEventListener("afterprint", () => { document.documentElement.classList.remove("paper"); restyle(); });
