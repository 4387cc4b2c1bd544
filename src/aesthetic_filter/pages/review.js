"use strict";
(() => {
  const token = document.body.dataset.token;

  const memory = { get: (key) => { try { return localStorage.getItem(key); } catch { return null; } }, set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* private mode */ } } };
  const who = byId("reviewer");
  who.value = memory.get("aesthetic-filter-reviewer") || document.body.dataset.reviewer;

  let queue = [];        // items not answered yet; the first is the one shown
  let asking = null;     // the request for more, while it is under way
  let saving = Promise.resolve();
  let grid = false, reveal = false;
  const answered = new Set();  // keys: an answer may overtake a request for more, whose reply still has it
  let batch = [], current = 0;   // the grid's items, and which of them the keys act on
  let last = null;       // the last status
  const GRID = 12;

  async function post(path, body) {
    let answer;
    try {
      answer = await fetch(path, { method: "POST", headers: { "content-type": "application/json", "x-token": token }, body: JSON.stringify({ reviewer: who.value, ...body }) });
    } catch {
      throw new Error("The review has stopped running. Start the command again: everything that was saved is kept.");
    }
    const found = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(found.error || `the server said ${answer.status}`);
    return found;
  }

  function say(error) {
    byId("problem").textContent = error ? error.message : "";
    byId("problem").hidden = !error;
  }

  const source = (item) => `/image/${item.key}?token=${encodeURIComponent(token)}`;

  async function fill() {
    if (asking) return asking;
    asking = (async () => {
      let found;
      do {
        await saving;
        found = await post("/api/next", { count: grid ? GRID : 6 });
        // What is waiting stays: the reply may be older than the last answers.
        const known = new Set([...queue, ...batch].map((item) => item.key));
        queue.push(...found.items.filter((item) => !answered.has(item.key) && !known.has(item.key)));
      } while (!queue.length && found.items.some((item) => answered.has(item.key)));
      for (const item of queue.slice(0, 4)) new Image().src = source(item);
      show(found.status);
    })();
    try { await asking; say(null); } catch (error) { say(error); } finally { asking = null; }
  }

  function picture(item, into) {
    const image = element("img", { alt: `Image ${item.key + 1}` });
    image.addEventListener("error", async () => {
      let why = "this image cannot be shown";
      try { const answer = await fetch(source(item)); why = (await answer.json()).error || why; } catch { /* it stays as it is */ }
      into.replaceChildren(element("p", { class: "none", text: `${item.id}: ${why}. Skip it.` }));
    });
    image.src = source(item);
    into.replaceChildren(image);
  }

  function caption(item) { return item ? (reveal ? `${item.id} · score ${item.score.toFixed(3)}` : item.id) : ""; }

  function draw() {
    byId("one").hidden = grid;
    byId("many").hidden = !grid;
    byId("mode").setAttribute("aria-pressed", grid);
    byId("reveal").setAttribute("aria-pressed", reveal);
    if (grid) return drawGrid();
    const item = queue[0], frame = byId("frame");
    byId("caption").textContent = caption(item);
    if (!item) { frame.dataset.key = ""; frame.replaceChildren(element("p", { class: "none", text: asking ? "Loading…" : "Nothing left to judge. The threshold stands on the right; the labels are in the file." })); return; }
    if (frame.dataset.key !== String(item.key)) { frame.dataset.key = item.key; picture(item, frame); }
  }

  function drawGrid() {
    const many = byId("many");
    many.replaceChildren(...batch.map((item, i) => {
      const pic = element("span", { class: "pic" });
      const made = element("figure", { "data-key": item.key, "aria-current": i === current ? "true" : null, class: item.said ? `said-${item.said}` : "" }, pic,
        element("figcaption", {}, element("button", { type: "button", text: "Keep", "aria-pressed": item.said === "keep", onclick: () => answer("keep", i) }), element("button", { type: "button", text: "Drop", "aria-pressed": item.said === "drop", onclick: () => answer("drop", i) }), element("span", { class: "dim", text: reveal ? item.score.toFixed(2) : "" })));
      pic.addEventListener("click", () => answer(item.said === "keep" ? "drop" : "keep", i));
      if (item.shown) pic.append(item.shown); else { picture(item, pic); item.shown = pic.firstChild; }
      return made;
    }));
    if (!batch.length) many.replaceChildren(element("p", { class: "none", text: asking ? "Loading…" : "Nothing left to judge." }));
  }

  async function nextBatch() {
    batch = []; current = 0; queue = [];
    drawGrid();
    await fill();
    batch = queue.slice(0, GRID);
    drawGrid();
  }

  function answer(value, at) {
    let item;
    if (grid) {
      const place = at === undefined ? current : at;
      item = batch[place];
      if (!item) return;
      item.said = value;
      current = batch.findIndex((other) => !other.said);
      if (current < 0) current = batch.length;
    } else {
      const image = byId("frame").querySelector("img");
      if (value !== "skip" && !(image && image.complete && image.naturalWidth)) return; // nobody has seen it yet
      item = queue.shift();
      if (!item) return;
    }
    answered.add(item.key);
    draw();
    saving = saving.then(() => save(item, value));
    if (grid) { if (current === batch.length) saving.then(nextBatch); }
    else if (queue.length < 3) saving.then(fill).then(draw);
  }

  async function save(item, value) {
    let found;
    try {
      found = await post("/api/label", { key: item.key, value });
    } catch (error) {  // it is not in the file: show it again
      say(error);
      item.said = null;
      answered.delete(item.key);
      if (!grid) queue.unshift(item);
      return draw();
    }
    say(null);
    show(found.status);
  }

  async function undo() {
    await saving;
    try {
      const found = await post("/api/undo", {});
      say(null);
      show(found.status);
      if (!found.item) return;
      answered.delete(found.item.key);
      if (grid) {
        const place = batch.findIndex((item) => item.key === found.item.key);
        if (place >= 0) { batch[place].said = null; current = place; } else { batch.unshift(found.item); current = 0; }
      } else queue.unshift(found.item);
      draw();
    } catch (error) { say(error); }
  }

  // What follows from the labels.
  const between = (found) => `${(100 * found.estimate).toFixed(0)}% (${(100 * found.low).toFixed(0)} to ${(100 * found.high).toFixed(0)})`;
  let curve = null;

  function show(status) {
    last = status;
    byId("progress").max = status.size;
    byId("progress").value = Math.min(status.judged, status.size);
    const people = Object.entries(status.reviewers).map(([name, count]) => `${name} ${whole(count)}`).join(", ");
    byId("done").textContent = `${whole(status.judged)} of ${whole(status.size)} images judged` + (status.skipped ? `, ${whole(status.skipped)} skipped` : "") + (people ? ` · ${people}` : "");
    byId("agreement").textContent = status.agreement ? `Reviewers agree: ${status.agreement}` : "";
    if (document.activeElement !== byId("value")) { byId("measure").value = status.target.measure; byId("value").value = status.target.value; }
    const found = status.estimate, advice = found && found.recommendation;
    byId("notes").replaceChildren(...(found ? found.notes : []).map((note) => element("p", { text: note })));
    if (!found) {
      byId("threshold").textContent = "…";
      byId("interval").textContent = `An estimate comes after ${status.needed} labels, keeps and drops among them.`;
      byId("measures").replaceChildren();
    } else if (!advice || advice.threshold === null) {
      byId("threshold").textContent = "none";
      byId("interval").textContent = "No threshold reaches the target, as far as these labels tell.";
      byId("measures").replaceChildren();
    } else {
      const end = (value) => (value === null ? "not known" : value.toFixed(2));
      byId("threshold").textContent = String(advice.threshold);
      byId("interval").textContent = advice.target.measure === "kept" ? `keeps ${whole(advice.point.kept)} images` : `95% interval ${end(advice.low)} to ${end(advice.high)} · keeps ${whole(advice.point.kept)} images (${(100 * advice.point.share).toFixed(1)}%)`;
      const lines = [["precision", between(advice.point.precision)], ["recall", between(advice.point.recall)], ["separation (AUC)", `${found.separation.estimate.toFixed(2)} (${found.separation.low.toFixed(2)} to ${found.separation.high.toFixed(2)})`]];
      if (advice.more_labels !== null) lines.push(["more labels for ±5%", advice.more_labels ? `about ${whole(advice.more_labels)}` : "none: it is"]);
      byId("measures").replaceChildren(...lines.flatMap(([name, value]) => [element("dt", { text: name }), element("dd", { text: value })]));
    }
    if (found) drawCurve();
  }

  function drawCurve() {
    const line = (label, values, name, more) => ({ label, data: values, borderColor: colour(name), backgroundColor: colour(name), borderWidth: 2, pointRadius: 0, ...more });
    const configure = () => {
      const { threshold, precision, low, high, recall } = last.estimate.curve;
      return {
        type: "line",
        data: { labels: threshold, datasets: [
          line("precision", precision, "--keep"), line("recall", recall, "--accent", { borderDash: [6, 4] }),
          line("", high, "--keep", { borderWidth: 0, fill: "+1", backgroundColor: colour("--keep") + "33" }), line("", low, "--keep", { borderWidth: 0 })] },
        options: { maintainAspectRatio: false, interaction: { mode: "index", intersect: false }, scales: { x: { ticks: { maxTicksLimit: 6, maxRotation: 0, callback: (_, i) => (i in threshold ? +threshold[i].toFixed(2) : "") }, grid: { display: false }, title: { display: true, text: "threshold" } }, y: { min: 0, max: 1 } }, plugins: { legend: { position: "bottom", labels: { filter: (item) => item.text } }, tooltip: { filter: (item) => item.dataset.label } } },
      };
    };
    if (!curve) { curve = chart("curve", configure); return; }
    const fresh = configure();
    curve.chart.data = fresh.data;
    curve.chart.options = fresh.options;
    curve.chart.update();
  }

  async function aim() {
    const value = parseFloat(byId("value").value);
    try { const found = await post("/api/target", { measure: byId("measure").value, value }); say(null); show(found.status); } catch (error) { say(error); }
  }
  byId("measure").addEventListener("change", aim);
  byId("value").addEventListener("change", aim);

  who.addEventListener("change", async () => {
    if (!who.value.trim()) who.value = document.body.dataset.reviewer;
    memory.set("aesthetic-filter-reviewer", who.value);
    await saving;
    queue = [];
    answered.clear();
    if (grid) return nextBatch();
    await fill();
    draw();
  });

  function toggleGrid() {
    grid = !grid;
    if (grid) nextBatch(); else { batch = []; saving.then(() => { queue = []; return fill(); }).then(draw); }
    draw();
  }
  function toggleScore() { reveal = !reveal; draw(); }

  for (const button of document.querySelectorAll("[data-say]")) button.addEventListener("click", () => answer(button.dataset.say));
  byId("undo").addEventListener("click", undo);
  byId("mode").addEventListener("click", toggleGrid);
  byId("reveal").addEventListener("click", toggleScore);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    const act = { k: () => answer("keep"), ArrowRight: () => answer("keep"), d: () => answer("drop"), ArrowLeft: () => answer("drop"), s: () => answer("skip"), u: undo, Backspace: undo, g: toggleGrid, i: toggleScore }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    if (!event.repeat) act();
  });

  fill().then(draw);
})();
