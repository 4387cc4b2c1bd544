"use strict";
// What the pages share: elements without innerHTML, numbers, colours, charts, and the viewer.

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "text") made.textContent = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children) if (child) made.append(child);
  return made;
}

const byId = (id) => document.getElementById(id);
const whole = (number) => number.toLocaleString("en");
const percent = (part, all) => (all ? (100 * part / all).toFixed(1) : "0.0") + "%";
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const charts = [];

// Draw a chart, and draw it again when the colours change: with the system's theme, and in print.
function chart(id, configure) {
  const canvas = byId(id);
  if (!canvas) return { redraw() {}, chart: null };
  const held = { chart: null };
  held.redraw = () => {
    if (held.chart) held.chart.destroy();
    Chart.defaults.color = colour("--dim");
    Chart.defaults.borderColor = colour("--line");
    Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
    Chart.defaults.animation = false;
    held.chart = new Chart(canvas, configure());
  };
  held.redraw();
  charts.push(held);
  return held;
}

const redrawAll = () => charts.forEach((held) => held.redraw());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
addEventListener("beforeprint", redrawAll);
addEventListener("afterprint", redrawAll);

// One image of a gallery.
function figure(item, open) {
  const caption = item.facts.find(([name]) => ["caption", "txt", "text", "title", "alt"].includes(name.toLowerCase()));
  const alt = `${caption ? caption[1] : item.id}, score ${item.score.toFixed(2)}`;
  const tip = element("span", { class: "tip", "aria-hidden": "true" });
  tip.append(element("strong", { text: item.id }));
  for (const [name, value] of item.facts.slice(0, 8)) tip.append(element("br"), `${name}: ${value}`);
  const picture = item.image
    ? element("img", { src: item.image.src, alt, width: item.image.w, height: item.image.h, decoding: "async" })
    : element("span", { class: "none", text: item.problem || item.id });
  return element("figure",
    { tabindex: "0", role: "button", "aria-label": `${alt}: show it`, onclick: open,
      onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); } } },
    element("span", { class: "pic" }, picture), tip,
    element("figcaption", {}, element("b", { text: item.score.toFixed(2) }),
      element("span", { class: "name", title: item.id }, element("bdi", { text: item.id }))));
}

// Show one image of a list large; arrow keys go on.
function view(items, start) {
  const dialog = byId("viewer");
  let place = start;
  const shown = element("div");  // the buttons stay, and with them the focus
  const show = () => {
    const item = items[place];
    const facts = element("dl");
    facts.append(element("dt", { text: "score" }), element("dd", { text: item.score.toFixed(4) }));
    for (const [name, value] of item.facts) facts.append(element("dt", { text: name }), element("dd", { text: value }));
    shown.replaceChildren(
      item.image ? element("img", { src: item.image.src, alt: `${item.id}, score ${item.score.toFixed(2)}` }) : element("p", { class: "warn", text: item.problem || "no image" }),
      element("h2", { text: item.id }), facts);
  };
  const go = (by) => { place = (place + by + items.length) % items.length; show(); };
  dialog.onkeydown = (event) => {
    if (event.key === "ArrowLeft") go(-1);
    if (event.key === "ArrowRight") go(1);
  };
  dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
  dialog.replaceChildren(shown,
    element("form", { method: "dialog", class: "row" },
      element("button", { type: "button", text: "← Previous", onclick: () => go(-1) }),
      element("button", { type: "button", text: "Next →", onclick: () => go(1) }),
      element("button", { class: "push", text: "Close", autofocus: true })));
  show();
  dialog.showModal();
}
