"use strict";
(() => {
  const data = JSON.parse(byId("data").textContent);
  const [ta, tb] = data.thresholds;
  const side = (x, y) => (x >= ta) !== (y >= tb);
  const lines = {
    id: "thresholds",
    afterDraw(shown) {
      const { ctx, chartArea: area, scales } = shown;
      ctx.save();
      ctx.strokeStyle = colour("--dim");
      ctx.setLineDash([5, 4]);
      ctx.beginPath();
      const x = scales.x.getPixelForValue(ta), y = scales.y.getPixelForValue(tb);
      if (x >= area.left && x <= area.right) { ctx.moveTo(x, area.top); ctx.lineTo(x, area.bottom); }
      if (y >= area.top && y <= area.bottom) { ctx.moveTo(area.left, y); ctx.lineTo(area.right, y); }
      ctx.stroke();
      ctx.restore();
    },
  };
  const set = (label, name, wanted) => ({ label, backgroundColor: colour(name) + "99", pointRadius: 2.5, data: data.points.filter(([x, y]) => side(x, y) === wanted).map(([x, y]) => ({ x, y })) });
  chart("scatter", () => ({
    type: "scatter",
    data: { datasets: [set("same side", "--accent", false), set("changes sides", "--drop", true)] },
    options: { maintainAspectRatio: false, scales: { x: { title: { display: true, text: `a: ${data.heads[0]}` } }, y: { title: { display: true, text: `b: ${data.heads[1]}` } } }, plugins: { legend: { position: "bottom" } } },
    plugins: [lines],
  }));

  const percentile = (place) => `${(100 * place).toFixed(1)}%`;
  for (const [name, pairs] of Object.entries(data.lists)) {
    const into = byId(`list-${name}`);
    if (!pairs.length) { into.replaceChildren(element("p", { text: "None." })); continue; }
    const items = pairs.map((pair) => {
      const item = data.items[pair.key];
      return { ...item, score: pair.b, facts: [["score in a", pair.a.toFixed(4)], ["score in b", pair.b.toFixed(4)], ["scores lower in a", percentile(pair.pa)], ["scores lower in b", percentile(pair.pb)], ...item.facts] };
    });
    if (items.some((item) => item.image)) {
      const grid = element("div", { class: "gallery" });
      items.forEach((item, i) => {
        const made = figure(item, () => view(items, i));
        made.querySelector("figcaption b").textContent = `${pairs[i].a.toFixed(2)} → ${pairs[i].b.toFixed(2)}`;
        grid.append(made);
      });
      into.replaceChildren(grid);
    } else {
      const table = element("table", {}, element("tr", {}, ...["image_id", "a", "b", "lower in a", "lower in b"].map((head, i) => element("th", { scope: "col", class: i ? "" : "text", text: head }))));
      pairs.forEach((pair, i) => table.append(element("tr", {}, element("td", { class: "text", text: items[i].id }), ...[pair.a.toFixed(4), pair.b.toFixed(4), percentile(pair.pa), percentile(pair.pb)].map((text) => element("td", { text })))));
      into.replaceChildren(element("div", { class: "scroll" }, table));
    }
  }
})();
