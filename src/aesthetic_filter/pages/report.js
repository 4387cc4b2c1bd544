"use strict";
(() => {
  const data = JSON.parse(byId("data").textContent);
  if (!data.grid) return;
  const { thresholds, rows_from } = data.grid;
  let place = data.start;

  // About sixty bars, each some steps of the grid wide, so that a threshold never cuts a bar's count wrongly.
  const per = Math.max(1, Math.round(thresholds.length / 60));
  const bars = [];
  for (let i = 0; i < thresholds.length; i += per) {
    const next = i + per < thresholds.length ? rows_from[i + per] : 0;
    const before = i === 0 ? data.scored : rows_from[i];
    bars.push({ from: i, score: thresholds[i], count: before - next });
  }

  const histogram = chart("histogram", () => ({
    data: {
      labels: bars.map((bar) => bar.score),
      datasets: [
        { type: "bar", label: "images", data: bars.map((bar) => bar.count), yAxisID: "y", barPercentage: 1, categoryPercentage: 0.94,
          backgroundColor: bars.map((bar) => colour(bar.from >= place ? "--keep" : "--drop")) },
        { type: "line", label: "at or above, %", data: bars.map((bar) => 100 * (bar.from === 0 ? data.scored : rows_from[bar.from]) / data.scored),
          yAxisID: "share", order: -1, borderColor: colour("--accent"), backgroundColor: colour("--accent"), borderWidth: 2, pointRadius: 0 },
      ],
    },
    options: {
      maintainAspectRatio: false, interaction: { mode: "index", intersect: false },
      onClick: (event, found) => { if (found.length) set(bars[found[0].index].from); },
      scales: {
        x: { title: { display: true, text: "aesthetic score" }, grid: { display: false }, ticks: { maxRotation: 0, autoSkip: true, maxTicksLimit: 14, callback: (_, i) => +bars[i].score.toFixed(2) } },
        y: { title: { display: true, text: "images" }, beginAtZero: true },
        share: { position: "right", min: 0, max: 100, grid: { display: false }, title: { display: true, text: "% at or above" } },
      },
      plugins: { legend: { position: "bottom" }, tooltip: { callbacks: { title: (items) => `score from ${bars[items[0].dataIndex].score}` } } },
    },
  }));

  // The gallery.
  const all = data.gallery;
  const pictured = all.some((item) => item.image);
  const has = (item, why) => item.why.includes(why);
  const nearest = () => {
    const stays = (item) => Math.fround(item.score) >= Math.fround(thresholds[place]);
    const above = all.filter(stays).slice(-12);
    const below = all.filter((item) => !stays(item)).slice(0, 12);
    return [...above, ...below];
  };
  const views = {
    "Best": () => all.filter((item) => has(item, "best")),
    "Around the threshold": nearest,
    "By score band": () => all.filter((item) => has(item, "band")),
    "Worst": () => all.filter((item) => has(item, "worst")).reverse(),
    "All shown": () => all,
  };
  let showing = "By score band";
  const names = Object.keys(views);
  const tabs = byId("tabs");
  const select = (name, focus) => {
    showing = name;
    for (const tab of tabs.children) {
      const on = tab.textContent === name;
      tab.setAttribute("aria-selected", on);
      tab.tabIndex = on ? 0 : -1;
      if (on && focus) tab.focus();
    }
    drawGallery();
  };
  for (const name of names) tabs.append(element("button", { type: "button", role: "tab", text: name, onclick: () => select(name) }));
  tabs.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) select(names[(names.indexOf(showing) + step + names.length) % names.length], true);
  });

  function drawGallery() {
    const items = views[showing]();
    const into = byId("gallery");
    if (pictured) {
      const parts = [];
      const add = (title, some) => {
        const grid = element("div", { class: "gallery" });
        for (const item of some) {
          const made = figure(item, () => view(items, items.indexOf(item)));
          made.dataset.score = item.score;
          grid.append(made);
        }
        if (title) parts.push(element("h3", { text: title }));
        parts.push(grid);
      };
      if (showing === "By score band") {
        for (let band = data.bands.length - 1; band >= 0; band--) {
          const some = items.filter((item) => item.band === band);
          const { name, rows } = data.bands[band];
          if (some.length) add(`${name.replace("-inf to", "below").replace(/^(.*) to inf$/, "from $1")}: ${some.length} of ${whole(rows)}`, some);
        }
      } else add("", items);
      into.replaceChildren(...parts);
    } else {
      const columns = [...new Set(items.flatMap((item) => item.facts.map(([name]) => name)))].slice(0, 7);
      const table = element("table", {}, element("tr", {}, element("th", { class: "text", scope: "col", text: "image_id" }), element("th", { scope: "col", text: "score" }), element("th", { scope: "col", text: "at the threshold" }), ...columns.map((name) => element("th", { class: "text hide-small", scope: "col", text: name }))));
      for (const item of items) {
        const facts = Object.fromEntries(item.facts);
        const line = element("tr", {}, element("td", { class: "text", text: item.id }), element("td", { text: item.score.toFixed(4) }), element("td", { class: "fate" }), ...columns.map((name) => element("td", { class: "text hide-small", text: facts[name] || "" })));
        line.dataset.score = item.score;
        table.append(line);
      }
      into.replaceChildren(element("div", { class: "scroll" }, table));
    }
    mark();
  }

  // Say of everything shown whether it stays.
  function mark() {
    const at = thresholds[place];
    let kept = 0, shown = 0;
    for (const made of byId("gallery").querySelectorAll("[data-score]")) {
      const stays = Math.fround(made.dataset.score) >= Math.fround(at);
      shown += 1; kept += stays;
      if (made.tagName === "FIGURE") { made.classList.toggle("kept", stays); made.classList.toggle("dropped", !stays); }
      else { const fate = made.querySelector(".fate"); fate.textContent = stays ? "kept" : "dropped"; fate.className = "fate " + (stays ? "kept-text" : "dropped-text"); }
    }
    byId("gallery-says").textContent = `${whole(shown)} shown, ${whole(kept)} of them kept at ${at}, ${whole(shown - kept)} dropped.`;
  }

  // The breakdown.
  let groups = null;
  const by = byId("by");
  if (by) {
    data.groups.forEach((column, i) => by.append(element("option", { value: i, text: column.name })));
    const column = () => data.groups[+by.value || 0];
    const share = (group) => (group.scored ? 100 * group.rows_from[place] / group.scored : 0);
    groups = chart("groups", () => ({
      type: "bar",
      data: { labels: column().groups.map((group) => group.label.length > 28 ? group.label.slice(0, 27) + "…" : group.label), datasets: [{ label: "% kept at the threshold", data: column().groups.map(share), backgroundColor: colour("--keep") }] },
      options: { indexAxis: "y", maintainAspectRatio: false, scales: { x: { min: 0, title: { display: true, text: "% kept at the threshold" } }, y: { grid: { display: false }, ticks: { autoSkip: false } } }, plugins: { legend: { display: false } } },
    }));
    groups.update = () => {
      groups.chart.data.datasets[0].data = column().groups.map(share);
      groups.chart.update();
      const table = element("table", {}, element("tr", {}, element("th", { class: "text", scope: "col", text: column().name }), element("th", { scope: "col", text: "rows" }), element("th", { scope: "col", text: "scored" }), element("th", { scope: "col", text: "median" }), element("th", { scope: "col", text: "kept" }), element("th", { scope: "col", text: "%" })));
      for (const group of column().groups) {
        const half = group.rows_from.findLastIndex((n) => 2 * n >= group.scored);
        table.append(element("tr", {}, element("td", { class: "text", text: group.label }), element("td", { text: whole(group.rows) }), element("td", { text: whole(group.scored) }), element("td", { text: group.scored && half >= 0 ? thresholds[half].toFixed(2) : "" }), element("td", { text: whole(group.rows_from[place]) }), element("td", { text: percent(group.rows_from[place], group.scored) })));
      }
      byId("groups-table").replaceChildren(table);
    };
    const size = () => { byId("groups").parentElement.style.height = `${Math.max(140, 60 + 26 * column().groups.length)}px`; };
    by.addEventListener("change", () => { size(); groups.redraw(); groups.update(); });
    size();
  }

  if (data.cosines) {
    const { step, bins } = data.cosines;
    const first = bins[0][0], last = bins[bins.length - 1][0];
    const counts = new Map(bins);
    const places = Array.from({ length: last - first + 1 }, (_, i) => first + i);
    chart("cosines", () => ({
      type: "bar",
      data: { labels: places.map((b) => (b * step).toFixed(2)), datasets: [{ label: "rows", data: places.map((b) => counts.get(b) || 0), barPercentage: 1, categoryPercentage: 0.94, backgroundColor: places.map((b) => colour(b * step < data.foreign_below - 1e-9 ? "--drop" : "--keep")) }] },
      options: { maintainAspectRatio: false, scales: { x: { title: { display: true, text: "cosine to the reference direction" }, grid: { display: false }, ticks: { maxRotation: 0, autoSkip: true, maxTicksLimit: 12 } }, y: { title: { display: true, text: "rows" }, beginAtZero: true } }, plugins: { legend: { display: false } } },
    }));
  }

  // The threshold.
  const slider = byId("threshold"), number = byId("threshold-number");
  slider.max = thresholds.length - 1;
  function set(to) {
    place = Math.min(Math.max(to, 0), thresholds.length - 1);
    const at = thresholds[place], kept = rows_from[place];
    slider.value = place;
    slider.setAttribute("aria-valuetext", `${at}`);
    number.value = at;
    byId("keeps").textContent = `keeps ${whole(kept)} of ${whole(data.scored)} (${percent(kept, data.scored)})`;
    histogram.chart.data.datasets[0].backgroundColor = bars.map((bar) => colour(bar.from >= place ? "--keep" : "--drop"));
    histogram.chart.update();
    if (groups) groups.update();
    if (showing === "Around the threshold") drawGallery(); else mark();
  }
  slider.addEventListener("input", () => set(+slider.value));
  number.addEventListener("change", () => {
    const wanted = parseFloat(number.value);
    if (Number.isNaN(wanted)) return set(place);
    let best = 0;
    thresholds.forEach((t, i) => { if (Math.abs(t - wanted) < Math.abs(thresholds[best] - wanted)) best = i; });
    set(best);
  });
  const quoted = (text) => /^[\w@%+=:,./-]+$/.test(text) ? text : "'" + text.replaceAll("'", "'\"'\"'") + "'";
  const copy = byId("copy");
  copy.addEventListener("click", async () => {
    const command = `aesthetic-filter filter ${quoted(data.scores)} --out kept --min-score ${thresholds[place]}`;
    try { await navigator.clipboard.writeText(command); copy.textContent = "Copied"; }
    catch { prompt("The command:", command); }
    setTimeout(() => { copy.textContent = "Copy filter command"; }, 1500);
  });
  select(pictured ? "By score band" : "Best");
  set(place);
})();
