/* Draws the plots of the page as they come near. */
"use strict";

readTheme();
for (const panel of content.panels) opened(panel).shared = groupOf(panel);
const plots = new Map();
function build(figure) {
  if (plots.has(figure)) return;
  const panel = content.panels[Number(figure.dataset.panel)];
  const plot = panel.kind === "heat" ? new Heat(figure, panel) : new Lines(figure, panel);
  plots.set(figure, plot);
  if (panel.shared.range) plot.zoomed();
}
let figures = [...document.querySelectorAll("figure[data-panel]")];
/* Plots are made as they come near. */
const observer = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) { observer.unobserve(target); build(target); }
}, { rootMargin: "600px" });
figures.forEach((figure) => observer.observe(figure));
/* The others follow while there is nothing else to do, so that scrolling finds them drawn. */
function ahead(deadline) {
  const next = figures.find((figure) => !plots.has(figure));
  if (next && deadline.timeRemaining() > 10) build(next);
  if (next) requestIdleCallback(ahead);
}
if (window.requestIdleCallback) setTimeout(() => requestIdleCallback(ahead), 500);
function restyle() { readTheme(); for (const plot of plots.values()) { plot.resized(); plot.themed(); } }
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
addEventListener("beforeprint", () => { document.documentElement.classList.add("paper"); figures.forEach(build); restyle(); });
addEventListener("afterprint", () => { document.documentElement.classList.remove("paper"); restyle(); });
/* What is wider or longer than its box says so above it: a shadow alone is overlooked. */
function hints() {
  for (const box of document.querySelectorAll(".table, pre")) {
    if (!box.offsetParent) continue;
    let hint = box.previousElementSibling;
    if (!hint || !hint.classList.contains("hint")) {
      hint = element("p", undefined, { class: "hint" });
      box.before(hint);
    }
    const ways = [
      ...(box.scrollWidth > box.clientWidth + 1 ? ["sideways \u2192"] : []), ...(box.scrollHeight > box.clientHeight + 1 ? ["down \u2193"] : []),
    ];
    const text = ways.length ? `There is more: scroll ${ways.join(" and ")}` : "";
    if (hint.textContent !== text) hint.textContent = text;
  }
}
new ResizeObserver(() => requestAnimationFrame(hints)).observe(document.querySelector("main"));
document.addEventListener("toggle", () => requestAnimationFrame(hints), true);
