/* Keeps the page of a server up to date: texts in place, plots that changed anew. Zoom, chosen lines and place stay. */
"use strict";

let version = content.version;
const live = element("p", "Live.", { class: "quiet", role: "status" });
document.querySelector("main").before(live);
document.documentElement.classList.add("live");

/* A document is parsed without running anything of it, and its nodes are put where they belong. */
function ask() {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("GET", `?since=${version}`);
    request.responseType = "document";
    request.timeout = 60000;
    request.onload = () => (request.status === 200 || request.status === 204 ? resolve(request.response) : reject(new Error(String(request.status))));
    request.onerror = request.ontimeout = () => reject(new Error("no answer"));
    request.send();
  });
}

/* Makes the children of a node those of another one; nodes of one kind, and sections and plots of one key, stay what they are. */
function become(node, model) {
  const kept = new Map([...node.children].filter((each) => each.dataset.key).map((each) => [each.dataset.key, each]));
  let here = node.firstChild;
  for (const next of [...model.childNodes]) {
    const key = next.dataset && next.dataset.key, known = key && kept.get(key);
    if (known) {
      if (known !== here) node.insertBefore(known, here); else here = here.nextSibling;
      if (known.nodeName === "FIGURE") adopt(known, next);
      else {
        attributes(known, next);
        become(known, next);
      }
      continue;
    }
    if (!key && here && !(here.dataset && here.dataset.key) && here.nodeName === next.nodeName) {
      const old = here;
      here = here.nextSibling;
      if (next.nodeType === Node.TEXT_NODE) {
        if (old.data !== next.data) old.data = next.data;
      } else {
        attributes(old, next);
        become(old, next);
      }
      continue;
    }
    node.insertBefore(document.importNode(next, true), here);
  }
  while (here) {
    const next = here.nextSibling;
    here.remove();
    here = next;
  }
}
function attributes(node, model) {
  for (const { name } of [...node.attributes]) if (!model.hasAttribute(name) && name !== "open") node.removeAttribute(name);
  for (const { name, value } of [...model.attributes]) if (name !== "open" && node.getAttribute(name) !== value) node.setAttribute(name, value);
}
/* A plot's texts; what the script drew in it stays. */
function adopt(figure, model) {
  attributes(figure, model);
  become(figure.querySelector("figcaption"), model.querySelector("figcaption"));
  const words = figure.querySelector("details p"), others = model.querySelector("details p");
  words.textContent = others.textContent;
  words.id = others.id;
  const chart = figure.querySelector(".chart");
  if (chart) chart.setAttribute("aria-describedby", words.id);
}

function merge(page) {
  const { version: reached, panels } = JSON.parse(page.getElementById("data").textContent);
  const before = new Map(figures.map((figure) => [figure.dataset.key, content.panels[Number(figure.dataset.panel)]]));
  const keys = [...page.querySelectorAll("figure[data-panel]")].map((figure) => figure.dataset.key);
  const fresh = new Set();
  content.panels = panels.map((panel, i) => {
    if (panel.same) return before.get(panel.same);
    fresh.add(keys[i]);
    return opened(panel);
  });
  version = reached;
  document.title = page.title;
  /* What is looked at stays where it is, whatever becomes longer above it. */
  const seen = [...document.querySelectorAll("figure, main > :not(section), section > :not(.pictures)")].find((each) => each.getBoundingClientRect().bottom > 0);
  const place = seen && seen.getBoundingClientRect().top;
  become(document.querySelector("main"), page.querySelector("main"));
  hints();
  if (seen && seen.isConnected && scrollY > 0) scrollBy({ top: seen.getBoundingClientRect().top - place, behavior: "instant" });
  figures = [...document.querySelectorAll("figure[data-panel]")];
  const shown = new Set(figures);
  for (const [figure, plot] of plots) if (!shown.has(figure)) { plot.leave(); plots.delete(figure); }
  for (const group of groups.values()) Object.assign(group, { low: Infinity, high: -Infinity });
  for (const panel of content.panels) panel.shared = groupOf(panel);
  for (const figure of figures) {
    const plot = plots.get(figure), panel = content.panels[Number(figure.dataset.panel)];
    if (!plot) observer.observe(figure);
    else if (fresh.has(figure.dataset.key)) plot.update(panel);
    else if (!plot.group.range) plot.zoomed();
  }
}

/* A page that is not looked at asks seldom; asking again begins when the answer is there. */
async function follow() {
  try {
    const page = await ask();
    if (page && page.getElementById("data")) merge(page);
    live.textContent = `Live: looked at ${new Date().toTimeString().slice(0, 8)}.`;
    live.className = "quiet";
  } catch (error) {
    live.textContent = `No connection to the server (${error.message}); what is below may be old.`;
    live.className = "note";
  }
  setTimeout(follow, document.hidden ? 10000 : 1000);
}
setTimeout(follow, 1000);
